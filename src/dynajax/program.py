"""The functions of one row mapped over all rows, and jitted."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import compiler, mbpo, rollouts, sac
from dynajax.config import Config, config_of
from dynajax.types import Array, EnvSpec, Metrics, Row, Shared, TrainState, Transition


class Functions(NamedTuple):
    """What happens to all rows; transitions have leaves (S, ...)."""

    act: Callable[[TrainState, Any, Any], Array]  # obs (S, D), step -> (S, A)
    greedy: Callable[[TrainState, Any], Array]  # obs (S, K, D) -> (S, K, A)
    value: Callable[[TrainState, Any], Array]  # of the greedy action, obs (S, K, D) -> (S, K)
    insert: Callable[[TrainState, Transition, Any], TrainState]  # valid (S,)
    fit: Callable[[TrainState], tuple[TrainState, Metrics]]
    propose: Callable[[TrainState, Transition, Any], tuple[TrainState, Any]]
    learn: Callable[..., tuple[TrainState, Metrics]]  # see `mbpo.learn`
    reset_agent: Callable[[TrainState], TrainState]


def over_rows(config: Config, spec: EnvSpec) -> Functions:
    """Maps the functions of `mbpo` over the rows."""

    def act(state: TrainState, obs: Array, step: Array) -> Array:
        return jax.vmap(lambda row, o: mbpo.act(row, spec, o, step))(state.rows, obs)

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
        rows = jax.vmap(lambda row, t, v: mbpo.insert(row, shared, t, v))(
            state.rows, transition, valid
        )
        return TrainState(shared._replace(step=shared.step + 1), rows)

    def fit(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, metrics = jax.vmap(mbpo.fit)(state.rows)
        return state._replace(rows=rows), metrics

    def propose(
        state: TrainState, transition: Transition, valid: Array
    ) -> tuple[TrainState, tuple[Array, Transition, Array]]:
        rows, made = jax.vmap(lambda row, t, v: mbpo.propose(row, state.shared, spec, t, v))(
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
        rows, metrics = jax.vmap(lambda row, t, v, o: mbpo.learn(row, shared, spec, t, v, o))(
            state.rows, transition, valid, told
        )
        blocks = rollouts.horizon(config, shared.step) if config.algo == "mbpo" else 0
        return TrainState(Shared(shared.step + 1, shared.blocks + blocks), rows), metrics

    def reset_agent(state: TrainState) -> TrainState:
        return state._replace(rows=jax.vmap(lambda row: mbpo.reset_agent(row, spec))(state.rows))

    return Functions(act, greedy, value, insert, fit, propose, learn, reset_agent)


class Program(NamedTuple):
    """The same, jitted. Those that return a state take theirs as a donation."""

    init: Callable[[], TrainState]
    act: jax.stages.Wrapped
    greedy: jax.stages.Wrapped
    value: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    fit: jax.stages.Wrapped
    propose: jax.stages.Wrapped
    learn: jax.stages.Wrapped
    reset_agent: jax.stages.Wrapped

    def lower(self, config: Config, spec: EnvSpec) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""
        state = jax.eval_shape(self.init)
        shapes = transition_shapes(config, spec)
        told: tuple[Any, ...] = ()
        if config.oracle != "none":
            _, (_, *made) = jax.eval_shape(self.propose, state, *shapes)
            told = (tuple(made),)
        learn = self.learn.lower(state, *shapes, *told)
        return [learn, self.fit.lower(state)] if config.algo == "mbpo" else [learn]


def transition_shapes(config: Config, spec: EnvSpec) -> tuple[Transition, Any]:
    """What all rows' environments give in a step: leaves (S, ...), and valid (S,)."""

    def real(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.rows, *shape), np.float32)

    obs, scalar = real(spec.obs_dim), real()
    transition = Transition(obs, real(spec.action_dim), scalar, scalar, obs)
    return transition, jax.ShapeDtypeStruct((config.rows,), bool)


def build(config: Config, spec: EnvSpec) -> Program:
    """Jits the functions of all rows."""
    pairs = config.row_pairs
    configs = [config_of(config, config.variants[index]) for index, _ in pairs]
    variants, seeds = zip(*pairs, strict=True)

    # The seeds are arguments, so that all seeds share one compiled program in the cache.
    @jax.jit
    def init(configs: Config, variants: Array, seeds: Array) -> TrainState:
        rows = jax.vmap(lambda c, v, s: mbpo.init(c, spec, v, s))(configs, variants, seeds)
        return TrainState(Shared(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), rows)

    functions = over_rows(config, spec)
    donated = functools.partial(compiler.jit, donate_argnums=0)
    return Program(
        init=functools.partial(
            init,
            jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *configs),
            np.array(variants, np.int32),
            np.array(seeds, np.int32),
        ),
        act=compiler.jit(functions.act),
        greedy=compiler.jit(functions.greedy),
        value=compiler.jit(functions.value),
        insert=donated(functions.insert),
        fit=donated(functions.fit),
        propose=donated(functions.propose),
        learn=donated(functions.learn),
        reset_agent=donated(functions.reset_agent),
    )
