"""Measure the environment steps per second of both engines, with random actions.

    python results/scripts/bench_envs.py --out=bench-envs

For every task: C MuJoCo's `mj_step` alone and dm_control's step (one environment), and the host engine
and the device engine by number of environments. The measurements alternate. Writes envs.csv.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dynajax import envs
from dynajax.cli import common
from dynajax.envs import dmc, mjx
from dynajax.envs.vector import VectorEnv
from dynajax.profiling import benchmark
from dynajax.runs.directory import device_name, write_csv
from dynajax.types import UsageError
from dynajax.xla import backend

FLAGS = flags.FLAGS
flags.DEFINE_list("env", ["cheetah-run", "hopper-hop", "humanoid-walk", "quadruped-run"], "Tasks.")
flags.DEFINE_list(
    "num_envs", [], "Numbers of parallel environments. By default numbers that suit the device."
)
flags.DEFINE_float(
    "seconds", 10, "Seconds for each task and number of environments.", lower_bound=0.01
)
flags.DEFINE_integer("workers", 0, "Worker processes of the host engine.", lower_bound=0)
flags.DEFINE_string("out", "bench-envs", "Folder for envs.csv.")

#: Control steps in one timed run of the device, and of the host.
DEVICE_STEPS, HOST_STEPS = 5, 5


def _raw(env: Any, action: np.ndarray) -> Callable[[], None]:
    """Return a function that does the MuJoCo steps of one control step, without dm_control."""
    import mujoco

    physics, substeps = env.physics, env._n_sub_steps
    model, data = physics.model.ptr, physics.data.ptr

    def run() -> None:
        data.ctrl[:] = action
        mujoco.mj_step(model, data, substeps)

    return run


def single_env(name: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return functions that step one environment without an engine, and their control steps."""
    low, high = dmc.bounds(env := dmc.load(name))
    env.reset()
    action = np.random.default_rng(0).uniform(low, high)
    other = dmc.load(name)
    other.reset()

    def python() -> None:
        if other.step(action).last():
            other.reset()

    return {"mj_step": (_raw(env, action), 1), "dm_control": (python, 1)}


def host_engine(
    name: str, num_envs: int, workers: int
) -> tuple[Callable[[], Any], int, Callable[[], None]]:
    """Return functions that step and close the host engine's environments, and the control steps."""
    pool = VectorEnv(name, num_envs, workers=workers, time_limit=1000, seeds=list(range(num_envs)))
    index, spec = np.arange(num_envs), envs.spec(name)
    pool.reset(index, list(range(num_envs)))
    actions = (
        np.random.default_rng(0).uniform(-1, 1, (num_envs, spec.action_dim)).astype(np.float32)
    )
    since = 0

    def run() -> None:
        nonlocal since
        for _ in range(HOST_STEPS):
            pool.step(index, actions)
        since += HOST_STEPS
        if since >= 900:
            pool.reset(index, list(range(num_envs)))
            since = 0

    return run, HOST_STEPS * num_envs, pool.close


def device_engine(task: mjx.Task, num_envs: int) -> tuple[Callable[[], Any], int, float]:
    """Return a function that steps the device engine, its control steps, and seconds to compile."""
    keys = jax.random.split(jax.random.PRNGKey(0), num_envs)

    def steps(state: mjx.EnvState, key: Any) -> mjx.EnvState:
        def one(state: mjx.EnvState, key: Any) -> tuple[mjx.EnvState, Any]:
            action = jax.random.uniform(key, (task.spec.action_dim,), minval=-1)
            state, reward, _ = task.step(state, action)
            return state, reward

        return jax.lax.scan(one, state, jax.random.split(key, DEVICE_STEPS))[0]

    begin = time.perf_counter()
    reset = backend.jit(jax.vmap(task.reset)).lower(keys).compile()
    state = reset(keys)
    program = backend.jit(jax.vmap(steps), donate_argnums=0).lower(state, keys).compile()
    compiling = time.perf_counter() - begin

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(program(state, keys))

    return run, DEVICE_STEPS * num_envs, compiling


def measure(name: str, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the lines of envs.csv for one task."""
    task, lines = mjx.make(name), []
    for count in counts:
        runs = single_env(name) if count == counts[0] else {}
        step, calls, close = host_engine(name, count, FLAGS.workers)
        runs["host"] = step, calls
        step, calls, compiling = device_engine(task, count)
        runs["mjx"] = step, calls
        seconds = benchmark.interleave({n: run for n, (run, _) in runs.items()}, FLAGS.seconds, 3)
        close()
        for engine, (_, calls) in runs.items():
            rate = calls / np.median(seconds[engine])
            lines.append(
                {
                    "device": device_name(),
                    "env": name,
                    "engine": engine,
                    "num_envs": 1 if engine in ("mj_step", "dm_control") else count,
                    "steps_per_second": f"{rate:.4g}",
                    "compile_seconds": f"{compiling:.3g}" if engine == "mjx" else "",
                }
            )
            extra = f"   compiling {compiling:.1f} s" if engine == "mjx" else ""
            count_text = f"{lines[-1]['num_envs']:>6} environments {rate:>12,.0f} steps/s"
            print(f"{name:<20}{engine:<12}{count_text}{extra}", flush=True)
    return lines


def main(argv: Sequence[str]) -> None:
    """Measure every task, and write the table."""
    on_cpu = jax.local_devices()[0].platform == "cpu"
    try:
        counts = [int(n) for n in FLAGS.num_envs] or [
            1,
            8,
            64,
            256,
            *([] if on_cpu else [1024, 4096]),
        ]
    except ValueError:
        raise UsageError(f"--num_envs={','.join(FLAGS.num_envs)}: whole numbers, as 1,64") from None
    common.start()
    lines = []
    for name in FLAGS.env:
        lines += measure(name, counts)
    out = Path(FLAGS.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "envs.csv", lines)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    common.run(main)
