"""The fixes: what the model is trained to predict, as an affine transform that is data.

A transition's raw target is ``y = [s' - k s, r]``, and the model learns ``z = (y - m) / c``.
MBPO as published has k = 1, m = 0, c = 1. A fix is a rule for k, a rule for m and c, or the exponent
that weights the loss. `FIXES` lists them; `--fix=module:NAME` takes one of your own. All fixes of a
run are evaluated in one program.

Barkley and Fridovich-Keil (2025) for `scale` and `target`; Seitzer et al. (2022) for `beta`.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynajax import registry, user_code
from dynajax.networks.normalization import RESOLUTION, SMALLEST_STD
from dynajax.types import TargetTransform, UsageError

#: A scale is at least this share of the range that a target has shown.
RANGE_SHARE = 0.01

#: (observations (N, D), next observations (N, D), weights (N,)) -> k (D,)
SkipRule = Callable[[Array, Array, Array], Array]
#: (raw targets (N, Z), weights (N,)) -> m (Z,), c (Z,)
AffineRule = Callable[[Array, Array], tuple[Array, Array]]


class Fix(NamedTuple):
    """What one name in `--fix` changes; at least one of the three rules."""

    summary: str
    skip: SkipRule | None = None
    affine: AffineRule | None = None
    exponent: float | None = None


def _sums(weights: Float[Array, " N"], values: Float[Array, "N X"]) -> Float[Array, " X"]:
    """Return weighted sums in float32, whatever the default matmul precision is.

    A matmul of lower precision would change what `auto` chooses, and every scale; a TPU would first
    copy all values into a padded layout.
    """
    return (weights[:, None] * values).sum(0)


def _first(values: Float[Array, "N X"], weights: Float[Array, " N"]) -> Float[Array, " X"]:
    """Return the first value with the largest weight, to the bit.

    It is a sum, because for a look-up a TPU would copy all values too.
    """
    first = jnp.arange(weights.size) == weights.argmax()
    return jnp.where(first[:, None], values, 0.0).sum(0)


def _mean_and_std(
    values: Float[Array, "N X"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " X"], Float[Array, " X"]]:
    """Return weighted means and standard deviations.

    Sums start from the first value, so a dimension far from zero keeps its digits and a constant one
    has no deviation at all.
    """
    total = jnp.maximum(weights.sum(), 1.0)
    origin = _first(values, weights)
    mean = origin + _sums(weights, values - origin) / total
    return mean, jnp.sqrt(_sums(weights, jnp.square(values - mean)) / total)


def _rounding(mean: Float[Array, " X"], std: Float[Array, " X"]) -> Float[Array, " X"]:
    """Return the standard deviation that float32 rounding can give to values with these moments."""
    return jnp.maximum(RESOLUTION * jnp.hypot(mean, std), SMALLEST_STD)


def moments(
    values: Float[Array, "N X"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " X"], Float[Array, " X"]]:
    """Return weighted means and standard deviations; the deviation of a constant becomes 1."""
    mean, std = _mean_and_std(values, weights)
    return mean, jnp.where(std > _rounding(mean, std), std, 1.0)


def varies(
    values: Float[Array, "N X"],
    weights: Float[Array, " N"],
    parts: Float[Array, "N X"] | None = None,
) -> Bool[Array, " X"]:
    """Return which dimensions vary by more than rounding.

    Args:
      parts: the values that `values` are differences of, whose rounding they contain; by default
        `values` themselves.
    """
    _, std = _mean_and_std(values, weights)
    return std > _rounding(*_mean_and_std(values if parts is None else parts, weights))


def unit_variance(
    raw: Float[Array, "N Z"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " Z"], Float[Array, " Z"]]:
    """Return m and c of `scale`.

    c is the standard deviation, or a hundredth of the observed range if that is larger, so that a
    few rare events do not dominate the loss.
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


def _residual(obs: Array, next_obs: Array, weights: Array) -> Array:
    return jnp.ones(obs.shape[-1])


def _direct(obs: Array, next_obs: Array, weights: Array) -> Array:
    return jnp.zeros(obs.shape[-1])


def _smaller_variance(obs: Array, next_obs: Array, weights: Array) -> Array:
    residual = _variance(next_obs - obs, weights)
    return jnp.where(residual < _variance(next_obs, weights), 1.0, 0.0)


def _identity(raw: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.zeros(raw.shape[-1]), jnp.ones(raw.shape[-1])


FIXES: dict[str, Fix] = {
    "scale": Fix("scale every target, the reward too, to unit variance", affine=unit_variance),
    "target": Fix("predict s' itself instead of s' - s", skip=_direct),
    "auto": Fix("predict s' - s in the dimensions where it varies less", skip=_smaller_variance),
    "beta": Fix("weight the NLL by the predicted variance^0.5", exponent=0.5),
}


def lookup_fix(name: str) -> Fix:
    """Return the fix called `name`, or that the module of "module:NAME" defines or registers.

    Raises:
      UsageError: there is no such fix.
    """
    fix = registry.find("--fix", FIXES, name, lambda fix: isinstance(fix, Fix), "a Fix")
    if fix.skip is fix.affine is fix.exponent is None:
        raise UsageError(f"--fix={name}: the Fix changes nothing; give it skip, affine or exponent")
    if fix.exponent is not None and not isinstance(fix.exponent, int | float):
        shown = user_code.describe(fix.exponent)
        raise UsageError(f"--fix={name}: its exponent is {shown}; it must be a number")
    return fix


def parse_fixes(text: str) -> tuple[str, ...]:
    """Return the names in a comma list; "" and "none" are no fix.

    They come in the order of `FIXES`, then those with a module, by name.

    Raises:
      UsageError: an unknown name, a name twice, or two that set the same rule.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        names = []
    for name in names:
        if name not in FIXES and ":" not in name:
            near = difflib.get_close_matches(name, FIXES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(
                f"--fix={text}: choose none, or from {', '.join(FIXES)}, or module:NAME{hint}"
            )
        lookup_fix(name)
        if names.count(name) > 1:
            raise UsageError(f"--fix={text}: {name} is given twice")
    for rule in ("skip", "affine", "exponent"):
        setters = [name for name in names if getattr(lookup_fix(name), rule) is not None]
        if len(setters) > 1:
            raise UsageError(f"--fix={text}: {' and '.join(setters)} contradict each other")
    registered = tuple(name for name in FIXES if name in names)
    return registered + tuple(sorted(set(names) - set(registered)))


def identity_transform(obs_dim: int) -> TargetTransform:
    """Return the transform of MBPO as published, with D = `obs_dim`."""
    ones, zeros = jnp.ones(obs_dim + 1), jnp.zeros(obs_dim + 1)
    return TargetTransform(jnp.ones(obs_dim), zeros, ones, jnp.zeros(()))


def select_dims(transform: TargetTransform, dims: slice) -> TargetTransform:
    """Return a transform with m and c of some of the Z targets."""
    return transform._replace(shift=transform.shift[dims], scale=transform.scale[dims])


def raw_target(
    skip: Float[Array, " D"],
    obs: Float[Array, "*B D"],
    reward: Float[Array, "*B"],
    next_obs: Float[Array, "*B D"],
) -> Float[Array, "*B Z"]:
    """Return y = [s' - k s, r]."""
    chex.assert_equal_shape([obs, next_obs])
    chex.assert_shape(reward, obs.shape[:-1])
    return jnp.concatenate([next_obs - skip * obs, reward[..., None]], -1)


def resolved_target(
    skip: Float[Array, " D"],
    obs: Float[Array, "N D"],
    reward: Float[Array, " N"],
    next_obs: Float[Array, "N D"],
    weights: Float[Array, " N"],
) -> Float[Array, "N Z"]:
    """Return raw targets y in which a dimension that varies by no more than rounding is constant.

    The rounding of s' - k s is that of s', which is all that is left where s' - k s is constant.
    """
    raw = raw_target(skip, obs, reward, next_obs)
    mean, std = _mean_and_std(raw, weights)
    rounding = [_rounding(*_mean_and_std(x, weights)) for x in (next_obs, reward[:, None])]
    return jnp.where(std > jnp.concatenate(rounding), raw, mean)


def encode(
    transform: TargetTransform,
    obs: Float[Array, "*B D"],
    reward: Float[Array, "*B"],
    next_obs: Float[Array, "*B D"],
) -> Float[Array, "*B Z"]:
    """Return z = (y - m) / c."""
    return (raw_target(transform.skip, obs, reward, next_obs) - transform.shift) / transform.scale


def decode(
    transform: TargetTransform, obs: Float[Array, "*B D"], z: Float[Array, "*B Z"]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B"]]:
    """Return next observation and reward, the inverse of `encode`."""
    raw = z * transform.scale + transform.shift
    return transform.skip * obs + raw[..., :-1], raw[..., -1]


def fit_transform(
    variants: Sequence[tuple[str, ...]],
    variant: Int[Array, ""],
    old: TargetTransform,
    first: Bool[Array, " D"],
    obs: Float[Array, "N D"],
    reward: Float[Array, " N"],
    next_obs: Float[Array, "N D"],
    weights: Float[Array, " N"],
) -> TargetTransform:
    """Return the transform of one learner from its training split.

    The rules of every variant are evaluated and one result is selected, so learners of different
    variants share a program.

    Args:
      variants: the fixes of every variant of the run (static).
      variant: the index of this learner's variant.
      old: the transform so far; its k is kept in dimensions that have been fitted before.
      first: dimensions that have not been fitted before.
      obs, reward, next_obs: the real transitions.
      weights: 1 for a transition of the training split, else 0.
    """
    transforms = []
    for names in variants:
        fixes = [lookup_fix(name) for name in names]
        skip_rule = next((f.skip for f in fixes if f.skip), _residual)
        affine_rule = next((f.affine for f in fixes if f.affine), _identity)
        exponent = next((f.exponent for f in fixes if f.exponent is not None), 0.0)
        skip = jnp.where(first, skip_rule(obs, next_obs, weights), old.skip)
        shift, scale = affine_rule(resolved_target(skip, obs, reward, next_obs, weights), weights)
        transforms.append(TargetTransform(skip, shift, scale, jnp.asarray(exponent, jnp.float32)))
    # With a single variant skip the stack and index, so that XLA can fuse.
    if len(transforms) == 1:
        return transforms[0]
    stacked = (jnp.stack(leaves)[variant] for leaves in zip(*transforms, strict=True))
    return TargetTransform(*stacked)
