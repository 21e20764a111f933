"""A trained ensemble under another code of its targets. For one row."""

import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.models import targets
from dynajax.types import Array, ModelState, Params, TargetTransform


def _with_head(params: Params, name: str, columns: Array, kept: Params, new: Params) -> Params:
    """Parameters with another output layer of a network: `new` in some columns, `kept` elsewhere."""
    head = jax.tree.map(lambda a, b: jnp.where(columns, b, a), kept, new)
    return {**params, name: {**params[name], "head": head}}


def rescale_head(model: ModelState, code: TargetTransform, fresh: Array, key: Array) -> ModelState:
    """The model under another code.

    What it predicts on average stays, to rounding, for the inputs that its network sees; its
    predicted variances stay where the clamp does not bend them. Adam's moments move along. Nothing
    is kept of the channels that are `fresh`, (D+1,): they get new weights, and no moments.
    """
    first, second = (optax.tree_utils.tree_get(model.optimiser, name) for name in ("mu", "nu"))
    params = model.params
    # The reward is the last channel of the first network's head, and all of the second's.
    for name, channels in (("layers", slice(None)), ("reward", slice(-1, None))):
        if name not in params:
            continue
        old, new = (targets.select_dims(c, channels) for c in (model.code, code))
        columns, head = jnp.tile(fresh[channels], 2), params[name]["head"]
        drawn = key if name == "layers" else jax.random.fold_in(key, 1)
        keys = jax.random.split(drawn, head["kernel"].shape[0])
        unwritten = {
            "kernel": jax.vmap(lambda k, s=head["kernel"].shape[1:]: nets.fan_in(k, s))(keys),
            "bias": jnp.zeros_like(head["bias"]),
        }
        recoded = targets.rescale_head_params(head, old, new)
        params = _with_head(params, name, columns, recoded, unwritten)
        nothing = jax.tree.map(jnp.zeros_like, head)
        first, second = (
            _with_head(
                moment,
                name,
                columns,
                targets.rescale_head_moments(moment[name]["head"], old, new, power),
                nothing,
            )
            for power, moment in ((1, first), (2, second))
        )
    adam = optax.tree_utils.tree_set(model.optimiser, mu=first, nu=second)
    return model._replace(params=params, optimiser=adam, code=code)
