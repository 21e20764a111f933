"""The functions of one row mapped over all rows and devices, and jitted."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import algorithm
from dynajax.agents import sac
from dynajax.config import Config, config_of
from dynajax.models import ensemble, rollouts
from dynajax.runtime.placement import BY_ROWS, EVERYWHERE, STATE, Placement, place
from dynajax.types import Array, EnvSpec, Metrics, Row, Shared, TrainState, Transition


class Functions(NamedTuple):
    """What happens to all rows of a device; transitions have leaves (S, ...)."""

    act: Callable[[TrainState, Any, Any], Array]  # obs (S, D), step -> (S, A)
    greedy: Callable[[TrainState, Any], Array]  # obs (S, K, D) -> (S, K, A)
    value: Callable[[TrainState, Any], Array]  # of the greedy action, obs (S, K, D) -> (S, K)
    insert: Callable[[TrainState, Transition, Any], TrainState]  # valid (S,)
    fit: Callable[[TrainState], tuple[TrainState, Metrics]]
    propose: Callable[[TrainState, Transition, Any], tuple[TrainState, Any]]
    learn: Callable[..., tuple[TrainState, Metrics]]  # see `algorithm.learn`
    reset_agent: Callable[[TrainState], TrainState]


def over_rows(config: Config, spec: EnvSpec) -> Functions:
    """Maps the functions of `mbpo` over the rows."""

    def act(state: TrainState, obs: Array, step: Array) -> Array:
        return jax.vmap(lambda row, o: algorithm.act(row, spec, o, step))(state.rows, obs)

    def greedy(state: TrainState, obs: Array) -> Array:
        def one(row: Row, o: Array) -> Array:
            return sac.greedy(row.config.sac, row.agent.actor, o, spec.action_dim)

        return jax.vmap(one)(state.rows, obs)

    def value(state: TrainState, obs: Array) -> Array:
        def one(row: Row, o: Array) -> Array:
            action = sac.greedy(row.config.sac, row.agent.actor, o, spec.action_dim)
            return sac.q_values(row.config.sac, row.agent.critic, o, action).mean(0)

        return jax.vmap(one)(state.rows, obs)

    def insert(state: TrainState, transition: Transition, valid: Array) -> TrainState:
        shared = state.shared
        rows = jax.vmap(lambda row, t, v: algorithm.insert(row, shared, t, v))(
            state.rows, transition, valid
        )
        return TrainState(shared._replace(step=shared.step + 1), rows)

    def fit(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, metrics = jax.vmap(algorithm.fit)(state.rows)
        return state._replace(rows=rows), metrics

    def propose(
        state: TrainState, transition: Transition, valid: Array
    ) -> tuple[TrainState, tuple[Array, Transition, Array]]:
        rows, made = jax.vmap(lambda row, t, v: algorithm.propose(row, state.shared, spec, t, v))(
            state.rows, transition, valid
        )
        return state._replace(rows=rows), made

    def learn(
        state: TrainState,
        transition: Transition,
        valid: Array,
        told: tuple[Transition, Array] | None = None,
    ) -> tuple[TrainState, Metrics]:
        shared = state.shared
        rows, metrics = jax.vmap(lambda row, t, v, o: algorithm.learn(row, shared, spec, t, v, o))(
            state.rows, transition, valid, told
        )
        blocks = rollouts.horizon(config, shared.step) if config.algo == "mbpo" else 0
        return TrainState(Shared(shared.step + 1, shared.blocks + blocks), rows), metrics

    def reset_agent(state: TrainState) -> TrainState:
        return state._replace(
            rows=jax.vmap(lambda row: algorithm.reset_agent(row, spec))(state.rows)
        )

    return Functions(act, greedy, value, insert, fit, propose, learn, reset_agent)


class HelpedFit(NamedTuple):
    """The fit of a lone row that shares its members with cores that would have nothing to do.

    They get what a fit reads, each trains its share, and the shares come back. None waits for
    another on the way, because XLA ends a process in which one waits for 40 seconds.
    """

    placement: Placement
    share: jax.stages.Wrapped
    conclude: jax.stages.Wrapped

    @classmethod
    def of(cls, placement: Placement) -> "HelpedFit":
        def share(rows: Row) -> Any:
            row = jax.tree.map(lambda x: x[0], rows)
            model = algorithm.fit_share(row, placement.over_members)
            return jax.tree_util.tree_map_with_path(
                lambda path, x: x if ensemble.of_members(path) else x[None], model
            )

        def conclude(state: TrainState, model: Any) -> tuple[TrainState, Metrics]:
            rows, metrics = jax.vmap(algorithm.conclude_fit)(state.rows, model)
            return state._replace(rows=rows), metrics

        return cls(
            placement,
            placement.with_helpers(share),
            placement.spread(conclude, (STATE, BY_ROWS), (STATE, BY_ROWS), donate_argnums=0),
        )

    @staticmethod
    def _read(state: TrainState) -> Row:
        rows: Row = state.rows
        return rows._replace(agent=cast(Any, None), synthetic=None)

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        """The program that all of them run."""
        return self.share.lower(self._read(state))

    def __call__(self, state: TrainState) -> tuple[TrainState, Metrics]:
        placement = self.placement
        found = placement.bring_back(self.share(placement.send(self._read(state))))
        members = state.rows.config.model.members
        # Behind the last member are copies of it; what members share came from everyone.
        model = jax.tree_util.tree_map_with_path(
            lambda path, x: x[None, :members] if ensemble.of_members(path) else x[:1], found
        )
        return self.conclude(state, model)


class Program(NamedTuple):
    """The same for all rows of this process, jitted: arguments have a row for each of its rows,
    and results a place for each (`Placement`). Those that return a state take theirs as a donation.
    """

    placement: Placement
    init: Callable[[], TrainState]
    act: jax.stages.Wrapped
    greedy: jax.stages.Wrapped
    value: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    fit: jax.stages.Wrapped | HelpedFit
    propose: jax.stages.Wrapped
    learn: jax.stages.Wrapped
    reset_agent: jax.stages.Wrapped

    def shapes(self) -> TrainState:
        """The state's shapes, which know the devices that they are on."""
        return self.placement.shapes(self.init, STATE)

    def lower(self, config: Config, spec: EnvSpec) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""
        state = jax.eval_shape(self.init)
        shapes = transition_shapes(self.placement.rows, spec)
        told: tuple[Any, ...] = ()
        if config.oracle != "none":
            _, (_, *made) = jax.eval_shape(self.propose, state, *shapes)
            told = (self.placement.real(tuple(made)),)
        learn = self.learn.lower(state, *shapes, *told)
        return [learn, self.fit.lower(state)] if config.algo == "mbpo" else [learn]


def transition_shapes(rows: int, spec: EnvSpec) -> tuple[Transition, Any]:
    """What the environments of S = `rows` give in a step: leaves (S, ...), and valid (S,)."""

    def real(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), np.float32)

    obs, scalar = real(spec.obs_dim), real()
    transition = Transition(obs, real(spec.action_dim), scalar, scalar, obs)
    return transition, jax.ShapeDtypeStruct((rows,), bool)


def build(config: Config, spec: EnvSpec, placement: Placement | None = None) -> Program:
    """Jits the functions of all rows, which are spread over all local devices by default."""
    placement = placement or place(config)
    own = placement.own
    configs = [config_of(config, config.variants[index]) for index, _ in placement.pairs]
    variants, seeds = zip(*placement.pairs, strict=True)

    # The seeds are arguments, so that all seeds share one compiled program in the cache.
    def init(*arguments: Any) -> TrainState:
        rows = jax.vmap(lambda c, v, s: algorithm.init(c, spec, v, s))(*own(arguments))
        return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), rows)

    functions = over_rows(config, spec)
    # What the environments give is small: every device gets all of it, and takes its own rows.
    given = EVERYWHERE
    told = () if config.oracle == "none" else (given,)
    donated = functools.partial(placement.spread, donate_argnums=0)
    fit: Any = donated(functions.fit, (STATE,), (STATE, BY_ROWS))
    if placement.helpers is not None:
        fit = HelpedFit.of(placement)
    return Program(
        placement=placement,
        init=functools.partial(
            placement.spread(init, (given, given, given), STATE, jax.jit),
            jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs),
            np.array(variants, np.int32),
            np.array(seeds, np.int32),
        ),
        act=placement.spread(
            lambda state, obs, step: functions.act(state, own(obs), step),
            (STATE, given, given),
            BY_ROWS,
        ),
        greedy=placement.spread(
            lambda state, obs: functions.greedy(state, own(obs)), (STATE, given), BY_ROWS
        ),
        value=placement.spread(
            lambda state, obs: functions.value(state, own(obs)), (STATE, given), BY_ROWS
        ),
        insert=donated(
            lambda state, *data: functions.insert(state, *own(data)), (STATE, given, given), STATE
        ),
        fit=fit,
        propose=donated(
            lambda state, *data: functions.propose(state, *own(data)),
            (STATE, given, given),
            (STATE, BY_ROWS),
        ),
        learn=donated(
            lambda state, *data: functions.learn(state, *own(data)),
            (STATE, given, given, *told),
            (STATE, BY_ROWS),
        ),
        reset_agent=donated(functions.reset_agent, (STATE,), STATE),
    )
