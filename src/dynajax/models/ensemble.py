"""The probabilistic ensemble: its loss, its fit, its predictions. For one row.

Chua et al. (2018) and Janner et al. (2019); the weighted likelihood of Seitzer et al. (2022).
Everything is learned and scored on the code's z (`targets`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynajax import compiler, nets
from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.types import Array, Code, EnvSpec, Metrics, Model, Params, Replay, Transition

#: L2 decay of the first layer, the second, those between, and the last (Chua et al., 2018).
DECAY_FIRST, DECAY_SECOND, DECAY_MIDDLE, DECAY_LAST = 2.5e-5, 5e-5, 7.5e-5, 1e-4


def init(config: ModelConfig, spec: EnvSpec, key: Array) -> Model:
    """A new ensemble with the code of MBPO as published."""
    network = nets.member(config.width, config.depth, spec.obs_dim)
    inputs = spec.obs_dim + spec.action_dim
    params = {
        "members": nets.stacked_init(network, key, config.members, inputs),
        "log_variance_min": jnp.full(spec.obs_dim + 1, config.log_variance_min, jnp.float32),
        "log_variance_max": jnp.full(spec.obs_dim + 1, config.log_variance_max, jnp.float32),
    }
    return Model(
        params=params,
        optimiser=nets.adam_init(params),
        code=targets.identity_code(spec.obs_dim),
        input_mean=jnp.zeros(inputs),
        input_std=jnp.ones(inputs),
        elites=jnp.arange(config.elites),
        fits=jnp.zeros((), jnp.int32),
    )


def soft_clamp(raw: Array, low: Array, high: Array) -> Array:
    """`raw` bent softly under `high`, then over `low` (Chua et al., 2018, appendix A)."""
    raw = high - jax.nn.softplus(high - raw)
    return low + jax.nn.softplus(raw - low)


def distribution(config: ModelConfig, params: Params, inputs: Array) -> tuple[Array, Array]:
    """Mean and log-variance of z from every member, each on inputs of its own.

    Args:
      inputs: (E, ..., D+A), normalised.

    Returns:
      (E, ..., D+1) twice.
    """
    outputs = params["log_variance_min"].shape[0]
    network = nets.member(config.width, config.depth, outputs - 1)
    out = jax.vmap(functools.partial(nets.apply, network))(params["members"], inputs)
    mean, raw = jnp.split(out, 2, -1)
    low, high = params["log_variance_min"], params["log_variance_max"]
    if not config.learned_bounds:
        low, high = config.log_variance_min, config.log_variance_max
    return mean, soft_clamp(raw, low, high)


def nll(mean: Array, log_variance: Array, z: Array, exponent: Array) -> Array:
    """mean over all but E of w (e^-l (mu - z)^2 + l), w = stop_gradient(e^(exponent l)).

    (E, B, D+1) thrice -> (E,). With exponent 0 the weight is 1 to the bit.
    """
    weight = jnp.exp(exponent * jax.lax.stop_gradient(log_variance))
    terms = weight * (jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance)
    return terms.mean((-2, -1))


def decay(members: Params) -> Array:
    """sum over members and layers of lambda/2 |W|^2."""
    hidden = len(members) - 1
    rates = [DECAY_FIRST, DECAY_SECOND, *[DECAY_MIDDLE] * hidden][:hidden]
    layers = [members[f"hidden_{i}"] for i in range(hidden)] + [members["head"]]
    return sum(
        (
            0.5 * rate * jnp.square(layer["kernel"]).sum()
            for rate, layer in zip([*rates, DECAY_LAST], layers, strict=True)
        ),
        start=jnp.zeros(()),
    )


def loss(config: ModelConfig, params: Params, inputs: Array, z: Array, exponent: Array) -> Array:
    """What the ensemble minimises: the members' NLLs summed, decay, and learned bounds' price."""
    value = nll(*distribution(config, params, inputs), z, exponent).sum()
    value += config.weight_decay * decay(params["members"])
    if config.learned_bounds:
        spread = params["log_variance_max"].sum() - params["log_variance_min"].sum()
        value += config.bound_penalty * spread
    return value


def normalise(model: Model, obs: Array, action: Array) -> Array:
    """The network's inputs: (..., D), (..., A) -> (..., D+A)."""
    return (jnp.concatenate([obs, action], -1) - model.input_mean) / model.input_std


def predict(
    config: ModelConfig, model: Model, members: Array, obs: Array, action: Array
) -> tuple[Array, Array]:
    """Mean and log-variance of z by the named members, each on its own part.

    Args:
      members: (K,) which.
      obs, action: (K, B, D), (K, B, A).

    Returns:
      (K, B, D+1) twice.
    """
    chosen = {
        **model.params,
        "members": jax.tree.map(lambda p: p[members], model.params["members"]),
    }
    return distribution(config, chosen, normalise(model, obs, action))


class Split(NamedTuple):
    """A division of a replay that a fit uses."""

    training: Array  # (N,) slots of the training split first, then filler
    training_size: Array  # ()
    weights: Array  # (N,) 1 where a slot is in the training split
    scored: Transition  # leaves (B, ...) of the holdout, evenly spaced over it
    scored_weights: Array  # (B,) 0 for filler


def split(config: ModelConfig, replay: Replay, holdout_key: Array) -> Split:
    """Training and holdout transitions.

    Whether a slot is held out is a fixed function of the key and the slot, so a transition keeps
    its side for as long as it is stored, and a warm-started fit never sees the holdout.
    """
    (capacity,) = replay.valid.shape
    held_out = jax.random.bernoulli(holdout_key, config.holdout, (capacity,))
    training = replay.valid & ~held_out
    held = replay.valid & held_out
    (held_slots,) = jnp.nonzero(held, size=capacity, fill_value=0)
    n, scored = held.sum(), min(config.score_size, capacity)
    rank = jnp.arange(scored)
    # rank * n / scored in whole numbers, without overflow
    spaced = (n // scored) * rank + (n % scored) * rank // scored
    slots = held_slots[jnp.where(n <= scored, rank, spaced)]
    return Split(
        training=jnp.nonzero(training, size=capacity, fill_value=0)[0],
        training_size=training.sum(),
        weights=training.astype(jnp.float32),
        scored=jax.tree.map(lambda ring: ring[slots], replay.data),
        scored_weights=(rank < n).astype(jnp.float32),
    )


def _weighted_mean(values: Array, weights: Array, axis: int = 0) -> Array:
    shape = [1] * values.ndim
    shape[axis] = weights.shape[0]
    return (values * weights.reshape(shape)).sum(axis) / jnp.maximum(weights.sum(), 1.0)


def _with_everyone(model: Model, data: Transition, copies: int) -> tuple[Array, Array]:
    """The same inputs (E, B, D+A) for every member, and z (B, D+1)."""
    inputs = normalise(model, data.obs, data.action)
    z = targets.encode(model.code, data.obs, data.reward, data.next_obs)
    return jnp.broadcast_to(inputs, (copies, *inputs.shape)), z


def score(config: ModelConfig, model: Model, data: Split) -> Array:
    """The holdout's mean squared error in z, by member: (E,)."""
    inputs, z = _with_everyone(model, data.scored, config.members)
    mean, _ = distribution(config, model.params, inputs)
    return _weighted_mean(jnp.square(mean - z).mean(-1), data.scored_weights, 1)


#: Maps a function over the leading axis of a tree, as `jax.lax.map` does.
Map = Callable[[Callable[[Any], Any], Any], Any]


def _descend(
    config: ModelConfig, model: Model, replay: Replay, data: Split, keys: Array, steps: int
) -> tuple[Params, Any]:
    """The parameters and Adam's state of the model's K members after `steps` steps.

    Args:
      keys: (K,), every member draws its own minibatches from the training split.
    """
    averaging = config.average_steps > 1

    def slots(key: Array, count: Array) -> Array:
        key = jax.random.fold_in(key, count)
        drawn = jax.random.randint(key, (config.batch,), 0, jnp.maximum(data.training_size, 1))
        return data.training[drawn]

    def step(carry: tuple[Params, Any, Params | None], count: Array) -> Any:
        params, optimiser, mean = carry
        chosen = jax.vmap(slots, (0, None))(keys, count)
        batch = jax.tree.map(lambda ring: ring[chosen], replay.data)
        inputs = normalise(model, batch.obs, batch.action)
        z = targets.encode(model.code, batch.obs, batch.reward, batch.next_obs)
        gradient = jax.grad(loss, argnums=1)(config, params, inputs, z, model.code.exponent)
        params, optimiser = nets.adam_step(params, gradient, optimiser, config.learning_rate)
        if averaging:
            share = 1 / jnp.minimum(count, config.average_steps)
            mean = jax.tree.map(lambda m, p: m + share * (p - m), mean, params)
        return (params, optimiser, mean), None

    carry = (model.params, model.optimiser, model.params if averaging else None)
    (params, optimiser, mean), _ = jax.lax.scan(step, carry, jnp.arange(1, steps + 1))
    return (mean if averaging else params), optimiser


def of_members(path: Any) -> bool:
    """Whether a leaf of parameters, or of Adam's state, is the members' own: (E, ...)."""
    return any(getattr(entry, "key", None) == "members" for entry in path)


def train_steps(
    config: ModelConfig,
    model: Model,
    replay: Replay,
    data: Split,
    key: Array,
    steps: int,
    over_members: Map = jax.lax.map,
) -> Model:
    """`steps` gradient steps of every member.

    On a CPU one member takes all of its steps before the next one begins, for then its weights and
    moments stay in a core's cache (BUILD_NOTES.md, "Speed"); elsewhere all take each step together,
    as they have to where they learn common bounds.

    Args:
      over_members: maps a function over the members where one comes after the other. It may keep
        some of them only, as a device does that shares them with others (`program.HelpedFit`); the
        model then has these.

    With `average_steps` n > 1 the model gets the mean of the weights over these steps, which from
    the n-th on forgets as an exponential one does (Polyak and Juditsky, 1992): a larger learning
    rate goes farther in a step, and the mean takes its noise away.
    """
    keys = jax.random.split(key, config.members)
    state = (model.params, model.optimiser)
    if config.learned_bounds or not compiler.small_caches():
        params, optimiser = _descend(config, model, replay, data, keys, steps)
        return model._replace(params=params, optimiser=optimiser)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    own = [of_members(path) for path, _ in leaves]

    def one(given: tuple[list[Array], Array]) -> list[Array]:
        mine, key = given
        parts = iter(mine)
        whole = [
            next(parts)[None] if is_own else leaf
            for is_own, (_, leaf) in zip(own, leaves, strict=True)
        ]
        params, optimiser = jax.tree.unflatten(structure, whole)
        alone = model._replace(params=params, optimiser=optimiser)
        return jax.tree.leaves(_descend(config, alone, replay, data, key[None], steps))

    mine = [leaf for is_own, (_, leaf) in zip(own, leaves, strict=True) if is_own]
    after = over_members(one, (mine, keys))
    # What the members share has come out of each of them alike.
    whole = [leaf[:, 0] if is_own else leaf[0] for is_own, leaf in zip(own, after, strict=True)]
    params, optimiser = jax.tree.unflatten(structure, whole)
    return model._replace(params=params, optimiser=optimiser)


class _Search(NamedTuple):
    """What an early-stopped fit carries; never the replay, which a vmapped loop would copy."""

    params: Params
    optimiser: Any
    best: Params  # of each member
    best_score: Array  # (E,)
    stale: Array  # () rounds since any member gained
    steps: Array  # ()
    key: Array


def _train_until_stale(
    config: ModelConfig,
    model: Model,
    replay: Replay,
    data: Split,
    key: Array,
) -> tuple[Model, Array]:
    """Rounds of steps until `patience` of them pass in which no member's holdout score gained
    `min_gain`; each member's best weights are restored (Janner et al., 2019, appendix).

    The weights that the fit began with are no candidates. If they were, a fit to data of a new
    kind, which first has to unlearn its certainty, could end where it began, and so could every
    later one: the model would never see the new data (BUILD_NOTES.md, "Early stopping").
    """

    def going_on(search: _Search) -> Array:
        return (search.stale < config.patience) & (search.steps < config.fit_steps)

    def one_round(search: _Search) -> _Search:
        key, now = jax.random.split(search.key)
        trained = train_steps(
            config,
            model._replace(params=search.params, optimiser=search.optimiser),
            replay,
            data,
            now,
            config.round_steps,
        )
        scores = score(config, trained, data)
        gained = scores < (1 - config.min_gain) * search.best_score

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(gained.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Search(
            params=trained.params,
            optimiser=trained.optimiser,
            best=jax.tree.map(keep, search.best, trained.params["members"]),
            best_score=jnp.where(gained, scores, search.best_score),
            stale=jnp.where(gained.any(), 0, search.stale + 1),
            steps=search.steps + config.round_steps,
            key=key,
        )

    begin = _Search(
        params=model.params,
        optimiser=model.optimiser,
        best=model.params["members"],
        best_score=jnp.full(config.members, jnp.inf),
        stale=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        key=key,
    )
    end = jax.lax.while_loop(going_on, one_round, begin)
    params = {**end.params, "members": end.best}
    return model._replace(params=params, optimiser=end.optimiser), end.steps


def recode(model: Model, code: Code) -> Model:
    """The model under another code, its decoded predictions unchanged."""
    members = model.params["members"]
    head = targets.recode_head(members["head"], model.code, code)
    return model._replace(params={**model.params, "members": {**members, "head": head}}, code=code)


def prepare(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    model: Model,
    replay: Replay,
    holdout_key: Array,
) -> tuple[Model, Split]:
    """The model with code and input normalisation of the data, and the data's division (`fit`)."""
    data = split(config, replay, holdout_key)
    real = replay.data
    first = model.fits == 0
    code = targets.fit_code(
        variants,
        variant,
        model.code,
        first,
        real.obs,
        real.reward,
        real.next_obs,
        data.weights,
    )
    mean, std = targets.moments(jnp.concatenate([real.obs, real.action], -1), data.weights)
    # New weights predict nothing that should stay as it is; they are meant for z as they are.
    written = jax.tree.map(lambda new, old: jnp.where(first, new, old), code, model.code)
    model = recode(model._replace(code=written), code)
    return model._replace(input_mean=mean, input_std=std, fits=model.fits + 1), data


def conclude(config: ModelConfig, model: Model, data: Split, steps: Array) -> tuple[Model, Metrics]:
    """The trained model with its elites chosen, and the fit's scalars (`fit`)."""
    scores = score(config, model, data)
    model = model._replace(elites=jnp.argsort(scores)[: config.elites])
    return model, {
        "fit_steps": steps,
        "score": scores[model.elites].mean(),
        **_report(config, model, data),
    }


def fit(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    model: Model,
    replay: Replay,
    holdout_key: Array,
    key: Array,
) -> tuple[Model, Metrics]:
    """Refits code, input normalisation and members, warm-started, and chooses the elites.

    Args:
      variants: the fixes of every variant of the run (static); `variant` () is this row's.
      replay: the real transitions.
      holdout_key: the same at every fit.

    Returns:
      The model, and scalars by name (README, "What is logged").
    """
    model, data = prepare(config, variants, variant, model, replay, holdout_key)
    if config.schedule == "fixed":
        model = train_steps(config, model, replay, data, key, config.fit_steps)
        steps = jnp.asarray(config.fit_steps)
    else:
        model, steps = _train_until_stale(config, model, replay, data, key)
    return conclude(config, model, data, steps)


def _report(config: ModelConfig, model: Model, data: Split) -> Metrics:
    """How good the elites' mean prediction is on the holdout."""
    held, weights = data.scored, data.scored_weights
    inputs, z = _with_everyone(model, held, config.members)
    mean, log_variance = distribution(config, model.params, inputs)
    mean, log_variance = mean[model.elites], log_variance[model.elites]
    likelihood = jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance
    next_obs, reward = targets.decode(model.code, held.obs, mean.mean(0))
    # Where a truth lies in the mixture of the elites, which is what rollouts draw from.
    rank = jax.scipy.special.ndtr((z - mean) * jnp.exp(-0.5 * log_variance)).mean(0)
    inside = (jnp.abs(rank - 0.5) <= 0.4).astype(jnp.float32)
    noise = jnp.exp(log_variance).mean(0)

    def share(error: Array, values: Array) -> Array:
        variance = _weighted_mean(jnp.square(values - _weighted_mean(values, weights)), weights)
        mse = _weighted_mean(jnp.square(error), weights)
        return jnp.where(variance > targets.CONSTANT**2, 1 - mse / variance, jnp.nan)

    z_variance = _weighted_mean(jnp.square(z - _weighted_mean(z, weights)), weights)
    return {
        "nll": _weighted_mean(likelihood.mean((0, 2)), weights),
        "r2_state": jnp.nanmedian(share(next_obs - held.next_obs, held.next_obs - held.obs)),
        "r2_reward": share(reward - held.reward, held.reward),
        "scale_ratio": z_variance[:-1].sum() / z_variance[-1],
        "spread": jnp.sqrt(_weighted_mean(mean.var(0).mean(-1), weights)),
        "noise": jnp.sqrt(_weighted_mean(noise.mean(-1), weights)),
        "inside_80": _weighted_mean(inside.mean(-1), weights),
        "model_reward_mean": _weighted_mean(reward, weights),
        "real_reward_mean": _weighted_mean(held.reward, weights),
    }
