"""Model-based value expansion (Feinberg et al., 2018): critic targets that reach further.

It applies to the minibatches of any source.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax.models.model_env import ModelEnv, ModelStep, RolloutCarry
from dynajax.types import Metrics, Minibatch


def expand_targets(
    model_env: ModelEnv,
    trust: Any,
    batch: Minibatch,
    length: int,
    discount: Array | float,
    temperature: Float[Array, ""],
    key: Array,
) -> tuple[Any, Minibatch, Metrics]:
    """Return a minibatch whose critic targets reach up to `length` model steps further.

    A transition (s, a, r, d, s') becomes (s, a, r + g d (r_0 - alpha log pi(a_0|s')), g d d_0, s_0)
    for the model step (s', a_0, r_0, d_0, s_0), with g the discount and SAC's entropy cost, and so
    on for further steps. It stays as it is after a termination, and reaches no further than the
    trust rule allows.

    Args:
      model_env: with the agent's present policy.
      trust: the trust rule's state.
      batch: leaves (B, ...).
    """
    data = batch.data

    def extend(h: Array | int, carry: RolloutCarry, step: ModelStep) -> RolloutCarry:
        reward, reached, steps = carry.output
        extends = carry.active & step.keep_mask
        ahead = discount * reached
        gained = reward + ahead * (step.transition.reward - temperature * step.log_prob)
        reward = jnp.where(extends, gained, reward)
        reached = jnp.where(extends, ahead * step.transition.discount, reached)
        obs = jnp.where(extends[:, None], step.transition.next_obs, carry.obs)
        steps += extends
        active = extends & step.continue_mask & (step.transition.discount > 0)
        return RolloutCarry((reward, reached, steps), carry.trust, obs, active, {})

    active, steps = data.discount > 0, jnp.zeros(batch.valid.shape)
    output = data.reward, data.discount, steps
    carry = RolloutCarry(output, trust, data.next_obs, active, {})
    carry = model_env.rollout(carry, length, key, extend, valid=batch.valid, unroll=True)
    reward, reached, steps = carry.output
    data = data._replace(reward=reward, discount=reached, next_obs=carry.obs)
    return carry.trust, dataclasses.replace(batch, data=data), {"expanded_steps": steps.mean()}
