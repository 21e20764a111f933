"""Compare the time of an environment step of MBPO in dynajax with mbrl-lib, on one core.

    python3.11 -m venv mbrl
    mbrl/bin/pip install torch mbrl==0.2.0
    mbrl/bin/pip install -U "hydra-core>=1.3"  # the older one does not work with Python 3.11
    taskset -c 0 python results/scripts/beside_mbrl.py --python=mbrl/bin/python --out=comparison

mbrl-lib runs in a process of its own environment; both alternate, and one of them waits. Both have the
sizes of the preset `paper`: seven members of four layers, SAC with two critics, 20 updates, 400 synthetic
transitions, and 5,000 gradient steps of a fit every 250 environment steps. Neither includes the
environment. With --learners=4, ours are one program on one core, and theirs take four times the time of
one. With --compile, torch.compile compiles their networks. Not included are mbrl-lib's holdout
evaluations, its loggers and its copies of the best weights. Writes beside_mbrl.csv: milliseconds, and the
ratio of both.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from absl import flags

import external_code
from dynajax import envs, make_config
from dynajax.cli import common
from dynajax.profiling import benchmark

FLAGS = flags.FLAGS
flags.DEFINE_string("python", None, "The interpreter of mbrl-lib's environment.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task whose sizes are used.")
flags.DEFINE_integer("learners", 1, "Learners.", lower_bound=1)
flags.DEFINE_bool("compile", False, "Compile their networks with torch.compile.")
flags.DEFINE_float("seconds", 90, "Seconds for all measurements.", lower_bound=1)
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: Transitions of one of mbrl-lib's rollouts, gradient steps of a timed fit, and timed updates.
ROLLOUT, FIT_STEPS, UPDATES = 4_000, 40, 20


def main(argv: Sequence[str]) -> None:
    """Time both codes."""
    common.start()
    spec = envs.spec(FLAGS.env)
    config = make_config(
        FLAGS.env,
        algo="mbpo",
        preset="paper",
        seeds=FLAGS.learners,
        settings={"replay.real": 20_000, "replay.synthetic": 20_000, "learn.utd": UPDATES},
    )
    model = config.model
    sizes = [spec.obs_dim, spec.action_dim, model.members, model.elites, model.width, model.depth]
    sizes += [config.learn.batch, config.agent.hidden[0], ROLLOUT]
    sizes.append(int(FLAGS.compile))
    with ExitStack() as stack:
        worker = stack.enter_context(
            subprocess.Popen(
                [FLAGS.python, Path(__file__).parent / "theirs_mbrl.py", *map(str, sizes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": ""},
            )
        )
        assert worker.stdin is not None and worker.stdout is not None
        requests, answers = worker.stdin, worker.stdout
        stack.callback(requests.close)
        versions = answers.readline().strip() + (", torch.compile" if FLAGS.compile else "")

        def theirs(name: str) -> Callable[[], None]:
            def run() -> None:
                print(name, file=requests, flush=True)
                if answers.readline().strip() != name:
                    raise RuntimeError("mbrl-lib's process ended")

            return run

        stages = stack.enter_context(benchmark.Workload(config)).stages()
        runs = {name: theirs(name) for name in ("fit", "updates", "rollout", "act")}
        ours = ("agent update", *benchmark.WHOLE_STEP)
        seconds = benchmark.interleave(
            runs | {f"ours, {name}": stages[name].run for name in ours}, FLAGS.seconds
        )
    seconds |= {name: FLAGS.learners * seconds[name] for name in runs}
    per_step = model.fit_steps / model.fit_every
    mine = {name: seconds[f"ours, {name}"] / stages[name].calls for name in ours}
    step = sum(mine[n] * (stages[n].per_step or 1) for n in benchmark.WHOLE_STEP)
    their_step = (
        seconds["act"]
        + seconds["updates"] / UPDATES * config.learn.utd
        + seconds["rollout"] / ROLLOUT * config.rollout.batch
        + seconds["fit"] / FIT_STEPS * per_step
    )
    pairs = {
        "gradient step of the ensemble": (seconds["fit"] / FIT_STEPS, mine["fit step"]),
        "SAC update": (seconds["updates"] / UPDATES, mine["agent update"]),
        "environment step": (their_step, step),
    }
    lines = []
    for work, (them, us) in pairs.items():
        entry = external_code.line(
            FLAGS.env, FLAGS.learners, versions, them / us, "theirs_over_ours"
        )
        ms = {f"ms_{k}": f"{1e3 * np.median(t):.2f}" for k, t in (("theirs", them), ("ours", us))}
        lines.append({"work": work} | entry | ms)
        print(lines[-1], flush=True)
    compiled = "_compiled" if FLAGS.compile else ""
    learners = f"_{FLAGS.learners}" if FLAGS.learners > 1 else ""
    external_code.write(FLAGS.out, f"beside_mbrl{learners}{compiled}.csv", lines)


if __name__ == "__main__":
    common.run(main)
