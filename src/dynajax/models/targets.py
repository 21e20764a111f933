"""The fixes: what the ensemble is trained to predict, as an affine code that is data.

A transition's raw target is ``y = [s' - k s, r]``, and the network learns ``z = (y - m) / c``.
MBPO as published has k = 1, m = 0, c = 1. A fix is a rule for k, or for m and c, or the exponent
that weighs the loss; `FIXES` is the one place where they are listed.

Barkley and Fridovich-Keil (2025) for `scale` and `target`; Seitzer et al. (2022) for `beta`.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dynajax.types import Array, Params, TargetTransform, UsageError

#: A standard deviation under this is a constant channel's, and becomes 1.
CONSTANT = 1e-6

#: A scale is at least this share of the range that a target has shown.
RANGE_SHARE = 0.01

#: (observations (N, D), next observations (N, D), weights (N,)) -> k (D,)
SkipRule = Callable[[Array, Array, Array], Array]
#: (raw targets (N, D+1), weights (N,)) -> m (D+1,), c (D+1,)
AffineRule = Callable[[Array, Array], tuple[Array, Array]]


class Fix(NamedTuple):
    """What one name in `--fix` changes; at least one of the three rules."""

    summary: str
    skip: SkipRule | None = None
    affine: AffineRule | None = None
    exponent: float | None = None


def _sums(weights: Array, values: Array) -> Array:
    """Weighted sums (N,), (N, X) -> (X,), in float32 whatever products are made in by default.

    No product: at a lower precision one would turn what `auto` chooses, and every unit; and a TPU
    would first copy all values into a layout of its own, padded to 128 channels.
    """
    return (weights[:, None] * values).sum(0)


def _first(values: Array, weights: Array) -> Array:
    """The first value of those that weigh most (N, X), (N,) -> (X,), to the bit.

    As a sum, since for a look-up a TPU would copy all values too.
    """
    first = jnp.arange(weights.size) == weights.argmax()
    return jnp.where(first[:, None], values, 0.0).sum(0)


def moments(values: Array, weights: Array) -> tuple[Array, Array]:
    """Mean and standard deviation (N, X) -> (X,), (X,), each of the N with its weight (N,).

    A standard deviation under `CONSTANT` is given as 1. Sums are taken from the first value on,
    so that a channel far from zero keeps its digits and a constant one has no spread at all.
    """
    total = jnp.maximum(weights.sum(), 1.0)
    origin = _first(values, weights)
    mean = origin + _sums(weights, values - origin) / total
    std = jnp.sqrt(_sums(weights, jnp.square(values - mean)) / total)
    return mean, jnp.where(std < CONSTANT, 1.0, std)


def varies(values: Array, weights: Array) -> Array:
    """Which channels are not constant: (N, X), (N,) -> bool (X,)."""
    total = jnp.maximum(weights.sum(), 1.0)
    around = values - _first(values, weights)
    mean = _sums(weights, around) / total
    return _sums(weights, jnp.square(around - mean)) / total >= CONSTANT**2


def unit_variance(raw: Array, weights: Array) -> tuple[Array, Array]:
    """m and c of `scale`: (N, D+1), (N,) -> (D+1,), (D+1,).

    c is the standard deviation, or a hundredth of the range that was shown where that is larger, so
    that a few rare events do not fill the loss.
    """
    mean, std = moments(raw, weights)
    inside = weights[:, None] > 0
    low = jnp.where(inside, raw, jnp.inf).min(0)
    high = jnp.where(inside, raw, -jnp.inf).max(0)
    floor = jnp.where(varies(raw, weights), RANGE_SHARE * (high - low), 0.0)
    return mean, jnp.maximum(std, floor)


def _variance(values: Array, weights: Array) -> Array:
    total = jnp.maximum(weights.sum(), 1.0)
    mean = _sums(weights, values) / total
    return _sums(weights, jnp.square(values - mean)) / total


def _published(obs: Array, next_obs: Array, weights: Array) -> Array:
    return jnp.ones(obs.shape[-1])


def _direct(obs: Array, next_obs: Array, weights: Array) -> Array:
    return jnp.zeros(obs.shape[-1])


def _smaller_variance(obs: Array, next_obs: Array, weights: Array) -> Array:
    residual = _variance(next_obs - obs, weights)
    return jnp.where(residual < _variance(next_obs, weights), 1.0, 0.0)


def _identity(raw: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.zeros(raw.shape[-1]), jnp.ones(raw.shape[-1])


FIXES: dict[str, Fix] = {
    "scale": Fix("every target, the reward too, in unit variance", affine=unit_variance),
    "target": Fix("predict s' itself, not s' - s", skip=_direct),
    "auto": Fix("per channel, s' - s where that varies less than s'", skip=_smaller_variance),
    "beta": Fix("weigh the NLL by the predicted variance^0.5", exponent=0.5),
}


def parse_fixes(text: str) -> tuple[str, ...]:
    """The names in a comma list, in the order of `FIXES`; "" and "none" are no fix.

    Raises:
      UsageError: an unknown name, a name twice, or two that set the same rule.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        names = []
    for name in names:
        if name not in FIXES:
            near = difflib.get_close_matches(name, FIXES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--fix={text}: choose none, or from {', '.join(FIXES)}{hint}")
        if not isinstance(FIXES[name], Fix):
            raise UsageError(
                f"--fix={text}: {FIXES[name]!r} is registered as {name!r}; it must be a Fix"
            )
        if names.count(name) > 1:
            raise UsageError(f"--fix={text}: {name} is given twice")
    for rule in ("skip", "affine", "exponent"):
        setters = [name for name in names if getattr(FIXES[name], rule) is not None]
        if len(setters) > 1:
            raise UsageError(f"--fix={text}: {' and '.join(setters)} contradict each other")
    return tuple(name for name in FIXES if name in names)


def identity_transform(obs_dim: int) -> TargetTransform:
    """The code of MBPO as published, with D = `obs_dim`."""
    return TargetTransform(
        jnp.ones(obs_dim), jnp.zeros(obs_dim + 1), jnp.ones(obs_dim + 1), jnp.zeros(())
    )


def select_dims(code: TargetTransform, channels: slice) -> TargetTransform:
    """A code whose m and c are those of some of the D+1 channels."""
    return code._replace(shift=code.shift[channels], scale=code.scale[channels])


def raw_target(skip: Array, obs: Array, reward: Array, next_obs: Array) -> Array:
    """y = [s' - k s, r]: (..., D), (...), (..., D) -> (..., D+1)."""
    chex.assert_equal_shape([obs, next_obs])
    chex.assert_shape(reward, obs.shape[:-1])
    return jnp.concatenate([next_obs - skip * obs, reward[..., None]], -1)


def encode(code: TargetTransform, obs: Array, reward: Array, next_obs: Array) -> Array:
    """z = (y - m) / c: (..., D), (...), (..., D) -> (..., D+1)."""
    return (raw_target(code.skip, obs, reward, next_obs) - code.shift) / code.scale


def decode(code: TargetTransform, obs: Array, z: Array) -> tuple[Array, Array]:
    """The inverse of `encode`: (..., D), (..., D+1) -> next observation (..., D), reward (...)."""
    raw = z * code.scale + code.shift
    return code.skip * obs + raw[..., :-1], raw[..., -1]


def fit_transform(
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    old: TargetTransform,
    first: Array,
    obs: Array,
    reward: Array,
    next_obs: Array,
    weights: Array,
) -> TargetTransform:
    """The code of one row from its training split.

    Every variant's rules are evaluated and one result is taken, so that rows of different
    variants share a program.

    Args:
      variants: the fixes of every variant of the run (static).
      variant: () which of them this row is.
      old: the code so far; its k is kept in channels that have been fitted to before.
      first: (D,) bool, channels that have not.
      obs, reward, next_obs: (N, D), (N,), (N, D).
      weights: (N,) 1 for a transition of the training split, else 0.
    """
    codes = []
    for names in variants:
        fixes = [FIXES[name] for name in names]
        skip_rule = next((f.skip for f in fixes if f.skip), _published)
        affine_rule = next((f.affine for f in fixes if f.affine), _identity)
        exponent = next((f.exponent for f in fixes if f.exponent is not None), 0.0)
        skip = jnp.where(first, skip_rule(obs, next_obs, weights), old.skip)
        shift, scale = affine_rule(raw_target(skip, obs, reward, next_obs), weights)
        codes.append(TargetTransform(skip, shift, scale, jnp.asarray(exponent, jnp.float32)))
    if len(codes) == 1:  # so that a compiler sees whose raw targets are meant
        return codes[0]
    return TargetTransform(*(jnp.stack(leaves)[variant] for leaves in zip(*codes, strict=True)))


def rescale_head_params(head: Params, old: TargetTransform, new: TargetTransform) -> Params:
    """The output layer after a change of (m, c), such that decoded means stay the same.

    Log-variances move along, so decoded variances stay too where the clamp does not bend them. As
    PopArt does for values (van Hasselt et al., 2016).

    Args:
      head: "kernel" (..., X, 2(D+1)) and "bias" (..., 2(D+1)): means, then log-variances.
    """
    ratio = old.scale / new.scale
    means, log_variances = jnp.split(head["bias"], 2, -1)
    shift = (old.shift - new.shift) / new.scale
    return {
        "kernel": head["kernel"] * _twice(ratio, jnp.ones_like(ratio)),
        "bias": _twice(means * ratio + shift, log_variances + 2 * jnp.log(ratio)),
    }


def rescale_head_moments(
    moment: Params, old: TargetTransform, new: TargetTransform, power: int
) -> Params:
    """Adam's first (`power` 1) or second (2) moment of the output layer after a change of (m, c).

    A gradient of the means is c_new / c_old times what it was, for the loss has no unit.
    """
    ratio = jnp.power(new.scale / old.scale, power)
    return jax.tree.map(lambda x: x * _twice(ratio, jnp.ones_like(ratio)), moment)


def _twice(means: Array, log_variances: Array) -> Array:
    return jnp.concatenate([means, log_variances], -1)
