"""What `experiments/bench.py` times: the machine's matmuls, and each stage of training alone."""

import contextlib
import dataclasses
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import envs, replay
from dynajax.config import Config, assign
from dynajax.engines.host import HostEngine
from dynajax.envs.vector import VectorEnv, default_workers
from dynajax.models import training
from dynajax.profiling import compiled, flops
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime.member_parallel import MemberParallelFit
from dynajax.runtime.program import Program, build
from dynajax.runtime.sharding import BY_ROWS, STATE
from dynajax.runtime.timers import Clock
from dynajax.synthetic.buffered import Buffered, horizon
from dynajax.types import Array, LearnerState, ReplayBuffer, Shared, TrainState, Transition
from dynajax.xla import backend

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
# Seconds, at most, for which a run is repeated before it is timed: NumPy's threads look for work for 30 ms
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
    lead = min(_LEAD, seconds / 10)

    def once() -> list[float]:
        times = []
        for run in runs.values():
            begin = time.perf_counter()
            run()
            while time.perf_counter() < begin + lead:
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
    out, count = np.empty_like(a), 5

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
    # On a CPU 20 ms of them, for each other stage is timed beside them; elsewhere they are quicker.
    work = 1e9 if backend.target_is_cpu() else 2e10
    count = max(2, min(400, int(work / (copies * batch * width**2))))

    @backend.jit
    def loop(x: Array, weights: Array) -> Array:
        with jax.default_matmul_precision(precision or "default"):
            return jax.lax.fori_loop(0, count, lambda _, x: x @ weights, x)

    return Stage(
        lambda: jax.block_until_ready(loop(inputs, weights)), count, 2 * copies * batch * width**2
    )


def matmuls(program: Program) -> dict[str, Stage]:
    """The largest matmul of each network, of all rows at once, in every precision worth a try."""
    config, rows = program.config, program.placement.num_learners
    units = jax.local_devices()[0].platform != "cpu"
    precisions = ("float32", "tensorfloat32", "bfloat16") if units else ("float32",)
    stages = {}
    row = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], program.init().learners))
    for name, network in program.algorithm.networks(row).items():
        kernels = [x.shape for x in jax.tree.leaves(network) if x.ndim > 1]
        if kernels:
            *copies, _, width = max(kernels, key=math.prod)
            batch = config.model.batch if name == "model" else config.learn.batch
            shape = math.prod(copies) * rows, batch, width
            for precision in precisions:
                label = f"matmul {name} {'x'.join(map(str, shape))} {precision}"
                stages[label] = jax_matmul(*shape, precision)
    return stages


def _filled(state: TrainState, config: Config) -> TrainState:
    """The state with every slot of its replays taken."""
    key = jax.random.PRNGKey(0)

    def fill(ring: Array) -> Array:
        size = min(_FILLER, ring.shape[1])
        block = jax.random.uniform(key, (size, *ring.shape[2:]), minval=-1)
        copies = [-(-ring.shape[1] // size)] + [1] * (ring.ndim - 2)
        return jnp.broadcast_to(jnp.tile(block, copies)[: ring.shape[1]], ring.shape)

    def full(ring: ReplayBuffer) -> ReplayBuffer:
        data = dataclasses.replace(ring, packed=fill(ring.packed)).unpack()
        data = data._replace(discount=jnp.ones_like(data.discount))
        packed = replay.pack(data, *jax.tree.map(jnp.ones_like, (ring.valid, ring.weight)))
        return ReplayBuffer(**vars(packed))

    rows: LearnerState = state.learners
    shared = state.shared._replace(
        step=jnp.asarray(config.replay.real, jnp.int32),
        blocks=jnp.asarray(config.replay.synthetic // config.rollout.batch, jnp.int32),
    )
    return TrainState(
        shared,
        rows._replace(
            real_buffer=full(rows.real_buffer),
            synthetic=full(rows.synthetic) if isinstance(rows.synthetic, ReplayBuffer) else None,
        ),
    )


class Workload:
    """One task at one number of rows: its stages; use it in a `with` statement.

    Args:
      config: a run's configuration, with `config.rows` rows.
    """

    def __init__(self, config: Config) -> None:
        episodes = max(1, min(config.eval.episodes, _MOST_ENVS // config.num_learners))
        self.config = assign(config, "eval.episodes", episodes)
        spec = envs.spec(config.env, **config.stepping)
        # What is timed is one device, or a CPU's cores.
        self._devices = jax.local_devices() if backend.target_is_cpu() else jax.local_devices()[:1]
        self.program = build(self.config, spec, self._devices)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workload":
        program = self.program
        fill = functools.partial(_filled, config=self.config)
        self._state: TrainState = self._spread(fill, donate_argnums=0)(program.init())
        engine = HostEngine(program, Clock())
        self._engine = self._stack.enter_context(contextlib.closing(engine))
        engine.start()
        self._actions = np.zeros((self.config.num_learners, program.spec.action_dim), np.float32)
        self._step()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        del self._state

    def _spread(self, function: Callable[..., Any], **arguments: Any) -> jax.stages.Wrapped:
        """A function of the state, and what it gives: a state too."""
        return self.program.placement.jit_sharded(function, (STATE,), STATE, **arguments)

    def _count(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Operations for all rows, without those for copies that only fill a device."""
        placement = self.program.placement
        operations = flops.count(function, *arguments, trips=self._horizon)
        return operations * placement.num_learners // placement.padded_size

    @property
    def _horizon(self) -> int:
        """Steps of a rollout when learning begins."""
        return int(horizon(self.config, jnp.asarray(self.config.random_steps)))

    def stages(self) -> dict[str, Stage]:
        """Every stage by name; one after the other, they go on with one state."""
        config, program, state = self.config, self.program, self._state
        observed = (self._engine.obs, config.replay.real)
        learn = self._count(program.learn, state, *self._transition)
        act = self._count(program.act, state, *observed)
        stages = {
            "host step": Stage(self._step, per_step=1),
            "act": Stage(self._act, 1, act, 1),
            "insert": Stage(lambda: self._go_on(program.insert, *self._transition)),
        }
        if config.has_model:
            # Rollouts inside the updates are not timed separately.
            buffered = config.rollout.source == "buffered"
            rollout = {"rollout": self._rollout()} if buffered else {}
            stages |= {**rollout, **self._fit()}
        evaluation = program.spec.time_limit / config.eval.every
        return stages | {
            "agent update": self._update(),
            "learn": Stage(lambda: self._go_on(program.learn, *self._transition), flops=learn),
            "acting and learning": Stage(self._environment_steps, _ENV_STEPS, act + learn),
            "evaluation step": Stage(self._evaluation(), _EVAL_STEPS, per_step=evaluation),
            "checkpoint": Stage(self._checkpoint(), per_step=1 / config.eval.every),
        }

    def _step(self) -> None:
        self._transition: tuple[Transition, np.ndarray] = self._engine.step(self._actions)

    def _act(self) -> None:
        chosen = self.program.act(self._state, self._engine.obs, self.config.replay.real)
        self._actions = self.program.placement.unpad(np.asarray(chosen))

    def _go_on(self, function: Callable[..., Any], *arguments: Any) -> None:
        result = function(self._state, *arguments)
        self._state = result if isinstance(result, TrainState) else result[0]
        jax.block_until_ready(self._state)

    def _environment_steps(self) -> None:
        for step in range(_ENV_STEPS):
            step += self.config.replay.real
            self._state, _, _ = self._engine.advance(self._state, step)
        jax.block_until_ready(self._state)

    def _update(self) -> Stage:
        algorithm, learn = self.program.algorithm, self.config.learn

        def one(row: LearnerState) -> LearnerState:
            agent = algorithm.agent(row)

            def batches(ring: Array) -> Array:
                return jnp.resize(ring, (learn.utd, learn.batch, *ring.shape[1:]))

            def update(state: Any, inputs: tuple[Transition, Any]) -> tuple[Any, None]:
                batch, noise = inputs
                return agent.update(state, batch, None, None, noise)[0], None

            inputs = (
                jax.tree.map(batches, row.real_buffer.unpack()),
                agent.noise(row.key, learn.utd),
            )
            return row._replace(agent=jax.lax.scan(update, row.agent, inputs)[0])

        return self._of_state(
            lambda state: state._replace(learners=jax.vmap(one)(state.learners)), learn.utd
        )

    def _rollout(self) -> Stage:
        length, algorithm = self._horizon, self.program.algorithm
        batch = self.program.config.rollout.batch

        def roll_out(state: TrainState) -> TrainState:
            def one(row: LearnerState) -> LearnerState:
                source, env = algorithm.source(row), algorithm.model_env(row)
                assert isinstance(source, Buffered)
                keys = source.split_keys(row.key, row.key)
                request = replay.Request(keys.starts, (batch,))
                count = state.shared.step + 1
                (slots,) = replay.sample_indices(row.real_buffer, count, [request])
                return source.add_rollouts(row, state.shared, env, slots, length, keys)[0]

            return state._replace(learners=jax.vmap(one)(state.learners))

        return self._of_state(roll_out, length)

    def _of_state(self, function: Callable[[TrainState], TrainState], calls: int) -> Stage:
        """What is called `calls` times in an environment step, and in one run of `function`."""
        mapped = self._spread(function, donate_argnums=0)
        operations = self._count(mapped, self._state) // calls
        return Stage(lambda: self._go_on(mapped), calls, operations, calls)

    def _fit(self) -> dict[str, Stage]:
        """A gradient step of all members, and all of a fit but for its steps."""
        program, model = self.program, self.config.model
        # Where members lie on devices of their own, they do so in a shorter fit.
        shared = isinstance(program.fit, MemberParallelFit)
        devices = self._devices if shared else list(program.placement.mesh.devices)

        def of_length(steps: int) -> Program:
            config = assign(self.config, "model.schedule", "fixed")
            config = assign(config, "model.epochs", 0.0)
            return build(assign(config, "model.fit_steps", steps), program.spec, devices)

        def scheduled(state: TrainState, schedule: str, steps: int, epochs: float) -> TrainState:
            config = assign(state.learners.config, "model.schedule", schedule)
            config = assign(config, "model.fit_steps", steps)
            config = assign(config, "model.epochs", epochs)
            return state._replace(learners=state.learners._replace(config=config))

        shortest = of_length(1)

        def begin_and_end() -> None:
            state, _ = shortest.fit(scheduled(self._state, "fixed", 1, 0.0))
            state = scheduled(state, model.schedule, model.fit_steps, model.epochs)
            self._state = jax.block_until_ready(state)

        run, operations = self._steps(of_length(_FIT_STEPS))
        share = model.fit_steps / model.fit_every
        return {
            "fit step": Stage(run, _FIT_STEPS, operations // _FIT_STEPS, share),
            "fit, fixed part": Stage(begin_and_end, per_step=1 / model.fit_every),
        }

    def _steps(self, program: Program) -> tuple[Callable[[], Any], int]:
        """The gradient steps of a program's fit alone, and their operations."""
        algorithm, fit = program.algorithm, program.fit
        if isinstance(fit, MemberParallelFit):
            # Copies, because other stages donate the state's own memory.
            inputs = fit.training_arguments(self._state, fit.begin(self._state))
            sent, train = fit.members.send(jax.tree.map(jnp.copy, inputs)), fit.train
            operations = (
                flops.count(train, *sent) * fit.members.num_learners // fit.members.padded_size
            )
            return lambda: jax.block_until_ready(train(*sent)), operations

        def one(row: LearnerState, shared: Shared, inputs: training.FitInputs) -> Any:
            def train(params: Any, opt_state: Any, key: Array) -> Any:
                member = training.MemberState(params, opt_state)
                buffer = row.real_buffer
                return algorithm.train_member(row.config, shared, inputs, buffer, member, key)

            return training.map_members(train, *inputs.members, inputs.keys)

        spread = self.program.placement.jit_sharded
        jobs = spread(jax.vmap(algorithm.begin_fit), (BY_ROWS,), BY_ROWS)(self._state.learners)
        every = jax.vmap(one, (0, None, 0))
        mapped = spread(
            lambda state, jobs: every(state.learners, state.shared, jobs), (STATE, BY_ROWS), BY_ROWS
        )
        operations = self._count(mapped, self._state, jobs)
        return lambda: jax.block_until_ready(mapped(self._state, jobs)), operations

    def _evaluation(self) -> Callable[[], None]:
        config, program = self.config, self.program
        rows, episodes = config.num_learners, config.eval.episodes
        n = rows * episodes
        pool = VectorEnv(
            config.env,
            n,
            workers=default_workers(config, n),
            **config.stepping,
            seeds=list(range(n)),
        )
        self._stack.enter_context(contextlib.closing(pool))
        obs = pool.reset(np.arange(n), list(range(n)))

        def run() -> None:
            nonlocal obs
            for _ in range(_EVAL_STEPS):
                chosen = program.deterministic_action(self._state, obs.reshape(rows, episodes, -1))
                actions = program.placement.unpad(np.asarray(chosen))
                obs = pool.step(np.arange(n), actions.reshape(n, -1))[0]

        return run

    def _checkpoint(self) -> Callable[[], None]:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints, steps = Checkpoints(Path(folder)), itertools.count(1)
        return lambda: checkpoints.save(next(steps), self._state, {}, {})

    def facts(self) -> dict[str, compiled.Facts]:
        """What the compiler says of the large programs."""
        slots = {self.config.replay.real, self.config.replay.synthetic}
        programs = zip(("learn", "fit"), self.program.lower(), strict=False)
        return {name: compiled.facts(lowered.compile(), slots) for name, lowered in programs}
