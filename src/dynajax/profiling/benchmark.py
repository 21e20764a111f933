"""Benchmark stages: the machine's matmuls, and each stage of training separately."""

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
from dynajax.envs.training_envs import all_finite
from dynajax.envs.vector import VectorEnv, default_workers
from dynajax.models import training
from dynajax.profiling import flops, hlo
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime.member_parallel import MemberParallelFit
from dynajax.runtime.program import Program, build
from dynajax.runtime.sharding import BY_LEARNERS, STATE
from dynajax.runtime.timers import Clock
from dynajax.synthetic.buffered import Buffered, horizon
from dynajax.types import Array, LearnerState, ReplayBuffer, TrainState, Transition
from dynajax.xla import backend

#: Size of the square matmuls from which the peak of a machine is measured.
SIDE = 256
#: Stages that make up an environment step: the first in full, the others weighted by `per_step`.
WHOLE_STEP = ("acting and learning", "fit step", "fit, fixed part")
# Number of different transitions with which the replay buffers are filled.
_NUM_FILLERS = 10_000
# Number of gradient steps, environment steps and evaluation steps in one timed run.
_FIT_STEPS, _ENV_STEPS, _EVAL_STEPS = 40, 3, 5
# Maximum number of environments that are created for timing evaluation.
_MAX_ENVS = 64
# Maximum seconds for which a stage is repeated before it is timed. NumPy's threads spin for 30 ms after
# a matmul and occupy a core of the next stage, and after an idle time everything is a fifth slower.
_WARM_UP = 0.05


class Stage(NamedTuple):
    """A stage to time."""

    run: Callable[[], Any]  # blocks until all of its work is done
    calls: int = 1  # calls of the stage in one `run`
    flops: int = 0  # of one call, over all learners
    per_step: float = 0.0  # calls in an environment step; 0 if another stage contains it


class ProgramProperties(NamedTuple):
    """Memory and kernels of a compiled program; memory is None where the platform gives none."""

    state_bytes: int | None  # of its arguments
    temporary_bytes: int | None
    donated: float | None  # fraction of the arguments' bytes that the results reuse
    kernels: int  # each counted once, however often a loop runs it
    ring_copies: int  # copies of arrays as large as a replay buffer


def program_properties(program: jax.stages.Compiled, capacities: set[int]) -> ProgramProperties:
    """Return the properties of a program whose state holds replay buffers of these capacities."""
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    sizes: tuple[Any, Any, Any] = (None, None, None)
    if memory is not None:
        arguments = memory.argument_size_in_bytes
        sizes = arguments, memory.temp_size_in_bytes, memory.alias_size_in_bytes / arguments
    return ProgramProperties(
        *sizes,
        sum(summary.kernels for summary in hlo.summarize(text).walk()),
        hlo.replay_copies(text, capacities),
    )


def interleave(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5
) -> dict[str, np.ndarray]:
    """Time functions alternately, so that drift of the machine affects all of them.

    Each function runs untimed just before it is timed, so that it never follows another function.
    The first two rounds compile and warm up, and are discarded.

    Args:
      runs: functions by name.
      seconds: time to spend.
      least: minimum number of rounds R.

    Returns:
      Seconds (R,) of each function.
    """
    warm_up = min(_WARM_UP, seconds / 10)

    def one_round() -> list[float]:
        times = []
        for run in runs.values():
            begin = time.perf_counter()
            run()
            while time.perf_counter() < begin + warm_up:
                run()
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return times

    one_round()
    begin = time.perf_counter()
    one_round()
    repeats = int(np.clip(seconds / (time.perf_counter() - begin), least, 100))
    rounds = np.array([one_round() for _ in range(repeats)])
    return dict(zip(runs, rounds.T, strict=True))


def numpy_matmul() -> Stage:
    """Return the stage of float32 matmuls of 256 x 256 matrices in NumPy."""
    a = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    out, count = np.empty_like(a), 5

    def run() -> None:
        for _ in range(count):
            np.matmul(a, a, out)

    return Stage(run, count, 2 * SIDE**3)


def jax_matmul(copies: int, batch: int, width: int, precision: str | None = None) -> Stage:
    """Return the stage of dependent matmuls of (copies, batch, width) and (copies, width, width).

    Args:
      copies, batch, width: the shapes.
      precision: "float32", "tensorfloat32" or "bfloat16"; None for the device's default.
    """
    weights = jnp.broadcast_to(jnp.eye(width), (copies, width, width))
    inputs = jnp.ones((copies, batch, width))
    # About 20 ms on a CPU, because they are timed along with every stage; accelerators are faster.
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
    """Return a stage for the largest matmul of each network, with all learners, per precision."""
    config, num_learners = program.config, program.placement.num_learners
    has_matrix_units = jax.local_devices()[0].platform != "cpu"
    precisions = ("float32", "tensorfloat32", "bfloat16") if has_matrix_units else ("float32",)
    stages = {}
    for name, network in program.algorithm.networks(program.learner_shapes()).items():
        kernels = [x.shape for x in jax.tree.leaves(network) if x.ndim > 1]
        if kernels:
            *copies, _, width = max(kernels, key=math.prod)
            batch = config.model.batch if name == "model" else config.learn.batch
            shape = math.prod(copies) * num_learners, batch, width
            for precision in precisions:
                label = f"matmul {name} {'x'.join(map(str, shape))} {precision}"
                stages[label] = jax_matmul(*shape, precision)
    return stages


def _filled(state: TrainState, config: Config) -> TrainState:
    """Return the state with full replay buffers."""
    key = jax.random.PRNGKey(0)

    def fill_array(array: Array) -> Array:
        size = min(_NUM_FILLERS, array.shape[1])
        block = jax.random.uniform(key, (size, *array.shape[2:]), minval=-1)
        copies = [-(-array.shape[1] // size)] + [1] * (array.ndim - 2)
        return jnp.broadcast_to(jnp.tile(block, copies)[: array.shape[1]], array.shape)

    def fill(buffer: ReplayBuffer) -> ReplayBuffer:
        data = dataclasses.replace(buffer, packed=fill_array(buffer.packed)).unpack()
        data = data._replace(discount=jnp.ones_like(data.discount))
        flags = jax.tree.map(jnp.ones_like, (buffer.valid, buffer.weight))
        return replay.of_transitions(data, *flags)

    learners: LearnerState = state.learners
    synthetic = learners.synthetic
    shared = state.shared._replace(
        step=jnp.asarray(config.replay.real, jnp.int32),
        blocks=jnp.asarray(config.replay.synthetic // config.rollout.batch, jnp.int32),
    )
    return TrainState(
        shared,
        learners._replace(
            real_buffer=fill(learners.real_buffer),
            synthetic=fill(synthetic) if isinstance(synthetic, ReplayBuffer) else None,
        ),
    )


class Workload:
    """The stages of a run, to be used in a `with` statement.

    Args:
      config: the configuration of the run.
    """

    def __init__(self, config: Config) -> None:
        episodes = max(1, min(config.eval.episodes, _MAX_ENVS // config.num_learners))
        self.config = assign(config, "eval.episodes", episodes)
        spec = envs.spec(config.env, **config.stepping)
        # One accelerator is timed, or all cores of a CPU.
        self._devices = jax.local_devices() if backend.target_is_cpu() else jax.local_devices()[:1]
        self.program = build(self.config, spec, self._devices)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workload":
        program = self.program
        fill = functools.partial(_filled, config=self.config)
        self._state: TrainState = self._jit(fill, donate_argnums=0)(program.init())
        engine = HostEngine(program, Clock())
        self._engine = self._stack.enter_context(contextlib.closing(engine))
        engine.start()
        self._actions = np.zeros((self.config.num_learners, program.spec.action_dim), np.float32)
        self._step()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        del self._state

    def _jit(self, function: Callable[..., Any], **arguments: Any) -> jax.stages.Wrapped:
        """Jit a function from state to state on all devices, compiled as the updates are."""
        return self.program.placement.jit_sharded(
            function, (STATE,), STATE, compiler_options=backend.options("learn"), **arguments
        )

    def _count(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Return the operations of all learners, without those of the padding."""
        placement = self.program.placement
        operations = flops.count(function, *arguments, trips=self._horizon)
        return operations * placement.num_learners // placement.padded_size

    @property
    def _horizon(self) -> int:
        """Return the rollout length when learning begins."""
        return int(horizon(self.config, jnp.asarray(self.config.random_steps)))

    def stages(self) -> dict[str, Stage]:
        """Return the stages by name; all of them update the same state."""
        config, program, state = self.config, self.program, self._state
        observed = (self._engine.obs, config.replay.real)
        learn = self._count(program.learn, state, *self._transition)
        act = self._count(program.act, state, *observed)
        stages = {
            "host step": Stage(self._step, per_step=1),
            "act": Stage(self._act, 1, act, 1),
            "insert": Stage(lambda: self._apply(program.insert, *self._transition)),
        }
        if config.has_model:
            # Rollouts that are generated on the fly are part of the updates.
            buffered = config.is_buffered
            rollout = {"rollout": self._rollout()} if buffered else {}
            stages |= {**rollout, **self._fit()}
        evaluation = program.spec.time_limit / config.eval.every
        return stages | {
            "agent update": self._update(),
            "learn": Stage(lambda: self._apply(program.learn, *self._transition), flops=learn),
            "acting and learning": Stage(self._environment_steps, _ENV_STEPS, act + learn),
            "evaluation step": Stage(self._evaluation(), _EVAL_STEPS, per_step=evaluation),
            "checkpoint": Stage(self._checkpoint(), per_step=1 / config.eval.every),
        }

    def _step(self) -> None:
        self._transition: tuple[Transition, np.ndarray] = self._engine.step(self._actions)

    def _act(self) -> None:
        actions = self.program.act(self._state, self._engine.obs, self.config.replay.real)
        self._actions = self.program.placement.unpad(np.asarray(actions))

    def _apply(self, function: Callable[..., Any], *arguments: Any) -> None:
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

        def update_learner(learner: LearnerState) -> LearnerState:
            agent = algorithm.agent(learner)

            def batches(array: Array) -> Array:
                return jnp.resize(array, (learn.utd, learn.batch, *array.shape[1:]))

            def update(state: Any, inputs: tuple[Transition, Any]) -> tuple[Any, None]:
                batch, noise = inputs
                return agent.update(state, batch, mask, mask, noise)[0], None

            mask = jnp.ones(learn.batch)
            minibatches = jax.tree.map(batches, learner.real_buffer.unpack())
            inputs = minibatches, agent.noise(learner.key, learn.utd)
            return learner._replace(agent=jax.lax.scan(update, learner.agent, inputs)[0])

        def update_all(state: TrainState) -> TrainState:
            return state._replace(learners=jax.vmap(update_learner)(state.learners))

        return self._state_stage(update_all, learn.utd)

    def _rollout(self) -> Stage:
        length, algorithm = self._horizon, self.program.algorithm
        batch = self.program.config.rollout.batch

        def roll_out(state: TrainState) -> TrainState:
            def one(learner: LearnerState) -> LearnerState:
                source, env = algorithm.source(learner), algorithm.model_env(learner)
                assert isinstance(source, Buffered)
                keys = source.split_keys(learner.key, learner.key)
                request = replay.Request(keys.starts, (batch,))
                count = state.shared.step + 1
                (slots,) = replay.sample_indices(learner.real_buffer, count, [request])
                return source.add_rollouts(learner, state.shared, env, slots, length, keys)[0]

            return state._replace(learners=jax.vmap(one)(state.learners))

        return self._state_stage(roll_out, length)

    def _state_stage(self, function: Callable[[TrainState], TrainState], calls: int) -> Stage:
        """Return a stage with `calls` calls in an environment step and in one run of `function`."""
        mapped = self._jit(function, donate_argnums=0)
        operations = self._count(mapped, self._state) // calls
        return Stage(lambda: self._apply(mapped), calls, operations, calls)

    def _fit(self) -> dict[str, Stage]:
        """Return the stages of a gradient step of all members, and of the rest of a fit."""
        program, model = self.program, self.config.model
        # If the run distributes the members over devices, the shorter fits do so too.
        distributed = isinstance(program.fit, MemberParallelFit)
        devices = self._devices if distributed else list(program.placement.mesh.devices)

        def of_length(steps: int) -> Program:
            config = assign(self.config, "model.schedule", "fixed")
            config = assign(config, "model.epochs", 0.0)
            return build(assign(config, "model.fit_steps", steps), program.spec, devices)

        def scheduled(state: TrainState, schedule: str, steps: int, epochs: float) -> TrainState:
            config = assign(state.learners.config, "model.schedule", schedule)
            config = assign(config, "model.fit_steps", steps)
            config = assign(config, "model.epochs", epochs)
            return state._replace(learners=state.learners._replace(config=config))

        one_step = of_length(1)

        def begin_and_end() -> None:
            state, _ = one_step.fit(scheduled(self._state, "fixed", 1, 0.0))
            state = scheduled(state, model.schedule, model.fit_steps, model.epochs)
            self._state = jax.block_until_ready(state)

        run, operations = self._steps(of_length(_FIT_STEPS))
        share = model.fit_steps / model.fit_every
        return {
            "fit step": Stage(run, _FIT_STEPS, operations // _FIT_STEPS, share),
            "fit, fixed part": Stage(begin_and_end, per_step=1 / model.fit_every),
        }

    def _steps(self, program: Program) -> tuple[Callable[[], Any], int]:
        """Return a function that runs only the gradient steps of a fit, and their operations."""
        algorithm, fit = program.algorithm, program.fit
        if isinstance(fit, MemberParallelFit):
            # Copies, because other stages donate the state.
            inputs = fit.training_arguments(self._state, fit.begin(self._state))
            sent, train = fit.members.send(jax.tree.map(jnp.copy, inputs)), fit.train
            operations = (
                flops.count(train, *sent) * fit.members.num_learners // fit.members.padded_size
            )
            return lambda: jax.block_until_ready(train(*sent)), operations

        def train_learner(learner: LearnerState, inputs: training.FitInputs) -> Any:
            dynamics, precision = algorithm.dynamics(learner), algorithm.config.precision
            return training.train_members(
                dynamics, inputs, learner.real_buffer, _FIT_STEPS, precision
            )

        def train_all(state: TrainState, inputs: training.FitInputs) -> Any:
            return jax.vmap(train_learner)(state.learners, inputs)

        jit = self.program.placement.jit_sharded
        begin = jit(jax.vmap(algorithm.begin_fit), (BY_LEARNERS,), BY_LEARNERS)
        all_inputs = begin(self._state.learners)
        mapped = jit(
            train_all, (STATE, BY_LEARNERS), BY_LEARNERS, compiler_options=backend.options("fit")
        )
        operations = self._count(mapped, self._state, all_inputs)
        return lambda: jax.block_until_ready(mapped(self._state, all_inputs)), operations

    def _evaluation(self) -> Callable[[], None]:
        config, program = self.config, self.program
        num_learners, episodes = config.num_learners, config.eval.episodes
        n = num_learners * episodes
        vector_env = VectorEnv(
            config.env,
            n,
            workers=default_workers(config, n),
            **config.stepping,
            seeds=list(range(n)),
        )
        self._stack.enter_context(contextlib.closing(vector_env))
        obs = vector_env.reset(np.arange(n), list(range(n)))

        def run() -> None:
            nonlocal obs
            for _ in range(_EVAL_STEPS):
                policy_obs = obs.reshape(num_learners, episodes, -1)
                actions = program.deterministic_action(self._state, policy_obs)
                actions = program.placement.unpad(np.asarray(actions))
                obs, _, terminated, truncated, _ = vector_env.step(
                    np.arange(n), actions.reshape(n, -1)
                )
                # A stage may take more steps than an episode has.
                ended = np.flatnonzero(terminated | truncated | ~all_finite(obs))
                if ended.size:
                    obs = obs.copy()  # JAX may still read the array
                    obs[ended] = vector_env.reset(ended, ended.tolist())

        return run

    def _checkpoint(self) -> Callable[[], None]:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints, steps = Checkpoints(Path(folder)), itertools.count(1)
        return lambda: checkpoints.save(next(steps), self._state, {}, {})

    def program_properties(self) -> dict[str, ProgramProperties]:
        """Return the properties of the large compiled programs by name."""
        capacities = {self.config.replay.real, self.config.replay.synthetic}
        programs = zip(("learn", "fit"), self.program.lower(), strict=False)
        return {
            name: program_properties(lowered.compile(), capacities) for name, lowered in programs
        }
