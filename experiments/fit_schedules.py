"""Fixed against early-stopped fits of the ensemble, on random-policy data of several tasks.

    python experiments/fit_schedules.py --env=cheetah-run,humanoid-stand --out=schedules

At each replay size a new model is fitted, and refitted, each time after 250 more transitions,
by each schedule in turn, from the same data and keys. Writes schedules.csv: gradient steps, and the
elites' holdout score (mean squared error in the coded targets), state skill and reward R^2.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from dynajax import cli, compiler, dynamics, envs, make_config
from dynajax.diagnose.data import collect, shuffled
from dynajax.folder import write_atomically
from dynajax.types import Replay

FLAGS = flags.FLAGS
flags.DEFINE_list("env", ["cheetah-run", "humanoid-stand", "quadruped-walk"], "Tasks.")
flags.DEFINE_list("sizes", ["2500", "10000", "40000"], "Transitions at the first fit.")
flags.DEFINE_integer(
    "refits", 2, "Fits after the first, each with 250 more transitions.", lower_bound=0
)
flags.DEFINE_string("fix", "scale,target", "Fixes.")
flags.DEFINE_enum("preset", "paper", ["quick", "paper"], "Sizes and cadence.")
flags.DEFINE_integer("seed", 0, "Of data and weights.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration, such as model.members=3.")
flags.DEFINE_string("out", "schedules", "Folder for schedules.csv.")


def main(argv: Sequence[str]) -> None:
    cli.use_compilation_cache()
    sizes, lines = [int(size) for size in FLAGS.sizes], []
    capacity = max(sizes) + 250 * FLAGS.refits
    for env in FLAGS.env:
        spec = envs.spec(env)
        data = jax.device_put(shuffled(collect(spec, capacity, FLAGS.seed), FLAGS.seed))
        config = make_config(env, preset=FLAGS.preset, fixes=[FLAGS.fix], seed=FLAGS.seed,
                             settings=cli.assignments("--set", FLAGS.set)).model  # fmt: skip
        fixes = make_config(env, fixes=[FLAGS.fix]).variants[0].fixes
        for schedule in ("fixed", "early_stop"):
            chosen = dataclasses.replace(config, schedule=schedule)
            fit = compiler.jit(functools.partial(dynamics.fit, chosen, [fixes], jnp.zeros((), int)))
            for size in sizes:
                key = jax.random.PRNGKey(FLAGS.seed)
                model = dynamics.init(chosen, spec, key)
                for again in range(FLAGS.refits + 1):
                    filled = jnp.arange(capacity) < size + 250 * again
                    model, found = fit(
                        model, Replay(data, filled), key, jax.random.fold_in(key, again)
                    )
                    line = {"env": env, "schedule": schedule, "transitions": size + 250 * again,
                            "fit": again, "steps": int(found["fit_steps"])}  # fmt: skip
                    line |= {
                        n: f"{float(found[n]):.5g}" for n in ("score", "r2_state", "r2_reward")
                    }
                    lines.append(line)
                    print(line, flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "schedules.csv", text.getvalue().encode())


if __name__ == "__main__":
    cli.run(main)
