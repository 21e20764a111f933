"""The device engine: all that happens between two logs, environments included, as one program.

The order is that of the host engine in `train.py`, and a test holds both to the same states.
Environments are pure functions (`envs.mjx`). No episode's start is computed inside a step: every
program begins with as many initial states as its episodes can use, and an episode that ends takes
the next of them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.config import Config
from dynajax.engines.evaluate import Evaluation
from dynajax.envs import mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.terminations import never
from dynajax.runtime.placement import BY_ROWS, EVERYWHERE, STATE, put
from dynajax.runtime.program import Functions, Program, over_rows, transition_shapes
from dynajax.types import Array, EnvSpec, Metrics, TrainState, Transition

if TYPE_CHECKING:
    from dynajax.record.journal import Journal

#: What is folded into a row's `seed_key`, beside what `mbpo` does.
_EPISODES, _EVALUATIONS = 2, 3
# Steps that an episode of a task that can terminate lasts at least, on average over a program; if
# episodes are shorter, initial states are used again.
_SHORT_EPISODE = 20
# Initial states to spare, for episodes that end where the physics is not finite.
_SPARE = 2


class World(NamedTuple):
    """All of one row's environment that changes."""

    env: EnvState
    age: Array  # () int, steps of the running episode
    score: Array  # () its return so far
    ready: EnvState  # (P, ...) initial states
    made: Array  # () int, initial states made so far
    used: Array  # () int, and used
    pending: Transition  # the transition that is not learned from yet
    valid: Array  # () bool, of it
    ended: Array  # () int, episodes ended since the last log
    ended_score: Array  # () the sum of their returns
    ended_steps: Array  # () int, and of their lengths
    dropped: Array  # () int, transitions that were not finite


class Clocked(NamedTuple):
    """The worlds of all rows, leaves (S, ...), and the environment steps done."""

    step: Array  # () int
    worlds: World


#: How the worlds lie on the devices.
_CLOCKED = Clocked(cast(Any, EVERYWHERE), cast(Any, BY_ROWS))


class Logs(NamedTuple):
    """What a program hands to Python."""

    learn: Metrics  # (S,) of the last environment step
    fits: Metrics | None  # (S, G) of the fits at the start of each of G segments
    evaluation: Evaluation  # its arrays still on the device


def _where(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the condition (...) holds, else `old`; leaves (..., more)."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(choose, new, old)


def _finite(obs: Array, reward: Array) -> Array:
    return jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)


def stock(task: Task, world: World, seed_key: Array) -> World:
    """Makes initial states in place of those used since the last time; for one row."""
    size = jax.tree.leaves(world.ready)[0].shape[0]
    key = jax.random.fold_in(seed_key, _EPISODES)
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


def advance(task: Task, world: World, action: Array) -> World:
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
        # The step that was dropped is no step of the episode, as on the host.
        ended_steps=world.ended_steps + jnp.where(over, age - ~valid, 0),
        dropped=world.dropped + ~valid,
    )


def evaluate(
    task: Task, act: Callable[[Array], Array], discount: Array, starts: EnvState
) -> Evaluation:
    """An episode from each of `starts` (S, K).

    Args:
      act: (S, K, D) -> (S, K, A).
      discount: (S,).
    """
    rows, episodes = starts.obs.shape[:2]

    # One vmap: under two MJX would be transformed twice, which takes seconds at every start.
    def by_one(env: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        flat = jax.tree.map(lambda x: x.reshape(rows * episodes, *x.shape[2:]), (env, action))
        return jax.tree.map(
            lambda x: x.reshape(rows, episodes, *x.shape[1:]), jax.vmap(task.step)(*flat)
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
    nothing = jnp.zeros(active.shape)
    carry = (starts, active, nothing, nothing, jnp.zeros(active.shape, jnp.int32))
    ended = jax.lax.scan(step, carry, length=task.spec.time_limit)[0]
    _, _, returns, discounted, lengths = ended
    return Evaluation(returns, lengths, discounted=discounted)


def _periods(config: Config) -> tuple[int, int]:
    """(segments, environment steps of each) of a program; what is due falls between segments."""
    every = [config.eval.every, config.sac.reset_every]
    if config.algo == "mbpo":
        every += [config.random_steps, config.model.fit_every]
    length = math.gcd(*every)
    return config.eval.every // length, length


def until_evaluated(
    config: Config, task: Task, functions: Functions, state: TrainState, clocked: Clocked
) -> tuple[TrainState, Clocked, Logs]:
    """`eval.every` environment steps of all rows of a device, and an evaluation."""
    # Jitted, so that what is used twice here is traced once.
    functions = Functions(*[jax.jit(function) for function in functions])
    segments, length = _periods(config)
    step, worlds = clocked
    worlds = jax.vmap(functools.partial(stock, task))(worlds, state.rows.seed_key)
    logged = (worlds.ended, worlds.ended_score, worlds.ended_steps)
    none = jax.tree.map(jnp.zeros_like, logged)
    worlds = worlds._replace(ended=none[0], ended_score=none[1], ended_steps=none[2])
    fit_metrics: Any = None
    if config.algo == "mbpo":
        fit_metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(functions.fit, state)[1])
    data = (worlds.pending, worlds.valid)
    learn_metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(functions.learn, state, *data)[1])

    def segment(carry: Any, _: None) -> tuple[Any, Any]:
        state, step, worlds, metrics = carry
        learning, fitted = step - config.random_steps, fit_metrics
        if config.sac.reset_every:
            due = (learning > 0) & (step % config.sac.reset_every == 0)
            state = _once_if(due, functions.reset_agent, state)
        if config.algo == "mbpo":
            due = (learning >= 0) & (learning % config.model.fit_every == 0)
            state, fitted = _once_if(due, lambda c: functions.fit(c[0]), (state, fitted))
        carry = jax.lax.scan(one_step, (state, step, worlds, metrics), length=length)[0]
        return carry, fitted

    def one_step(carry: Any, _: None) -> tuple[Any, None]:
        state, step, worlds, metrics = carry
        data = (worlds.pending, worlds.valid)
        action = functions.act(state, worlds.env.obs, step)
        learns = (step > 0) & (step >= config.random_steps)
        inserts = (step > 0) & ~learns
        state = _once_if(inserts, lambda state: functions.insert(state, *data), state)
        state, metrics = _once_if(learns, lambda c: functions.learn(c[0], *data), (state, metrics))
        worlds = jax.vmap(functools.partial(advance, task))(worlds, action)
        return (state, step + 1, worlds, metrics), None

    carry = (state, step, worlds, learn_metrics)
    (state, step, worlds, metrics), fits = jax.lax.scan(segment, carry, length=segments)

    def starts(seed_key: Array) -> EnvState:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, _EVALUATIONS), step)
        return jax.vmap(task.reset)(jax.random.split(key, config.eval.episodes))

    policy = functools.partial(functions.greedy, state)
    begin = jax.vmap(starts)(state.rows.seed_key)
    found = evaluate(task, policy, state.rows.config.sac.discount, begin)
    found = found._replace(values=functions.value(state, begin.obs))
    fits = jax.tree.map(jnp.transpose, fits)
    return state, Clocked(step, worlds), Logs(metrics, fits, found)


def _once_if(due: Array, change: Callable[[Any], Any], carry: Any) -> Any:
    """`change(carry)` if it is `due`, which is the same for all rows.

    A loop that runs once or never, because XLA hands a loop's carry on in place, while it copies
    what goes through a branch: the replays, at every step.
    """
    return jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, c: change(c), carry)


class DeviceEngine:
    """Environments on the device, in one program with the learner.

    Raises:
      UsageError: the task cannot run there.
    """

    def __init__(
        self, config: Config, spec: EnvSpec, program: Program, task: Task | None = None
    ) -> None:
        self._config, self._spec, self._program = config, spec, program
        task = task or mjx.make(config.env)
        self._placement = placement = program.placement
        self._empty = placement.spread(
            functools.partial(_empty, config, spec, task, placement.each), (), _CLOCKED, jax.jit
        )
        # A task's tables and a configuration's numbers are constants of the program.
        self._until_evaluated = placement.spread(
            functools.partial(until_evaluated, config, task, over_rows(config, spec)),
            (STATE, _CLOCKED),
            (STATE, _CLOCKED, BY_ROWS),
            donate_argnums=(0, 1),
        )
        self._finished: list[tuple[int, float, int]] = []
        self.dropped = np.zeros(placement.rows, np.int64)

    def lower(self) -> list[jax.stages.Lowered]:
        """The program, before it is compiled."""
        shapes = jax.eval_shape(self._program.init), jax.eval_shape(self._empty)
        return [self._until_evaluated.lower(*shapes)]

    def start(self) -> None:
        """Begins episode 0 of every row."""
        self._clocked = self._empty()

    def run(
        self, state: TrainState, step: int, journal: "Journal", interrupted: Callable[[], bool]
    ) -> tuple[TrainState, int, Evaluation | None]:
        """Trains until an evaluation is done, whatever happens meanwhile."""
        config = self._config
        with journal.clock("update"):
            state, self._clocked, logs = self._until_evaluated(state, self._clocked)
            logs = self._placement.real(jax.device_get(logs))
        until = step + config.eval.every
        learned = min(config.eval.every, until - max(1, config.random_steps))
        if learned > 0:
            journal.learned(logs.learn, learned)
        if logs.fits is not None:
            _, length = _periods(config)
            for index, t in enumerate(range(step, until, length)):
                learning = t - config.random_steps
                if learning >= 0 and learning % config.model.fit_every == 0:
                    journal.fitted(t, jax.tree.map(lambda x, i=index: x[:, i], logs.fits))
        journal.stepped(until, config.eval.every)
        self._read()
        returns = logs.evaluation.returns.astype(np.float64)
        return state, until, logs.evaluation._replace(returns=returns)

    def _read(self) -> None:
        """Takes what is to be logged out of the worlds."""
        worlds = self._clocked.worlds
        ended, score, steps, self.dropped = self._placement.real(
            jax.device_get((worlds.ended, worlds.ended_score, worlds.ended_steps, worlds.dropped))
        )
        for row in np.flatnonzero(ended):
            mean = float(score[row] / ended[row]), int(steps[row] / ended[row])
            self._finished.append((int(row), *mean))

    def pop_finished(self) -> list[tuple[int, float, int]]:
        """(row, mean return, mean length) of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def progress(self) -> dict[str, np.ndarray]:
        """The worlds' arrays by their place."""
        clocked = self._clocked._replace(worlds=self._placement.real(self._clocked.worlds))
        found = jax.tree_util.tree_leaves_with_path(clocked)
        # Not every checkpoint format can hold an array without entries.
        return {jax.tree_util.keystr(p): np.asarray(x) for p, x in found if x.size}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`."""
        empty = self._empty()
        saved = jax.tree_util.tree_map_with_path(
            lambda p, x: progress[jax.tree_util.keystr(p)] if x.size else np.asarray(x), empty
        )
        self._clocked = put(saved, empty)
        self.dropped = saved.worlds.dropped

    def close(self) -> None:
        """Nothing is to be ended."""


def _empty(config: Config, spec: EnvSpec, task: Task, rows: int) -> Clocked:
    """Worlds whose first episode has not begun."""
    if spec.termination is never:
        size = -(-config.eval.every // spec.time_limit) + _SPARE
    else:
        size = -(-config.eval.every // _SHORT_EPISODE) + _SPARE
    env = jax.eval_shape(task.reset, jax.eval_shape(lambda: jax.random.PRNGKey(0)))

    def zeros(*shape: int) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((rows, *shape, *x.shape), x.dtype), env)

    pending, valid = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), transition_shapes(rows, spec)
    )
    whole = jnp.zeros(rows, jnp.int32)
    real = jnp.zeros(rows)
    worlds = World(
        env=zeros(),
        age=whole,
        score=real,
        ready=zeros(size),
        made=whole,
        used=whole,
        pending=pending,
        valid=valid,
        ended=whole,
        ended_score=real,
        ended_steps=whole,
        dropped=whole,
    )
    return Clocked(jnp.zeros((), jnp.int32), worlds)
