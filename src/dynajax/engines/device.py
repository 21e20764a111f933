"""The device engine: simulation and learning in one jitted program per segment of the schedule.

Environments are pure functions (`envs.mjx`), so many agent steps and the learning between
them run in one program. The order of operations is that of the host engine; `tests/test_device.py`
checks that both reach the same states.

Initial states are not computed inside a step, because a reset can cost as much as many steps.
Before each interval between two evaluations a pool of initial states is filled, and an episode that
ends takes the next state of the pool.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import schedule
from dynajax.config import Config
from dynajax.envs import mjx
from dynajax.envs.checks import ValueRanges
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.mjx.repeating import frames_between
from dynajax.envs.terminations import never
from dynajax.runtime import signals
from dynajax.runtime.program import Functions, Jitted, Program, transition_shapes
from dynajax.runtime.sharding import BY_LEARNERS, EVERYWHERE, STATE, put, to_host
from dynajax.runtime.timers import Clock
from dynajax.types import (
    EPISODES,
    EVALUATIONS,
    Array,
    EnvSpec,
    Evaluation,
    Metrics,
    TrainState,
    Transition,
)
from dynajax.xla import backend
from dynajax.xla.branches import apply_if

# Expected length of episodes of a task that can terminate. If episodes are shorter on average over
# an interval, initial states are reused.
_MIN_EPISODE_LENGTH = 20
# Path of the counted frames in a `TimedState`; both engines call them "frames" in `progress`.
_NUM_FRAMES = ".runners.num_frames"
# Extra initial states, for episodes that end because the physics is not finite.
_SPARE_STATES = 2


class EnvRunnerState(NamedTuple):
    """Everything that changes in the environment of one learner; P is the size of the pool."""

    env: EnvState
    episode_step: Array  # () int, steps of the current episode
    episode_return: Array  # () return of the current episode so far
    initial_states: EnvState  # (P, ...) pool; episode e starts from slot e mod P
    num_created: Array  # () int, initial states computed since the run began
    num_used: Array  # () int, initial states used since the run began
    pending: Transition  # the last transition, which the learner has not received yet
    pending_valid: Array  # () bool, whether it is finite
    num_episodes: Array  # () int, episodes that ended since the last evaluation, all finite
    return_sum: Array  # () sum of their returns
    num_dropped: Array  # () int, transitions that were not finite since the run began
    num_frames: Array  # () int, simulator steps since the run began


class TimedState(NamedTuple):
    """The environments of all learners, and the number of agent steps done."""

    step: Array  # () int
    runners: EnvRunnerState  # leaves (S, ...)


#: How a `TimedState` is placed on the devices.
_TIMED = TimedState(cast(Any, EVERYWHERE), cast(Any, BY_LEARNERS))


def _select(condition: Array, new: Any, old: Any) -> Any:
    """Return `new` where the condition (...) holds, else `old`; leaves (..., more axes)."""

    def select(a: Array, b: Array) -> Array:
        trailing = (1,) * (a.ndim - condition.ndim)
        return jnp.where(condition.reshape(condition.shape + trailing), a, b)

    return jax.tree.map(select, new, old)


def _is_finite(obs: Array, reward: Array) -> Array:
    return jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)


def flat_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function over two leading axes, learners and episodes, with a single `vmap`.

    Under two nested vmaps MJX is transformed twice, which takes seconds at every start, and resets
    with contacts fail to compile on CUDA.
    """

    def mapped(*arguments: Any) -> Any:
        learners, episodes = jax.tree.leaves(arguments)[0].shape[:2]
        # Not reshape(-1, ...), which fails for arrays without entries.
        flat = jax.tree.map(lambda x: x.reshape(learners * episodes, *x.shape[2:]), arguments)
        results = jax.vmap(function)(*flat)
        return jax.tree.map(lambda x: x.reshape(learners, episodes, *x.shape[1:]), results)

    return mapped


def pool_size(runners: EnvRunnerState) -> int:
    """Return the number of initial states of each learner."""
    return jax.tree.leaves(runners.initial_states)[0].shape[runners.num_used.ndim]


def fill_pools(task: Task, runners: EnvRunnerState, seed_keys: Array) -> EnvRunnerState:
    """Replace the initial states that were used, and begin episode 0 if none has begun.

    Args:
      task: the environment.
      runners: leaves (S, ...).
      seed_keys: (S, ...), the learners' constant keys.
    """
    size = pool_size(runners)
    slots = jnp.arange(size)

    def slot_episodes(num_created: Array, seed_key: Array) -> tuple[Array, Array]:
        """Return the next episode that starts from each slot, and the key of its reset."""
        episode = num_created + (slots - num_created) % size
        # The state depends on nothing but the learner's seed and the number of the episode.
        key = jax.random.fold_in(seed_key, EPISODES)
        return episode, jax.vmap(lambda e: jax.random.fold_in(key, e))(episode)

    episode, keys = jax.vmap(slot_episodes)(runners.num_created, seed_keys)
    was_used = episode < runners.num_used[:, None] + size
    initial_states = _select(was_used, flat_vmap(task.reset)(keys), runners.initial_states)
    first_time = runners.num_created == 0
    first_state = jax.tree.map(lambda x: x[:, 0], initial_states)
    return runners._replace(
        initial_states=initial_states,
        num_created=runners.num_created + was_used.sum(1),
        env=_select(first_time, first_state, runners.env),
        num_used=jnp.where(first_time, 1, runners.num_used),
    )


def step_env(task: Task, runner: EnvRunnerState, action: Array) -> EnvRunnerState:
    """Do one agent step of one learner, and begin the next episode if one ends.

    A transition that is not finite is replaced by zeros, marked as invalid, and ends its episode.
    """
    env, reward, terminated = task.step(runner.env, action)
    valid = _is_finite(env.obs, reward)
    discount = 1.0 - terminated.astype(jnp.float32)
    transition = Transition(runner.env.obs, action, reward, discount, env.obs)
    episode_return = runner.episode_return + jnp.where(valid, reward, 0.0)
    episode_step = runner.episode_step + 1
    done = terminated | ~valid | (episode_step >= task.spec.time_limit)
    slot = runner.num_used % pool_size(runner)
    initial_state = jax.tree.map(lambda x: x[slot], runner.initial_states)
    return runner._replace(
        env=_select(done, initial_state, env),
        episode_step=jnp.where(done, 0, episode_step),
        episode_return=jnp.where(done, 0.0, episode_return),
        num_used=runner.num_used + done,
        pending=jax.tree.map(lambda x: jnp.where(valid, x, jnp.zeros_like(x)), transition),
        pending_valid=valid,
        num_episodes=runner.num_episodes + (done & valid),
        return_sum=runner.return_sum + jnp.where(done & valid, episode_return, 0.0),
        num_dropped=runner.num_dropped + ~valid,
        num_frames=runner.num_frames + frames_between(runner.env, env),
    )


def run_episodes(
    task: Task, policy: Callable[[Array], Array], discount: Array, initial_states: EnvState
) -> Evaluation:
    """Run one episode from each of the initial states (S, K).

    A transition that is not finite ends its episode, whose returns are NaN.

    Args:
      task: the environment.
      policy: (S, K, D) -> (S, K, A).
      discount: (S,).
      initial_states: leaves (S, K, ...).
    """
    step_all = flat_vmap(task.step)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        env, active, returns, discounted, lengths = carry
        next_env, reward, terminated = step_all(env, policy(env.obs))
        valid = active & _is_finite(next_env.obs, reward)
        env = _select(valid, next_env, env)
        reward = jnp.where(valid, reward, jnp.where(active, jnp.nan, 0.0))
        discounted = discounted + discount[:, None] ** lengths * reward
        return (env, valid & ~terminated, returns + reward, discounted, lengths + valid), None

    active = jnp.isfinite(initial_states.obs).all(-1)
    start = jnp.where(active, 0.0, jnp.nan)
    carry = (initial_states, active, start, start, jnp.zeros(active.shape, jnp.int32))
    carry, _ = jax.lax.scan(step, carry, length=task.spec.time_limit)
    _, _, returns, discounted, lengths = carry
    return Evaluation(returns, lengths, discounted=discounted)


def run_segment(
    config: Config,
    task: Task,
    functions: Functions,
    length: int,
    state: TrainState,
    timed: TimedState,
) -> tuple[TrainState, TimedState, Metrics]:
    """Do `length` agent steps of all learners of a device; see `Engine.advance`."""
    step, runners = timed
    pending = (runners.pending, runners.pending_valid)
    metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(functions.learn, state, *pending)[1])

    def one_step(carry: Any, _: None) -> tuple[Any, None]:
        state, step, runners, metrics = carry
        pending, due = (runners.pending, runners.pending_valid), schedule.due(config, step)
        action = functions.act(state, runners.env.obs, step)
        state = apply_if(due.insert, lambda state: functions.insert(state, *pending), state)
        state, metrics = apply_if(
            due.learn, lambda carry: functions.learn(carry[0], *pending), (state, metrics)
        )
        runners = jax.vmap(functools.partial(step_env, task))(runners, action)
        return (state, step + 1, runners, metrics), None

    carry = (state, step, runners, metrics)
    (state, step, runners, metrics), _ = jax.lax.scan(one_step, carry, length=length)
    return state, TimedState(step, runners), metrics


def evaluate(
    config: Config, task: Task, functions: Functions, state: TrainState, step: Array
) -> Evaluation:
    """Run the evaluation episodes of all learners of a device; see `Engine.evaluate`."""

    def episode_keys(seed_key: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, EVALUATIONS), step)
        return jax.random.split(key, config.eval.episodes)

    policy = functools.partial(functions.deterministic_action, state)
    initial_states = flat_vmap(task.reset)(jax.vmap(episode_keys)(state.learners.seed_key))
    discount = state.learners.config.learn.discount
    evaluation = run_episodes(task, policy, discount, initial_states)
    return evaluation._replace(values=functions.value(state, initial_states.obs))


def begin_interval(task: Task, seed_keys: Array, timed: TimedState) -> TimedState:
    """Fill the pools of all learners of a device, and forget the episodes that have ended."""
    runners = fill_pools(task, timed.runners, seed_keys)
    num_episodes, return_sum = jax.tree.map(
        jnp.zeros_like, (runners.num_episodes, runners.return_sum)
    )
    return TimedState(
        timed.step, runners._replace(num_episodes=num_episodes, return_sum=return_sum)
    )


def _empty_runners(config: Config, spec: EnvSpec, task: Task, num_learners: int) -> TimedState:
    """Return environments whose first episode has not begun."""
    length = spec.time_limit if spec.termination is never else _MIN_EPISODE_LENGTH
    size = -(-config.eval.every // length) + _SPARE_STATES
    env = jax.eval_shape(task.reset, jax.eval_shape(lambda: jax.random.PRNGKey(0)))

    def zeros(*shape: int) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((num_learners, *shape, *x.shape), x.dtype), env)

    pending, pending_valid = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), transition_shapes(num_learners, spec)
    )
    count = jnp.zeros(num_learners, jnp.int32)
    runners = EnvRunnerState(
        env=zeros(),
        episode_step=count,
        episode_return=jnp.zeros(num_learners),
        initial_states=zeros(size),
        num_created=count,
        num_used=count,
        pending=pending,
        pending_valid=pending_valid,
        num_episodes=count,
        return_sum=jnp.zeros(num_learners),
        num_dropped=count,
        num_frames=count,
    )
    return TimedState(jnp.zeros((), jnp.int32), runners)


class DevicePrograms:
    """The jitted programs of the device engine."""

    def __init__(self, jitted: Jitted, config: Config, task: Task) -> None:
        placement, spec = jitted.placement, jitted.algorithm.spec
        self.memory: int | None = None  # of the largest program, once it is known
        functions = Functions(jitted.algorithm)
        # The task's tables and the configuration's numbers become constants of the programs.
        self.empty = placement.jit_sharded(
            functools.partial(_empty_runners, config, spec, task, placement.learners_per_device),
            (),
            _TIMED,
        )
        self.begin_interval = placement.jit_sharded(
            functools.partial(begin_interval, task), (BY_LEARNERS, _TIMED), _TIMED, donate_argnums=1
        )
        self.segment = functools.cache(
            lambda length: placement.jit_sharded(
                functools.partial(run_segment, config, task, functions, length),
                (STATE, _TIMED),
                (STATE, _TIMED, BY_LEARNERS),
                donate_argnums=(0, 1),
            )
        )
        self.evaluate = placement.jit_sharded(
            functools.partial(evaluate, config, task, functions), (STATE, EVERYWHERE), BY_LEARNERS
        )


@functools.lru_cache(maxsize=4)
def _device_programs(jitted: Jitted, config: Config, registered: Any) -> DevicePrograms:
    """Return the programs of a configuration, the same ones for the same arguments.

    Args:
      registered: the task's entry in `mjx.TASKS`, which a notebook may register again.
    """
    return DevicePrograms(jitted, config, mjx.make(config.env, repeat=config.task.repeat))


class DeviceEngine:
    """Environments on the device, advanced by one segment of the schedule at a time.

    Raises:
      UsageError: the task cannot run on the device.
    """

    def __init__(self, program: Program, clock: Clock, task: Task | None = None) -> None:
        config, jitted = program.config, program.jitted
        self._config, self._program, self._clock = config, program, clock
        if task is None:
            key = dataclasses.replace(config, seed=0), mjx.TASKS.get(config.env)
            self._programs = _device_programs(jitted, *key)
        else:
            self._programs = DevicePrograms(jitted, config, task)
        self._timed: TimedState | None = None
        self.host_memory = 0  # the environments are part of the programs
        self._interval_begun = False
        self._previous_metrics: Any = None  # of the last segment; ready when the segment is over
        self.dropped = np.zeros(program.placement.num_learners, np.int64)
        self.frames = np.zeros(program.placement.num_learners, np.int64)

    @property
    def _runners(self) -> EnvRunnerState:
        assert self._timed is not None
        return self._timed.runners

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the large programs by name, each with the shapes of its arguments."""
        program = self._program
        state = program.shapes()
        timed = program.placement.shapes(_TIMED, jax.eval_shape(self._programs.empty))
        programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
            f"steps of {length}": (self._programs.segment(length), (state, timed))
            for length in schedule.segments(self._config)
        }
        programs["evaluation"] = self._programs.evaluate, (state, np.int32(0))
        if self._config.has_model:
            programs["fit"] = program.fit, (state,)
        return programs

    def memory(self) -> int:
        """Return the bytes that the largest program needs on each device; see `Engine`."""
        if self._programs.memory is None:
            programs = [f.lower(*arguments) for f, arguments in self.programs().values()]
            self._programs.memory = backend.memory(programs)
        return self._programs.memory

    def start(self) -> None:
        """Begin episode 0 of every learner."""
        self._timed, self._interval_begun = self._programs.empty(), False

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """Run a segment; see `Engine`.

        This returns while the segment runs, as soon as the previous one is over, so that an
        interruption takes effect after two segments at most.
        """
        length = schedule.segment_length(self._config, step)
        with self._clock("update"):
            if not self._interval_begun:
                self._timed = self._programs.begin_interval(state.learners.seed_key, self._timed)
                self._interval_begun = True
            state, self._timed, metrics = self._programs.segment(length)(state, self._timed)
            jax.block_until_ready(self._previous_metrics)
        self._previous_metrics = metrics
        learned = schedule.due(self._config, step + length - 1).learn
        return state, metrics if learned else {}, length

    def evaluate(
        self, state: TrainState, step: int, check: Callable[[], None] | None = None
    ) -> Evaluation:
        """Run evaluation episodes; see `Engine`."""
        evaluation = signals.wait(self._programs.evaluate(state, np.int32(step)), check)
        evaluation = self._program.placement.unpad(jax.device_get(evaluation))
        self._interval_begun = False
        self._read_counts()
        return evaluation._replace(returns=evaluation.returns.astype(np.float64))

    def _read_counts(self) -> None:
        self.dropped, self.frames = self._program.placement.unpad(
            jax.device_get((self._runners.num_dropped, self._runners.num_frames))
        )

    def value_ranges(self, state: TrainState) -> np.ndarray:
        """Return the ranges in D_env, whose observations were never float64; see `Engine`."""
        buffer, first = state.learners.real_buffer, slice(ValueRanges.MEASURED)
        packed, valid = self._program.placement.unpad(
            jax.device_get((buffer.packed[:, first], buffer.valid[:, first]))
        )
        data = dataclasses.replace(buffer, packed=packed.astype(np.float64), weight=None).unpack()
        rewards = data.reward[..., None]
        before, after = (np.concatenate([x, rewards], -1) for x in (data.obs, data.next_obs))
        ranges = [
            np.where(valid[..., None], after, np.inf).min(1),
            np.where(valid[..., None], after, -np.inf).max(1),
            np.where(valid[..., None], np.abs(after - before), 0).max(1),
        ]
        return np.stack(ranges, 1)

    def train_returns(self) -> np.ndarray:
        """Return the mean training returns of the interval; see `Engine`."""
        count, total = self._program.placement.unpad(
            jax.device_get((self._runners.num_episodes, self._runners.return_sum))
        )
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def progress(self) -> dict[str, np.ndarray]:
        """Return the arrays of the environments by their path in the tree; see `Engine`."""
        assert self._timed is not None
        self._read_counts()
        timed = self._timed._replace(runners=self._program.placement.unpad(self._runners))
        leaves = jax.tree_util.tree_leaves_with_path(timed)
        # Some checkpoint formats cannot hold an array without entries.
        arrays = {jax.tree_util.keystr(p): to_host(x) for p, x in leaves if x.size}
        arrays["frames"] = arrays.pop(_NUM_FRAMES)
        return {**arrays, "interval_begun": np.array([self._interval_begun])}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Restore what `progress` returned."""
        progress = {_NUM_FRAMES: progress["frames"], **progress}
        empty = self._programs.empty()
        saved = jax.tree_util.tree_map_with_path(
            lambda p, x: progress[jax.tree_util.keystr(p)] if x.size else to_host(x), empty
        )
        self._timed = put(saved, empty)
        self._interval_begun = bool(progress["interval_begun"][0])
        self.dropped, self.frames = saved.runners.num_dropped, saved.runners.num_frames

    def close(self) -> None:
        """Do nothing: this engine holds no processes or files."""
