"""What `experiments/bench.py` times: the machine's matmuls, and each stage of training alone."""

import contextlib
import functools
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import algorithm, compiler, envs
from dynajax.agents import sac
from dynajax.config import Config, assign
from dynajax.envs.host import HostEnvs
from dynajax.envs.pool import EnvPool, default_workers
from dynajax.measure import flops
from dynajax.models import ensemble, rollouts
from dynajax.record.checkpoint import Checkpoints
from dynajax.runtime.placement import BY_ROWS, STATE, place
from dynajax.runtime.program import build
from dynajax.types import Array, EnvSpec, Replay, Row, TrainState, Transition

#: Side of the square matmuls that a machine's peak is taken from.
SIDE = 256
#: Stages that together are an environment step: the first whole, the others by `per_step`.
WHOLE_STEP = ("acting and learning", "fit step", "fit, fixed part")
# Transitions that the replays are filled with, over and over.
_FILLER = 10_000
# Gradient steps, environment steps and evaluation steps in one timed run.
_FIT_STEPS, _ENV_STEPS, _EVAL_STEPS = 40, 3, 5
# More environments than this are not made only to be timed.
_MOST_ENVS = 64
# Seconds for which a run is repeated before it is timed: NumPy's threads look for work for 30 ms
# after a matmul and take a core away from what comes next; after a pause all is slower by a fifth.
_LEAD = 0.05


class Stage(NamedTuple):
    """Something to time."""

    run: Callable[[], Any]  # returns once all of its work is done
    calls: int = 1  # of the stage in one `run`
    flops: int = 0  # of one call, over all rows
    per_step: float = 0.0  # calls in an environment step; 0 for what another stage contains


def interleave(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5
) -> dict[str, np.ndarray]:
    """Seconds of each run, taken in turn with all the others: (R,), R at least `least`.

    What is timed comes after itself, never after another run. The first two rounds compile and
    warm up, and are not counted.
    """

    def once() -> list[float]:
        times = []
        for run in runs.values():
            lead = time.perf_counter()
            while time.perf_counter() < lead + _LEAD:
                run()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return times

    once()
    begin = time.perf_counter()
    once()
    repeats = int(np.clip(seconds / (time.perf_counter() - begin), least, 100))
    rounds = np.array([once() for _ in range(repeats)])
    return dict(zip(runs, rounds.T, strict=True))


def numpy_matmul() -> Stage:
    """NumPy's 256-cubed float32 matmul, in a loop."""
    a = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    out, count = np.empty_like(a), 100

    def run() -> None:
        for _ in range(count):
            np.matmul(a, a, out)

    return Stage(run, count, 2 * SIDE**3)


def jax_matmul(copies: int, batch: int, width: int, precision: str | None = None) -> Stage:
    """(copies, batch, width) times (copies, width, width), each result the next one's input.

    Args:
      precision: "float32", "tensorfloat32" or "bfloat16"; None: the device's default.
    """
    weights = jnp.broadcast_to(jnp.eye(width), (copies, width, width))
    inputs = jnp.ones((copies, batch, width))
    count = max(2, min(400, int(2e10 / (copies * batch * width**2))))

    @compiler.jit
    def loop(x: Array, weights: Array) -> Array:
        with jax.default_matmul_precision(precision or "default"):
            return jax.lax.fori_loop(0, count, lambda _, x: x @ weights, x)

    return Stage(
        lambda: jax.block_until_ready(loop(inputs, weights)), count, 2 * copies * batch * width**2
    )


def matmuls(config: Config) -> dict[str, Stage]:
    """The matmuls of the hidden layers, of all rows at once, in every precision worth a try."""
    units = jax.local_devices()[0].platform != "cpu"
    precisions = ("float32", "tensorfloat32", "bfloat16") if units else ("float32",)
    shapes = {"critic": (2 * config.rows, config.sac.batch, config.sac.hidden[0])}
    if config.algo == "mbpo":
        model = config.model
        shapes["ensemble"] = (model.members * config.rows, model.batch, model.width)
    return {
        f"matmul {name} {'x'.join(map(str, shape))} {precision}": jax_matmul(*shape, precision)
        for name, shape in shapes.items()
        for precision in precisions
    }


def _filled(state: TrainState, config: Config) -> TrainState:
    """The state with every slot of its replays taken."""
    key = jax.random.PRNGKey(0)

    def fill(ring: Array) -> Array:
        size = min(_FILLER, ring.shape[1])
        block = jax.random.uniform(key, (size, *ring.shape[2:]), minval=-1)
        copies = [-(-ring.shape[1] // size)] + [1] * (ring.ndim - 2)
        return jnp.broadcast_to(jnp.tile(block, copies)[: ring.shape[1]], ring.shape)

    def full(replay: Replay) -> Replay:
        data = jax.tree.map(fill, replay.data)
        data = data._replace(discount=jnp.ones_like(data.discount))
        return Replay(data, jnp.ones_like(replay.valid))

    rows: Row = state.rows
    shared = state.shared._replace(
        step=jnp.asarray(config.replay.real, jnp.int32),
        blocks=jnp.asarray(config.replay.synthetic // config.rollout.batch, jnp.int32),
    )
    return TrainState(
        shared,
        rows._replace(real=full(rows.real), synthetic=rows.synthetic and full(rows.synthetic)),
    )


class Workload:
    """One task at one number of rows: its stages; use it in a `with` statement.

    Args:
      config: a run's configuration, with `config.rows` rows.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.spec: EnvSpec = envs.spec(config.env, time_limit=config.host.time_limit)
        # What is timed is one device, or a CPU's cores.
        devices = jax.local_devices() if compiler.small_caches() else jax.local_devices()[:1]
        self.program = build(config, self.spec, place(config, devices))
        self.placement = self.program.placement
        self.shapes = jax.eval_shape(self.program.init)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workload":
        config, rows = self.config, self.config.rows
        fill = self.placement.spread(
            functools.partial(_filled, config=config), (STATE,), STATE, donate_argnums=0
        )
        self._state = fill(self.program.init())
        self._env = self._stack.enter_context(
            contextlib.closing(HostEnvs(config, self.spec, list(range(rows))))
        )
        self._env.start()
        self._actions = np.zeros((rows, self.spec.action_dim), np.float32)
        self._pending = self._env.step(self._actions)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        del self._state

    def stages(self) -> dict[str, Stage]:
        """Every stage by name; one after the other, they go on with one state."""
        c, spec, rows = self.config, self.spec, self.config.rows
        found = {
            "host step": Stage(self._host_step, per_step=1),
            "act": Stage(self._act, 1, rows * flops.act(c, spec), 1),
            "insert": Stage(lambda: self._go_on(self.program.insert)),
        }
        if c.algo == "mbpo":
            horizon = int(rollouts.horizon(c, jnp.asarray(c.random_steps)))
            found["rollout"] = Stage(
                self._rollout(horizon), horizon, rows * flops.rollout(c, spec), horizon
            )
            found["fit step"] = Stage(
                self._fit_steps(),
                _FIT_STEPS,
                rows * flops.fit_step(c, spec),
                c.model.fit_steps / c.model.fit_every,
            )
            found["fit, fixed part"] = Stage(
                self._fit_of_one_step(), per_step=1 / c.model.fit_every
            )
        found |= {
            "SAC update": Stage(
                self._updates(), c.sac.utd, rows * flops.sac_update(c, spec), c.sac.utd
            ),
            "learn": Stage(lambda: self._go_on(self.program.learn), flops=self._flops_of_learn()),
            "acting and learning": Stage(
                self._environment_steps,
                _ENV_STEPS,
                rows * flops.act(c, spec) + self._flops_of_learn(),
            ),
            "evaluation step": Stage(
                self._evaluation(), _EVAL_STEPS, per_step=spec.time_limit / c.eval.every
            ),
            "checkpoint": Stage(self._checkpoint(), per_step=1 / c.eval.every),
        }
        return found

    def _flops_of_learn(self) -> int:
        c, spec = self.config, self.spec
        one = c.sac.utd * flops.sac_update(c, spec)
        if c.algo == "mbpo":
            one += int(rollouts.horizon(c, jnp.asarray(c.random_steps))) * flops.rollout(c, spec)
        return c.rows * one

    def _host_step(self) -> None:
        self._pending = self._env.step(self._actions)

    def _act(self) -> None:
        chosen = self.program.act(self._state, self._env.obs, 2**30)
        self._actions = np.asarray(self.placement.real(chosen))

    def _go_on(self, function: Callable[..., Any]) -> None:
        result = function(self._state, *self._pending)
        self._state = result if isinstance(result, TrainState) else result[0]
        jax.block_until_ready(self._state)

    def _environment_steps(self) -> None:
        # As in `train.train`.
        for t in range(_ENV_STEPS):
            chosen = self.program.act(self._state, self._env.obs, 2**30 + t)
            self._state, _ = self.program.learn(self._state, *self._pending)
            self._pending = self._env.step(np.asarray(self.placement.real(chosen)))
        jax.block_until_ready(self._state)

    def _updates(self) -> Callable[[], None]:
        c = self.config

        def first(ring: Array) -> Array:
            batches = ring[:, : c.sac.utd * c.sac.batch]
            return batches.reshape(-1, c.sac.utd, c.sac.batch, *ring.shape[2:])

        take = self.placement.spread(functools.partial(jax.tree.map, first), (BY_ROWS,), BY_ROWS)
        batch = take(self._state.rows.real.data)

        def one(row_config: Config, agent: Any, batches: Transition, key: Array) -> Any:
            def update(agent: Any, inputs: Any) -> Any:
                return sac.update(row_config.sac, agent, *inputs)

            noise = jax.random.normal(key, (c.sac.utd, 2, *batches.action.shape[1:]))
            return jax.lax.scan(update, agent, (batches, noise))[0]

        mapped = self.placement.spread(jax.vmap(one), (BY_ROWS,) * 4, BY_ROWS, donate_argnums=1)

        def run() -> None:
            rows = self._state.rows
            agent = jax.block_until_ready(mapped(rows.config, rows.agent, batch, rows.key))
            self._state = self._state._replace(rows=rows._replace(agent=agent))

        return run

    def _rollout(self, horizon: int) -> Callable[[], None]:
        def imagine(state: TrainState) -> TrainState:
            ring = jax.vmap(
                lambda row: algorithm.imagine(row, state.shared, self.spec, horizon, row.key)
            )(state.rows)
            return state._replace(rows=state.rows._replace(synthetic=ring))

        mapped = self.placement.spread(imagine, (STATE,), STATE, donate_argnums=0)

        def run() -> None:
            self._state = jax.block_until_ready(mapped(self._state))

        return run

    def _fit_steps(self) -> Callable[[], None]:
        def split(row: Row) -> ensemble.Split:
            return ensemble.split(row.config.model, row.real, row.seed_key)

        def one(row: Row, data: ensemble.Split) -> Any:
            assert row.model is not None
            return ensemble.train_steps(
                row.config.model,
                row.model,
                row.real,
                data,
                row.key,
                _FIT_STEPS,
                self.placement.over_members if helped else jax.lax.map,
            )

        spread, helped = self.placement.spread, self.placement.helpers is not None
        data = spread(jax.vmap(split), (BY_ROWS,), BY_ROWS)(self._state.rows)
        if helped:
            # Copies, because other stages give the state's own memory away.
            rows = self._state.rows._replace(agent=cast(Any, None), synthetic=None)
            sent = self.placement.send(jax.tree.map(lambda x: jnp.copy(x[0]), (rows, data)))
            share = self.placement.with_helpers(lambda given: one(*given).params["members"])
            return lambda: jax.block_until_ready(share(sent))
        mapped = spread(jax.vmap(one), (BY_ROWS, BY_ROWS), BY_ROWS)
        return lambda: jax.block_until_ready(mapped(self._state.rows, data))

    def _fit_of_one_step(self) -> Callable[[], None]:
        def scheduled(state: TrainState, schedule: str, steps: int) -> TrainState:
            config = assign(state.rows.config, "model.schedule", schedule)
            config = assign(config, "model.fit_steps", steps)
            return state._replace(rows=state.rows._replace(config=config))

        def run() -> None:
            state, _ = self.program.fit(scheduled(self._state, "fixed", 1))
            model = self.config.model
            self._state = jax.block_until_ready(scheduled(state, model.schedule, model.fit_steps))

        return run

    def _evaluation(self) -> Callable[[], None]:
        rows, episodes = self.config.rows, self.config.eval.episodes
        episodes = max(1, min(episodes, _MOST_ENVS // rows))
        n = rows * episodes
        pool = self._stack.enter_context(
            contextlib.closing(
                EnvPool(
                    self.config.env,
                    n,
                    workers=default_workers(self.config, n),
                    time_limit=self.config.host.time_limit,
                    seeds=list(range(n)),
                )
            )
        )
        obs = pool.reset(np.arange(n), list(range(n)))

        def run() -> None:
            nonlocal obs
            for _ in range(_EVAL_STEPS):
                chosen = self.program.greedy(self._state, obs.reshape(rows, episodes, -1))
                actions = np.asarray(self.placement.real(chosen))
                obs = pool.step(np.arange(n), actions.reshape(n, -1))[0]

        return run

    def _checkpoint(self) -> Callable[[], None]:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints = Checkpoints(Path(folder))
        saved = 0

        def run() -> None:
            nonlocal saved
            saved += 1
            checkpoints.save(saved, self._state, {}, {})

        return run

    def facts(self) -> dict[str, "Facts"]:
        """What the compiler says of the large programs."""
        slots = {self.config.replay.real, self.config.replay.synthetic}
        lowered = self.program.lower(self.config, self.spec)
        names = ("learn", "fit")
        return {n: _facts(p.compile(), slots) for n, p in zip(names, lowered, strict=False)}


class Facts(NamedTuple):
    """Of a compiled program."""

    state_bytes: int  # of its arguments
    temporary_bytes: int
    donated: float  # the share of the arguments' bytes whose memory the results take over
    kernels: int  # instructions that do work, each counted once however often a loop runs it
    ring_copies: int  # copies of arrays as large as a replay's observations


def _facts(program: jax.stages.Compiled, slots: set[int]) -> Facts:
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    fused = re.sub(r"(?ms)^%?fused_computation.*?^}", "", text)
    kernels = re.findall(r" (?:fusion|dot|custom-call|copy|sort|scatter|reduce)\(", fused)
    return Facts(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes / memory.argument_size_in_bytes,
        len(kernels),
        ring_copies(program, slots),
    )


def ring_copies(program: jax.stages.Compiled, slots: set[int]) -> int:
    """Copies of arrays (S, N, D) as large as a replay's observations, N being one of `slots`."""
    shapes = re.findall(r"= \w+\[((?:\d+,)*\d+)\]\S* copy\(", program.as_text() or "")
    return sum(len(s.split(",")) == 3 and int(s.split(",")[1]) in slots for s in shapes)
