"""Output layers follow the target transform, so that a refit starts from the same predictions."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from dynajax.models.base import DynamicsModel, OutputHead
from dynajax.models.targets import select_dims
from dynajax.types import ModelState, Params, TargetTransform

#: Dimensions whose scale changes by more than this factor between two fits get new weights:
#: rescaled weights would explode or vanish, and Adam's rescaled second moments would stop learning.
JUMP = 1e4


def rescale_head_params(head: Params, old: TargetTransform, new: TargetTransform) -> Params:
    """Return an output layer whose decoded means stay the same after a change of (m, c).

    Decoded variances stay too, where the clamp of the log-variance does not bend them. PopArt does
    the same for values (van Hasselt et al., 2016).

    Args:
      head: "kernel" (..., X, O) and "bias" (..., O); O outputs are the means of the dimensions of
        the transforms, followed by their log-variances if the model predicts them.
    """
    ratio = old.scale / new.scale
    has_variance = head["bias"].shape[-1] != ratio.shape[-1]
    if has_variance:
        means, log_variances = jnp.split(head["bias"], 2, -1)
    else:
        means = head["bias"]
    shift = (old.shift - new.shift) / new.scale
    kernel = head["kernel"] * _pad_ones(ratio, head["bias"])
    bias = means * ratio + shift
    if has_variance:
        bias = jnp.concatenate([bias, log_variances + 2 * jnp.log(ratio)], -1)
    return {"kernel": kernel, "bias": bias}


def _pad_ones(ratio: Float[Array, " X"], outputs: Float[Array, "*B O"]) -> Float[Array, " O"]:
    """Extend factors of the means by ones for the log-variances, if there are any."""
    if outputs.shape[-1] == ratio.shape[-1]:
        return ratio
    return jnp.concatenate([ratio, jnp.ones_like(ratio)], -1)


def rescale_head_moments(
    moment: Params, old: TargetTransform, new: TargetTransform, power: int
) -> Params:
    """Return Adam's first (`power` 1) or second (2) moment of an output layer after a change of c.

    The moments become those of the new gradients. With q = c_new / c_old, the gradient of a squared
    error of z is 1 / q times what it was. The negative log-likelihood has no unit: its gradient with
    respect to the means is q times what it was, that with respect to the log-variances stays. The
    weight of beta-NLL, sigma^(2 exponent), multiplies both by q^(-2 exponent).
    """
    ratio = new.scale / old.scale
    if moment["bias"].shape[-1] == ratio.shape[-1]:
        factors = jnp.power(1 / ratio, power)
    else:
        weight = jnp.power(ratio, -2 * power * new.exponent)
        factors = jnp.concatenate([jnp.power(ratio, power) * weight, weight], -1)
    return jax.tree.map(lambda x: x * factors, moment)


def rescale_heads(
    dynamics: DynamicsModel,
    state: ModelState,
    transform: TargetTransform,
    new_dims: Bool[Array, " Z"],
    key: Array,
) -> ModelState:
    """Return the model under another target transform.

    Its mean predictions stay the same, to rounding, and Adam's moments are rescaled with them. In
    `new_dims`, and where the scale changes by more than `JUMP`, nothing is kept: these dimensions
    get new weights and no moments.
    """
    first, second = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
    params = state.params
    for index, head in enumerate(dynamics.output_heads()):
        old, new = (select_dims(t, head.dims) for t in (state.stats.transform, transform))
        layer = head.get(params)
        copies = layer["bias"].shape[-1] // new.scale.shape[-1]
        jumped = jnp.maximum(new.scale / old.scale, old.scale / new.scale) > JUMP
        columns = jnp.tile(new_dims[head.dims] | jumped, copies)
        keys = jax.random.split(
            jax.random.fold_in(key, index) if index else key, layer["kernel"].shape[0]
        )
        initial = {
            "kernel": jax.vmap(lambda k, s=layer["kernel"].shape[1:], i=head.init: i(k, s))(keys),
            "bias": jnp.zeros_like(layer["bias"]),
        }
        params = _with_columns(params, head, columns, rescale_head_params(layer, old, new), initial)
        zeros = jax.tree.map(jnp.zeros_like, layer)
        first, second = (
            _with_columns(
                moment,
                head,
                columns,
                rescale_head_moments(head.get(moment), old, new, power),
                zeros,
            )
            for power, moment in ((1, first), (2, second))
        )
    opt_state = optax.tree_utils.tree_set(state.opt_state, mu=first, nu=second)
    stats = state.stats._replace(transform=transform)
    return state._replace(params=params, opt_state=opt_state, stats=stats)


def _with_columns(
    params: Params, head: OutputHead, columns: Array, kept: Params, new: Params
) -> Params:
    """Return parameters whose output layer is `new` in some columns and `kept` elsewhere."""
    return head.set(params, jax.tree.map(lambda a, b: jnp.where(columns, b, a), kept, new))
