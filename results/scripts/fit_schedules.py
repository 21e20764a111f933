"""Fit the ensemble with several presets and schedules, on random-policy data of several tasks.

    python results/scripts/fit_schedules.py --env=cheetah-run,humanoid-stand --out=schedules

At each size of the replay buffer a new model is fitted, and refitted after every 250 more
transitions, with each preset's ensemble and each schedule, from the same data and keys. Writes
schedules.csv: gradient steps, and the elites' holdout error (mean squared error of the normalised
targets), likelihood, state R^2 and reward R^2.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from dynajax import envs, make_config
from dynajax.cli import common
from dynajax.diagnose.data import collect, shuffled
from dynajax.models import ensemble, make_model, training
from dynajax.replay import of_transitions
from dynajax.runs.directory import write_csv
from dynajax.xla import backend

FLAGS = flags.FLAGS
flags.DEFINE_list("env", ["cheetah-run", "humanoid-stand", "quadruped-walk"], "Tasks.")
flags.DEFINE_list("sizes", ["2500", "10000", "40000"], "Transitions at the first fit.")
flags.DEFINE_integer(
    "refits", 2, "Fits after the first, each with 250 more transitions.", lower_bound=0
)
flags.DEFINE_string("fix", "scale,target", "Fixes of the model's targets.")
flags.DEFINE_list("preset", ["paper", "fast"], "Presets whose ensembles to fit.")
flags.DEFINE_list("schedule", ["fixed", "early_stop"], "Fit schedules to use with each of them.")
flags.DEFINE_integer("seed", 0, "Seed of data and weights.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration, such as model.members=3.")
flags.DEFINE_string("out", "schedules", "Folder for schedules.csv.")

MEASURES = ("score", "nll", "r2_state", "r2_reward")


def main(argv: Sequence[str]) -> None:
    """Fit all models, and write the table."""
    common.start()
    sizes, lines = [int(size) for size in FLAGS.sizes], []
    capacity = max(sizes) + 250 * FLAGS.refits
    for env in FLAGS.env:
        spec = envs.spec(env)
        data = jax.device_put(shuffled(collect(spec, capacity, FLAGS.seed), FLAGS.seed))
        for preset, schedule in itertools.product(FLAGS.preset, FLAGS.schedule):
            config = make_config(
                env,
                preset=preset,
                fixes=[FLAGS.fix],
                seed=FLAGS.seed,
                settings=common.parse_assignments("--set", FLAGS.set)
                | {"model.schedule": schedule},
            )
            fixes = config.variants[0].fixes
            dynamics = make_model(config.model, spec)
            fit = backend.jit(
                functools.partial(training.fit, dynamics, [fixes], jnp.zeros((), int))
            )
            for size in sizes:
                key = jax.random.PRNGKey(FLAGS.seed)
                model = ensemble.init(dynamics, key)
                for again in range(FLAGS.refits + 1):
                    filled = jnp.arange(capacity) < size + 250 * again
                    key_of_fit = jax.random.fold_in(key, again)
                    steps = config.model.fit_steps
                    buffer = of_transitions(data, filled)
                    model, metrics, _ = fit(model, buffer, key, key_of_fit, steps)
                    line = {
                        "env": env,
                        "preset": preset,
                        "schedule": schedule,
                        "transitions": size + 250 * again,
                        "fit": again,
                        "steps": int(metrics["fit_steps"]),
                    }
                    line |= {name: f"{float(metrics[name]):.5g}" for name in MEASURES}
                    lines.append(line)
                    print(line, flush=True)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "schedules.csv", lines)


if __name__ == "__main__":
    common.run(main)
