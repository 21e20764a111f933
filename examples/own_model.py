"""Dynamics models of your own: a linear Gaussian model, and a network with another activation.

Run them in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=pendulum-swingup --set model.network=own_model:Linear
    dynajax train --env=pendulum-swingup --set model.network=own_model:Relu

A model is pure functions of one member's parameters; the package makes the ensemble, the fit,
the elites and the rollouts of it. It predicts the normalized targets z: next state, then reward.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import dynajax
from dynajax.models import Gaussian, MLPModel, OutputHead, targets
from dynajax.models.likelihoods import nll, soft_clamp
from dynajax.networks.initializers import fan_in
from dynajax.networks.mlp import MLP


class Linear(dynajax.DynamicsModel):
    """Means and log-variances that are linear in state and action."""

    has_variance = True

    @classmethod
    def check(cls, config):
        if config.reward_from != "inputs":
            raise dynajax.UsageError(
                f"--set model.reward_from={config.reward_from}: own_model:Linear predicts the "
                "reward from state and action; choose --set model.reward_from=inputs"
            )

    def init(self, key, members):
        inputs, z = self.spec.obs_dim + self.spec.action_dim, self.spec.obs_dim + 1
        kernel = 0.01 * jax.random.normal(key, (members, inputs, 2 * z))
        return {"linear": {"kernel": kernel, "bias": jnp.zeros((members, 2 * z))}}

    def predict_joint(self, params, stats, obs, action):
        layer = params["linear"]
        output = self.normalize_inputs(stats, obs, action) @ layer["kernel"] + layer["bias"]
        mean, raw = jnp.split(output, 2, -1)
        low, high = self.config.log_variance_min, self.config.log_variance_max
        return Gaussian(mean, soft_clamp(raw, low, high))

    def loss(self, params, stats, batch):
        z = targets.encode(stats.transform, batch.obs, batch.reward, batch.next_obs)
        mean, log_variance = self.predict(params, stats, batch.obs, batch.action)
        return nll(mean, log_variance, z, stats.transform.exponent)

    def output_heads(self):
        # A refit may scale the targets anew; the head is then rescaled with them.
        return (OutputHead(("linear",), slice(None), fan_in),)


class Relu(MLPModel):
    """The network of MBPO with ReLU; only what differs is written."""

    def make_network(self, depth, outputs):
        return MLP((self.config.width,) * depth, outputs, nn.relu, fan_in)
