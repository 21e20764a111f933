"""Environment steps per second of both engines, with random actions.

    python experiments/bench_envs.py --out=bench-envs

For every task: C MuJoCo's bare `mj_step` and dm_control's own step (one environment), the host
engine and the device engine by number of rows. All are timed in turn. Writes envs.csv.
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
flags.DEFINE_list("rows", [], "Environments beside each other; by default what suits the device.")
flags.DEFINE_float("seconds", 10, "To spend on each task and number of rows.", lower_bound=0.01)
flags.DEFINE_integer("workers", 0, "Processes of the host engine.", lower_bound=0)
flags.DEFINE_string("out", "bench-envs", "Folder for envs.csv.")

#: Control steps in one timed run of the device, and of the host.
DEVICE_STEPS, HOST_STEPS = 5, 5


def _raw(env: Any, action: np.ndarray) -> Callable[[], None]:
    """C MuJoCo alone, as many steps as a control step has."""
    import mujoco

    physics, substeps = env.physics, env._n_sub_steps
    model, data = physics.model.ptr, physics.data.ptr

    def run() -> None:
        data.ctrl[:] = action
        mujoco.mj_step(model, data, substeps)

    return run


def alone(name: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """One environment without either engine: what to run, and its control steps."""
    low, high = dmc.bounds(env := dmc.load(name))
    env.reset()
    action = np.random.default_rng(0).uniform(low, high)
    other = dmc.load(name)
    other.reset()

    def python() -> None:
        if other.step(action).last():
            other.reset()

    return {"mj_step": (_raw(env, action), 1), "dm_control": (python, 1)}


def host(name: str, rows: int, workers: int) -> tuple[Callable[[], Any], int, Callable[[], None]]:
    """The host engine's pool, its control steps in one run, and how to close it."""
    pool = VectorEnv(name, rows, workers=workers, time_limit=1000, seeds=list(range(rows)))
    index, spec = np.arange(rows), envs.spec(name)
    pool.reset(index, list(range(rows)))
    actions = np.random.default_rng(0).uniform(-1, 1, (rows, spec.action_dim)).astype(np.float32)
    since = 0

    def run() -> None:
        nonlocal since
        for _ in range(HOST_STEPS):
            pool.step(index, actions)
        since += HOST_STEPS
        if since >= 900:
            pool.reset(index, list(range(rows)))
            since = 0

    return run, HOST_STEPS * rows, pool.close


def on_device(task: mjx.Task, rows: int) -> tuple[Callable[[], Any], int, float]:
    """The device engine's environments, their control steps in one run, and seconds to compile."""
    keys = jax.random.split(jax.random.PRNGKey(0), rows)

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

    return run, DEVICE_STEPS * rows, compiling


def measure(name: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Lines of envs.csv for one task."""
    task, lines = mjx.make(name), []
    for count in rows:
        runs = alone(name) if count == rows[0] else {}
        step, calls, close = host(name, count, FLAGS.workers)
        runs["host"] = step, calls
        step, calls, compiling = on_device(task, count)
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
                    "rows": 1 if engine in ("mj_step", "dm_control") else count,
                    "steps_per_second": f"{rate:.4g}",
                    "compile_seconds": f"{compiling:.3g}" if engine == "mjx" else "",
                }
            )
            extra = f"   compiling {compiling:.1f} s" if engine == "mjx" else ""
            count_text = f"{lines[-1]['rows']:>6} rows {rate:>12,.0f} steps/s"
            print(f"{name:<20}{engine:<12}{count_text}{extra}", flush=True)
    return lines


def main(argv: Sequence[str]) -> None:
    on_cpu = jax.local_devices()[0].platform == "cpu"
    try:
        rows = [int(r) for r in FLAGS.rows] or [1, 8, 64, 256, *([] if on_cpu else [1024, 4096])]
    except ValueError:
        raise UsageError(f"--rows={','.join(FLAGS.rows)}: whole numbers, as 1,64") from None
    common.start()
    lines = []
    for name in FLAGS.env:
        lines += measure(name, rows)
    out = Path(FLAGS.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "envs.csv", lines)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    common.run(main)
