"""A fit of the ensemble to one learner's real transitions.

Chua et al. (2018) and Janner et al. (2019). A fit has three parts, `prepare`, `train_members` and
`finish`, so that members can be trained on other devices than the learner's own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dynajax.config import ModelConfig
from dynajax.models import evaluation, fit_data
from dynajax.models.base import DynamicsModel
from dynajax.models.ensemble import optimizer
from dynajax.models.fit_data import DataSplit
from dynajax.models.head_rescaling import rescale_heads
from dynajax.networks.dense import matmul_precision
from dynajax.replay import gather
from dynajax.types import DataStats, Metrics, ModelState, Params, ReplayBuffer
from dynajax.xla import backend
from dynajax.xla.in_turn import in_turn


class MemberState(NamedTuple):
    """What training changes: of one member, or of all with leaves (E, ...)."""

    params: Params
    opt_state: Any


class FitInputs(NamedTuple):
    """A fit that has begun: what its members are trained with."""

    stats: DataStats
    data: DataSplit
    members: MemberState  # leaves (E, ...)
    keys: Array  # of the members' minibatches, (E, 2)


def num_steps(config: ModelConfig, transitions: Array | int) -> Array | int:
    """Return the gradient steps of a fit to so many transitions; with early stopping, the limit.

    All learners have the same number, so a loop needs no learner's data to know when it ends.
    """
    if not config.epochs:
        return config.fit_steps
    passes = jnp.ceil(config.epochs * transitions / config.batch).astype(jnp.int32)
    return jnp.clip(passes, 1, config.fit_steps)


def train_member(
    dynamics: DynamicsModel,
    stats: DataStats,
    member: MemberState,
    key: Array,
    buffer: ReplayBuffer,
    data: DataSplit,
    steps: Array | int,
    precision: str = "float32",
) -> MemberState:
    """Train one member for `steps` gradient steps on its own minibatches of the training split.

    With `weight_averaging_steps` n > 1 the result is the mean of the parameters over these steps,
    which from step n on is an exponential moving average (Polyak and Juditsky, 1992): a larger
    learning rate goes further in a step, and the average removes its noise.

    Args:
      precision: of the network's matmuls, see `matmul_precision`.
    """
    config = dynamics.config
    averaging = config.weight_averaging_steps > 1

    def step(count: Array, carry: tuple[Params, Any, Params | None]) -> Any:
        params, opt_state, mean = carry
        drawn = jax.random.randint(
            jax.random.fold_in(key, count),
            (config.batch,),
            0,
            jnp.maximum(data.training_size, 1),
        )
        batch = gather(buffer, data.training[drawn]).unpack()
        with matmul_precision(precision):
            gradient = jax.grad(dynamics.loss)(params, stats, batch)
        updates, opt_state = optimizer(config).update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        if averaging:
            share = 1 / jnp.minimum(count, config.weight_averaging_steps)
            mean = jax.tree.map(lambda m, p: m + share * (p - m), mean, params)
        return params, opt_state, mean

    params, opt_state = member
    carry = (params, opt_state, params if averaging else None)
    params, opt_state, mean = jax.lax.fori_loop(1, steps + 1, step, carry)
    return MemberState(mean if averaging else params, opt_state)


def map_members(function: Callable[..., Any], *stacked: Any) -> Any:
    """Map a function over the members of leaves (E, ...).

    On a CPU one member takes all of its steps before the next one begins, so that its weights and
    moments stay in a core's cache; elsewhere all members take each step together.
    """
    if backend.lowering().fits_in_turn:
        return jax.lax.map(lambda one: function(*one), stacked)
    return jax.vmap(function)(*stacked)


def train_members(
    dynamics: DynamicsModel,
    inputs: FitInputs,
    buffer: ReplayBuffer,
    steps: Array | int,
    precision: str,
) -> MemberState:
    """Train all members; on a CPU those of one learner after those of another, see `map_members`."""

    def train(
        config: ModelConfig, inputs: FitInputs, buffer: ReplayBuffer, steps: Array | int
    ) -> MemberState:
        model = dataclasses.replace(dynamics, config=config)

        def one(params: Params, opt_state: Any, key: Array) -> MemberState:
            member = MemberState(params, opt_state)
            return train_member(
                model, inputs.stats, member, key, buffer, inputs.data, steps, precision
            )

        return map_members(one, *inputs.members, inputs.keys)

    if backend.lowering().fits_in_turn:
        train = in_turn(train)
    return train(dynamics.config, inputs, buffer, steps)


class _Search(NamedTuple):
    """The carry of an early-stopped fit; a vmapped loop would copy the buffer if it were in here."""

    params: Params
    opt_state: Any
    best: Params  # of each member
    best_error: Float[Array, " E"]
    stale: Int[Array, ""]  # rounds since any member improved
    steps: Int[Array, ""]
    key: Array


def _train_until_stale(
    dynamics: DynamicsModel,
    state: ModelState,
    buffer: ReplayBuffer,
    data: DataSplit,
    key: Array,
    limit: Array | int,
    precision: str,
) -> tuple[MemberState, Array]:
    """Train in rounds until no member's holdout error has improved for `patience` rounds.

    Each member's best weights are restored, as in the code of Janner et al. (2019). The initial
    weights are not candidates: on data of a new kind an overconfident model first gets worse, so
    every fit would restore its start and never learn the new data.
    """
    config = dynamics.config

    def improving(search: _Search) -> Bool[Array, ""]:
        return (search.stale < config.patience) & (search.steps < limit)

    def one_round(search: _Search) -> _Search:
        key, round_key = jax.random.split(search.key)
        members = MemberState(search.params, search.opt_state)
        keys = jax.random.split(round_key, config.members)
        inputs = FitInputs(state.stats, data, members, keys)
        trained = train_members(dynamics, inputs, buffer, config.round_steps, precision)
        current = state._replace(params=trained.params, opt_state=trained.opt_state)
        errors = evaluation.holdout_errors(dynamics, current, data)
        improved = errors < (1 - config.min_gain) * search.best_error

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(improved.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Search(
            params=trained.params,
            opt_state=trained.opt_state,
            best=jax.tree.map(keep, search.best, trained.params),
            best_error=jnp.where(improved, errors, search.best_error),
            stale=jnp.where(improved.any(), 0, search.stale + 1),
            steps=search.steps + config.round_steps,
            key=key,
        )

    initial = _Search(
        params=state.params,
        opt_state=state.opt_state,
        best=state.params,
        best_error=jnp.full(config.members, jnp.inf),
        stale=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        key=key,
    )
    final = jax.lax.while_loop(improving, one_round, initial)
    return MemberState(final.best, final.opt_state), final.steps


def prepare(
    dynamics: DynamicsModel,
    variants: Sequence[tuple[str, ...]],
    variant: Int[Array, ""],
    state: ModelState,
    buffer: ReplayBuffer,
    holdout_key: Array,
) -> tuple[ModelState, DataSplit]:
    """Return the model with the scales of the data, and the split of the data.

    A dimension that has been constant until now is fitted for the first time: its k is chosen, and
    its output weights are new. Arguments as for `fit`.
    """
    first_fit = state.num_fits == 0
    analysis = fit_data.analyze(
        dynamics.config, variants, variant, state.stats, state.num_fits, buffer, holdout_key
    )
    # Initial weights have no predictions that should stay: they are meant for z as it is.
    old = jax.tree.map(
        lambda new, old: jnp.where(first_fit, new, old),
        analysis.stats.transform,
        state.stats.transform,
    )
    key = jax.random.fold_in(holdout_key, state.num_fits)
    state = state._replace(stats=state.stats._replace(transform=old))
    new_dims = analysis.new_dims & ~first_fit
    state = rescale_heads(dynamics, state, analysis.stats.transform, new_dims, key)
    return state._replace(stats=analysis.stats, num_fits=state.num_fits + 1), analysis.data


def finish(
    dynamics: DynamicsModel, state: ModelState, data: DataSplit, steps: Array | int
) -> tuple[ModelState, Metrics]:
    """Return the trained model with its elites chosen, and the fit's metrics.

    Args:
      steps: gradient steps that the fit took.
    """
    state, metrics = evaluation.choose_elites(dynamics, state, data)
    return state, {"fit_steps": jnp.asarray(steps), **metrics}


def fit(
    dynamics: DynamicsModel,
    variants: Sequence[tuple[str, ...]],
    variant: Int[Array, ""],
    state: ModelState,
    buffer: ReplayBuffer,
    holdout_key: Array,
    key: Array,
    steps: Array | int,
    precision: str = "float32",
) -> tuple[ModelState, Metrics, DataSplit]:
    """Refit target transform, input normalization and members, and choose the elites.

    Args:
      variants: the fixes of every variant of the run (static); `variant` is this learner's.
      state: the model so far; training starts from its weights.
      buffer: the real transitions.
      holdout_key: the same at every fit.
      steps: see `num_steps`.
      precision: of the matmuls in gradient steps, never in evaluations and statistics.

    Returns:
      The model, metrics by name (scalars, and `r2_state_dims` (D,)), and the split of the data.
    """
    state, data = prepare(dynamics, variants, variant, state, buffer, holdout_key)
    if dynamics.config.schedule == "fixed":
        keys = jax.random.split(key, dynamics.config.members)
        members = MemberState(state.params, state.opt_state)
        inputs = FitInputs(state.stats, data, members, keys)
        members = train_members(dynamics, inputs, buffer, steps, precision)
    else:
        members, steps = _train_until_stale(dynamics, state, buffer, data, key, steps, precision)
    state = state._replace(params=members.params, opt_state=members.opt_state)
    return *finish(dynamics, state, data, steps), data
