"""The device engine: environments on the device, in programs of many steps with the learner.

The order is that of the host engine, and a test holds both to the same states. Environments are
pure functions (`envs.mjx`). No episode's start is computed inside a step: before each interval
between two evaluations as many initial states are made as its episodes can use, and an episode that
ends takes the next of them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import schedule
from dynajax.config import Config
from dynajax.envs import mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.terminations import never
from dynajax.runtime.program import Functions, Program, transition_shapes, vmap_learners
from dynajax.runtime.sharding import BY_ROWS, EVERYWHERE, STATE, put
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

# Steps that an episode of a task that can terminate lasts at least, on average over an interval; if
# episodes are shorter, initial states are used again.
_SHORT_EPISODE = 20
# Initial states to spare, for episodes that end where the physics is not finite.
_SPARE = 2


class EnvRunnerState(NamedTuple):
    """All of one row's environment that changes."""

    env: EnvState
    age: Array  # () int, steps of the running episode
    score: Array  # () its return so far
    ready: EnvState  # (P, ...) initial states
    made: Array  # () int, initial states made so far
    used: Array  # () int, and used
    pending: Transition  # the transition that is not learned from yet
    valid: Array  # () bool, of it
    ended: Array  # () int, episodes ended since the last evaluation
    ended_score: Array  # () the sum of their returns
    dropped: Array  # () int, transitions that were not finite


class TimedState(NamedTuple):
    """The worlds of all rows, leaves (S, ...), and the environment steps done."""

    step: Array  # () int
    worlds: EnvRunnerState


#: How the worlds lie on the devices.
_CLOCKED = TimedState(cast(Any, EVERYWHERE), cast(Any, BY_ROWS))


def _where(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the condition (...) holds, else `old`; leaves (..., more)."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(choose, new, old)


def _finite(obs: Array, reward: Array) -> Array:
    return jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)


def refill_pool(task: Task, world: EnvRunnerState, seed_key: Array) -> EnvRunnerState:
    """Makes initial states in place of those used since the last time; for one row."""
    size = jax.tree.leaves(world.ready)[0].shape[0]
    key = jax.random.fold_in(seed_key, EPISODES)
    # Episode e starts from a state that depends on the row's seed and e alone, in slot e mod P.
    slots = jnp.arange(size)
    episode = world.made + (slots - world.made) % size
    fresh = jax.vmap(lambda e: task.reset(jax.random.fold_in(key, e)))(episode)
    wanted = episode < world.used + size
    first = world.made == 0
    ready = _where(wanted, fresh, world.ready)
    begin = jax.tree.map(lambda x: x[0], ready)
    return world._replace(
        ready=ready,
        made=world.made + wanted.sum(),
        env=_where(first, begin, world.env),
        used=jnp.where(first, 1, world.used),
    )


def advance(task: Task, world: EnvRunnerState, action: Array) -> EnvRunnerState:
    """One environment step, and the next episode where one ends; for one row.

    A transition that is not finite is held as zeros and not valid, and ends its episode.
    """
    after, reward, terminated = task.step(world.env, action)
    valid = _finite(after.obs, reward)
    discount = 1.0 - terminated.astype(jnp.float32)
    whole = Transition(world.env.obs, action, reward, discount, after.obs)
    score = world.score + jnp.where(valid, reward, 0.0)
    age = world.age + 1
    over = terminated | ~valid | (age >= task.spec.time_limit)
    size = jax.tree.leaves(world.ready)[0].shape[0]
    fresh = jax.tree.map(lambda x: x[world.used % size], world.ready)
    return world._replace(
        env=_where(over, fresh, after),
        age=jnp.where(over, 0, age),
        score=jnp.where(over, 0.0, score),
        used=world.used + over,
        pending=jax.tree.map(lambda x: jnp.where(valid, x, jnp.zeros_like(x)), whole),
        valid=valid,
        ended=world.ended + over,
        ended_score=world.ended_score + jnp.where(over, score, 0.0),
        dropped=world.dropped + ~valid,
    )


def episodes(
    task: Task, act: Callable[[Array], Array], discount: Array, starts: EnvState
) -> Evaluation:
    """An episode from each of `starts` (S, K).

    Args:
      act: (S, K, D) -> (S, K, A).
      discount: (S,).
    """
    rows, count = starts.obs.shape[:2]

    # One vmap: under two MJX would be transformed twice, which takes seconds at every start.
    def by_one(env: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        flat = jax.tree.map(lambda x: x.reshape(rows * count, *x.shape[2:]), (env, action))
        return jax.tree.map(
            lambda x: x.reshape(rows, count, *x.shape[1:]), jax.vmap(task.step)(*flat)
        )

    def step(carry: Any, _: None) -> tuple[Any, None]:
        env, active, returns, discounted, lengths = carry
        after, reward, terminated = by_one(env, act(env.obs))
        good = active & _finite(after.obs, reward)
        env = _where(good, after, env)
        reward = jnp.where(good, reward, 0.0)
        discounted = discounted + discount[:, None] ** lengths * reward
        return (env, good & ~terminated, returns + reward, discounted, lengths + good), None

    active = jnp.isfinite(starts.obs).all(-1)
    zeros = jnp.zeros(active.shape)
    carry = (starts, active, zeros, zeros, jnp.zeros(active.shape, jnp.int32))
    carry, _ = jax.lax.scan(step, carry, length=task.spec.time_limit)
    _, _, returns, discounted, lengths = carry
    return Evaluation(returns, lengths, discounted=discounted)


def steps(
    config: Config,
    task: Task,
    functions: Functions,
    length: int,
    state: TrainState,
    clocked: TimedState,
) -> tuple[TrainState, TimedState, Metrics]:
    """`length` environment steps of all rows of a device; see `Engine.advance`."""
    step, worlds = clocked
    first = (worlds.pending, worlds.valid)
    metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(functions.learn, state, *first)[1])

    def one_step(carry: Any, _: None) -> tuple[Any, None]:
        state, step, worlds, metrics = carry
        pending, due = (worlds.pending, worlds.valid), schedule.due(config, step)
        action = functions.act(state, worlds.env.obs, step)
        state = _once_if(due.insert, lambda state: functions.insert(state, *pending), state)
        state, metrics = _once_if(
            due.learn, lambda carry: functions.learn(carry[0], *pending), (state, metrics)
        )
        worlds = jax.vmap(functools.partial(advance, task))(worlds, action)
        return (state, step + 1, worlds, metrics), None

    carry = (state, step, worlds, metrics)
    (state, step, worlds, metrics), _ = jax.lax.scan(one_step, carry, length=length)
    return state, TimedState(step, worlds), metrics


def _once_if(due: Array, change: Callable[[Any], Any], carry: Any) -> Any:
    """`change(carry)` if it is `due`, which is the same for all rows.

    A loop that runs once or never, because XLA hands a loop's carry on in place, while it copies
    what goes through a branch: the replays, at every step.
    """
    return jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, c: change(c), carry)


def evaluate(
    config: Config, task: Task, functions: Functions, state: TrainState, step: Array
) -> Evaluation:
    """Episodes of all rows of a device; see `Engine.evaluate`."""

    def starts(seed_key: Array) -> EnvState:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, EVALUATIONS), step)
        return jax.vmap(task.reset)(jax.random.split(key, config.eval.episodes))

    policy = functools.partial(functions.deterministic_action, state)
    begin = jax.vmap(starts)(state.learners.seed_key)
    evaluation = episodes(task, policy, state.learners.config.learn.discount, begin)
    return evaluation._replace(values=functions.value(state, begin.obs))


def restock(task: Task, seed_key: Array, clocked: TimedState) -> TimedState:
    """The worlds of all rows of a device, ready for an interval."""
    worlds = jax.vmap(functools.partial(refill_pool, task))(clocked.worlds, seed_key)
    zeros = jax.tree.map(jnp.zeros_like, (worlds.ended, worlds.ended_score))
    return TimedState(clocked.step, worlds._replace(ended=zeros[0], ended_score=zeros[1]))


class DeviceEngine:
    """Environments on the device, a segment of the schedule at a time.

    Raises:
      UsageError: the task cannot run there.
    """

    def __init__(self, program: Program, clock: Clock, task: Task | None = None) -> None:
        config, spec, placement = program.config, program.spec, program.placement
        task = task or mjx.make(config.env, repeat=config.task.repeat)
        self._config, self._program, self._clock = config, program, clock
        functions = vmap_learners(program.algorithm)
        # A task's tables and a configuration's numbers are constants of the programs.
        self._empty = placement.jit_sharded(
            functools.partial(_empty, config, spec, task, placement.learners_per_device),
            (),
            _CLOCKED,
            jax.jit,
        )
        self._restock = placement.jit_sharded(
            functools.partial(restock, task), (BY_ROWS, _CLOCKED), _CLOCKED, donate_argnums=1
        )
        self._steps = functools.cache(
            lambda length: placement.jit_sharded(
                functools.partial(steps, config, task, functions, length),
                (STATE, _CLOCKED),
                (STATE, _CLOCKED, BY_ROWS),
                donate_argnums=(0, 1),
            )
        )
        self._evaluate = placement.jit_sharded(
            functools.partial(evaluate, config, task, functions), (STATE, EVERYWHERE), BY_ROWS
        )
        self._clocked: TimedState | None = None
        self._stocked = False
        self._waiting: Any = None  # the segment before the one that was begun last
        self.dropped = np.zeros(placement.num_learners, np.int64)

    @property
    def _worlds(self) -> EnvRunnerState:
        assert self._clocked is not None
        return self._clocked.worlds

    def programs(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The large programs by name, each with its arguments' shapes."""
        program = self._program
        state = program.shapes()
        clocked = program.placement.shapes(_CLOCKED, jax.eval_shape(self._empty))
        programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
            f"steps of {length}": (self._steps(length), (state, clocked))
            for length in schedule.segments(self._config)
        }
        programs["evaluation"] = self._evaluate, (state, np.int32(0))
        if self._config.has_model:
            programs["fit"] = program.fit, (state,)
        return programs

    def lower(self) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""
        return [function.lower(*arguments) for function, arguments in self.programs().values()]

    def start(self) -> None:
        """Begins episode 0 of every row."""
        self._clocked, self._stocked = self._empty(), False

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """A segment; see `Engine`. It returns while the segment runs, and the one before is over,
        so that an interruption is heard soon.
        """
        length = schedule.until_due(self._config, step)
        with self._clock("update"):
            if not self._stocked:
                self._clocked = self._restock(state.learners.seed_key, self._clocked)
                self._stocked = True
            state, self._clocked, metrics = self._steps(length)(state, self._clocked)
            jax.block_until_ready(self._waiting)
        self._waiting = metrics
        learned = schedule.due(self._config, step + length - 1).learn
        return state, metrics if learned else {}, length

    def evaluate(self, state: TrainState, step: int) -> Evaluation:
        """See `Engine`."""
        evaluation = self._evaluate(state, np.int32(step))
        evaluation = self._program.placement.unpad(jax.device_get(evaluation))
        self._stocked = False
        self._read_dropped()
        return evaluation._replace(returns=evaluation.returns.astype(np.float64))

    def _read_dropped(self) -> None:
        self.dropped = self._program.placement.unpad(jax.device_get(self._worlds.dropped))

    def train_returns(self) -> np.ndarray:
        """See `Engine`; it is asked once an interval."""
        ended, score = self._program.placement.unpad(
            jax.device_get((self._worlds.ended, self._worlds.ended_score))
        )
        return np.where(ended > 0, score / np.maximum(ended, 1), np.nan)

    def progress(self) -> dict[str, np.ndarray]:
        """The worlds' arrays by their place."""
        assert self._clocked is not None
        self._read_dropped()
        clocked = self._clocked._replace(worlds=self._program.placement.unpad(self._worlds))
        leaves = jax.tree_util.tree_leaves_with_path(clocked)
        # Not every checkpoint format can hold an array without entries.
        arrays = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves if x.size}
        return {**arrays, "stocked": np.array([self._stocked])}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`."""
        empty = self._empty()
        saved = jax.tree_util.tree_map_with_path(
            lambda p, x: progress[jax.tree_util.keystr(p)] if x.size else np.asarray(x), empty
        )
        self._clocked = put(saved, empty)
        self._stocked = bool(progress["stocked"][0])
        self.dropped = saved.worlds.dropped

    def close(self) -> None:
        """Nothing is to be ended."""


def _empty(config: Config, spec: EnvSpec, task: Task, rows: int) -> TimedState:
    """Worlds whose first episode has not begun."""
    format_float = spec.time_limit if spec.termination is never else _SHORT_EPISODE
    size = -(-config.eval.every // format_float) + _SPARE
    env = jax.eval_shape(task.reset, jax.eval_shape(lambda: jax.random.PRNGKey(0)))

    def zeros(*shape: int) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((rows, *shape, *x.shape), x.dtype), env)

    pending, valid = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), transition_shapes(rows, spec)
    )
    count = jnp.zeros(rows, jnp.int32)
    worlds = EnvRunnerState(
        env=zeros(),
        age=count,
        score=jnp.zeros(rows),
        ready=zeros(size),
        made=count,
        used=count,
        pending=pending,
        valid=valid,
        ended=count,
        ended_score=jnp.zeros(rows),
        dropped=count,
    )
    return TimedState(jnp.zeros((), jnp.int32), worlds)
