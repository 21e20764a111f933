"""A fix of your own: another target for the dynamics model.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=cheetah-run --fix=none --fix=scale,own_fix:slope

A fix has up to three rules, see `dynajax.models.targets`: `skip` for k, `affine` for m and c of the
target z = ([s' - k s, r] - m) / c, and `exponent` for the weight of the loss. Fixes combine if they
set different rules, and all variants train in one program.
"""

import jax.numpy as jnp

import dynajax


def least_squares(obs, next_obs, weights):
    """Return k (D,), the slope of s' on s in each dimension.

    Args:
      obs, next_obs: (N, D), all slots of the replay buffer.
      weights: (N,), 1 for a transition of the training split, else 0.
    """
    total = jnp.maximum(weights.sum(), 1.0)
    centered = obs - weights @ obs / total
    return weights @ (centered * next_obs) / jnp.maximum(weights @ centered**2, 1e-30)


slope = dynajax.Fix("predict s' minus its least-squares slope on s", skip=least_squares)
