"""Synthetic transitions: short rollouts of the policy in the ensemble. For one row."""

import jax
import jax.numpy as jnp

from dynajax.agents import sac
from dynajax.config import Config
from dynajax.models import ensemble, targets
from dynajax.types import Agent, Array, EnvSpec, Model, Transition


def horizon(config: Config, step: Array) -> Array | int:
    """The rollouts' length at an environment step, linear between two steps (Janner et al., 2019).

    A constant horizon stays a Python number, so its loop has a known length.
    """
    h = config.rollout.horizon
    if len(h) == 1:
        return h[0]
    first_step, last_step, first, last = h
    progress = jnp.clip((step - first_step) / (last_step - first_step), 0, 1)
    return jnp.floor(first + progress * (last - first)).astype(jnp.int32)


def imagine(
    config: Config, spec: EnvSpec, agent: Agent, model: Model, obs: Array, key: Array
) -> tuple[Transition, Array]:
    """One step from every state by the policy in the model, state and reward sampled.

    Every elite takes an equal share of the states, which one being redrawn at each call. The
    states were drawn independently, so this is one random elite a state; and each elite computes
    its own share alone.

    Args:
      obs: (B, D).

    Returns:
      Transition (B, ...), and bool (B,): the prediction is finite.
    """
    batch, k = obs.shape[0], config.model.elites
    action_key, order_key, noise_key = jax.random.split(key, 3)
    action, _ = sac.sample(config.sac, agent.actor, obs, action_key, spec.action_dim)
    members = jax.random.permutation(order_key, model.elites)

    def shares(x: Array) -> Array:
        return x.reshape(k, batch // k, x.shape[-1])

    mean, log_variance = ensemble.predict(config.model, model, members, shares(obs), shares(action))
    noise = jax.random.normal(noise_key, mean.shape)
    z = (mean + jnp.exp(0.5 * log_variance) * noise).reshape(batch, -1)
    next_obs, reward = targets.decode(model.code, obs, z)
    finite = jnp.isfinite(next_obs).all(-1) & jnp.isfinite(reward)
    next_obs = jnp.where(finite[:, None], next_obs, obs)
    reward = jnp.where(finite, reward, 0.0)
    if spec.termination is None:
        discount = jnp.ones(batch)
    else:
        ended = jax.vmap(spec.termination)(obs, action, next_obs)
        discount = 1.0 - ended.astype(jnp.float32)
    return Transition(obs, action, reward, discount, next_obs), finite
