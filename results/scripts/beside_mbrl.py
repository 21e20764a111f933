"""Compare the time of an environment step of MBPO in dynajax with mbrl-lib, on one core.

    python3.11 -m venv mbrl
    mbrl/bin/pip install torch mbrl==0.2.0
    mbrl/bin/pip install -U "hydra-core>=1.3"  # the older one does not work with Python 3.11
    taskset -c 0 python results/scripts/beside_mbrl.py --python=mbrl/bin/python --out=comparison

mbrl-lib runs in two processes of its own environment, in one of which torch.compile compiles the networks.
All alternate, one at a time. Both have the sizes of the preset `paper`: seven members of four
layers, SAC with two critics, 20 updates, 400 synthetic transitions, and 5,000 gradient steps of a fit every
250 environment steps. Ours includes the environment, theirs does not. With --learners=4, ours are one
program on one core, and theirs take four times the time of one. Not included are mbrl-lib's holdout
evaluations, its loggers and its copies of the best weights. Writes learners_LEARNERS.csv, a line for each
round; beside.py computes the ratios.
"""

import contextlib
import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

import external_code
from dynajax import UsageError, envs, make_config
from dynajax.cli import common
from dynajax.profiling import benchmark

FLAGS = flags.FLAGS
flags.DEFINE_string("python", None, "The interpreter of mbrl-lib's environment.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task whose sizes are used.")
flags.DEFINE_integer("learners", 1, "Learners.", lower_bound=1)
flags.DEFINE_float("seconds", 90, "Seconds for all measurements.", lower_bound=1)
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: Transitions of one of mbrl-lib's rollouts; gradient steps of a timed fit, updates, and matmuls.
ROLLOUT, FIT_STEPS, UPDATES, MATMULS = 4_000, 40, 20, 200


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
    sizes += [config.learn.batch, config.agent.hidden[0], ROLLOUT, FIT_STEPS, UPDATES, MATMULS]
    versions = external_code.versions(FLAGS.python, "mbrl", "torch")
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(external(sizes, compiled=side == "compiled"))
            for side in ("theirs", "compiled")
        }
        stages = stack.enter_context(benchmark.Workload(config)).stages()
        runs: dict[str, Callable[[], Any]] = {
            f"{side}, {name}": functools.partial(call, name)
            for side, call in sides.items()
            for name in ("fit", "updates", "rollout", "act", "matmuls")
        }
        stages["matmuls"] = benchmark.jax_matmul(1, benchmark.SIDE, benchmark.SIDE)
        ours = ("agent update", "matmuls", *benchmark.WHOLE_STEP)
        runs |= {f"ours, {name}": stages[name].run for name in ours}
        seconds = benchmark.interleave(runs, FLAGS.seconds)
    per_step = model.fit_steps / model.fit_every
    mine = {name: seconds[f"ours, {name}"] / stages[name].calls for name in ours}
    times = {
        ("ours", "gradient step of the ensemble"): mine["fit step"],
        ("ours", "SAC update"): mine["agent update"],
        ("ours", "matmul of 256 x 256 alone"): mine["matmuls"],
        ("ours", "environment step"): sum(
            mine[n] * (stages[n].per_step or 1) for n in benchmark.WHOLE_STEP
        ),
    }
    for side in sides:
        fit, updates, rollout, act = (
            FLAGS.learners * seconds[f"{side}, {name}"] / count
            for name, count in (
                ("fit", FIT_STEPS),
                ("updates", UPDATES),
                ("rollout", ROLLOUT),
                ("act", 1),
            )
        )
        times[side, "gradient step of the ensemble"] = fit
        times[side, "SAC update"] = updates
        times[side, "matmul of 256 x 256 alone"] = seconds[f"{side}, matmuls"] / MATMULS
        times[side, "environment step"] = (
            act + updates * config.learn.utd + rollout * config.rollout.batch + fit * per_step
        )
    lines = []
    for work in dict.fromkeys(work for _, work in times):
        rows = zip(*(times[side, work] for side in ("theirs", "compiled", "ours")), strict=True)
        for number, row in enumerate(rows):
            names = ("ms_theirs", "ms_compiled", "ms_ours")
            lines.append(
                {"package": "mbrl", "env": FLAGS.env, "learners": FLAGS.learners, "work": work}
                | {"round": number}
                | {name: f"{1e3 * value:.4f}" for name, value in zip(names, row, strict=True)}
                | {"versions": versions, **external_code.origin()}
            )
    external_code.write(FLAGS.out, f"learners_{FLAGS.learners}.csv", lines)


@contextlib.contextmanager
def external(sizes: Sequence[int], compiled: bool) -> Iterator[Callable[[str], None]]:
    """Start a process of mbrl-lib, and yield a function that calls one of its functions by name."""
    script = Path(__file__).parent / "theirs_mbrl.py"
    words = [external_code.interpreter(FLAGS.python), script, *sizes, int(compiled)]
    with subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        requests, answers = worker.stdin, worker.stdout

        def call(name: str) -> None:
            with contextlib.suppress(BrokenPipeError):
                print(name, file=requests, flush=True)
            if answers.readline().strip() != name:
                raise UsageError(f"--python={FLAGS.python}: mbrl-lib's process ended; see above")

        try:
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                requests.close()


if __name__ == "__main__":
    common.run(main)
