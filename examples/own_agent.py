"""An agent of your own: linear policy and critic, trained with temporal differences.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=pendulum-swingup --agent=own_agent:Linear --set agent.learning_rate=0.01

An agent is pure methods on its own state, any pytree, written for one learner. It is kept in
checkpoints, and never knows whether a minibatch is real or synthetic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import dynajax


@dynajax.fields
class LinearFields:
    """Settings `agent.*`; `dynajax.static` is for those that change the program."""

    noise: float = dynajax.traced(0.3, low=0, about="standard deviation of the exploration noise")
    learning_rate: float = dynajax.traced(1e-3, low=0, about="step size of both parts")


class Weights(NamedTuple):
    """The agent's state."""

    actor: jax.Array  # (D, A)
    critic: jax.Array  # (D + A,)


class Linear(dynajax.Agent):
    """A deterministic policy gradient with linear functions."""

    Fields = LinearFields

    def init(self, key):
        d, a = self.spec.obs_dim, self.spec.action_dim
        return Weights(jnp.zeros((d, a)), 0.01 * jax.random.normal(key, (d + a,)))

    def deterministic_action(self, state, obs):
        return jnp.tanh(obs @ state.actor)

    def act(self, state, obs, key):
        mean = self.deterministic_action(state, obs)
        noise = jax.random.normal(key, mean.shape)
        action = jnp.clip(mean + self.config.noise * noise, -1, 1)
        return action, -0.5 * jnp.square(noise).sum(-1)

    def value(self, state, obs, action):
        return (jnp.concatenate([obs, action], -1) @ state.critic)[None]  # one critic

    def update(self, state, batch, weight, mask, noise):
        next_action = self.deterministic_action(state, batch.next_obs)
        next_value = self.value(state, batch.next_obs, next_action)[0]
        target = batch.reward + self.learn.discount * batch.discount * next_value

        def loss(weights):
            critic_error = self.value(weights, batch.obs, batch.action)[0] - target
            action = self.deterministic_action(weights, batch.obs)
            value = self.value(state, batch.obs, action)[0]
            # An invalid transition has weight and mask 0.
            return (weight * critic_error**2 - mask * value).mean()

        error, gradient = jax.value_and_grad(loss)(state)
        step = jax.tree.map(lambda g: -self.config.learning_rate * jnp.clip(g, -1, 1), gradient)
        return jax.tree.map(jnp.add, state, step), {"loss": error}
