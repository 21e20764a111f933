"""Neural dynamics models: a network and a likelihood.

Chua et al. (2018) and Janner et al. (2019) for the network, the Gaussian likelihood and the decay;
Seitzer et al. (2022) for the weighted likelihood. All are learned on the normalized targets z.
"""

import abc
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax.models import likelihoods, targets
from dynajax.models.base import DynamicsModel, Gaussian, OutputHead
from dynajax.models.likelihoods import Likelihood
from dynajax.networks import params as network_params
from dynajax.networks.initializers import fan_in
from dynajax.networks.mlp import MLP
from dynajax.networks.resnet import ResNet
from dynajax.types import DataStats, Params, Transition

#: Hidden layers of the network that predicts the reward from the next state.
REWARD_DEPTH = 2

#: L2 decay of the first layer, the second, those between, and the last (Chua et al., 2018).
DECAY_FIRST, DECAY_SECOND, DECAY_MIDDLE, DECAY_LAST = 2.5e-5, 5e-5, 7.5e-5, 1e-4


class NeuralModel(DynamicsModel):
    """A network with a joint head for state and reward, or with a second network for the reward.

    Parameters: "network", "reward_network" with `model.reward_from=next_state`, and "bounds" if the
    likelihood learns some. A subclass names its network and how that decays.
    """

    #: Name of the output layer in the parameters of `make_network`.
    HEAD: ClassVar[str] = "head"

    @abc.abstractmethod
    def make_network(self, depth: int, outputs: int) -> nn.Module:
        """Return a network with `depth` hidden layers, (X,) -> (outputs,)."""

    @abc.abstractmethod
    def decay(self, layers: Params) -> Float[Array, ""]:
        """Return the weight decay of a network's parameters, before `model.weight_decay`."""

    @property
    def likelihood(self) -> Likelihood:
        """How the network's outputs are read, and what is minimized."""
        return likelihoods.make(self.config)

    @property
    def has_variance(self) -> bool:
        """Whether the likelihood has a variance."""
        return self.likelihood.has_variance

    @property
    def _network(self) -> nn.Module:
        outputs = self.likelihood.outputs_per_target * (self.spec.obs_dim + 1)
        return self.make_network(self.config.depth, outputs)

    @property
    def _reward_network(self) -> nn.Module:
        return self.make_network(REWARD_DEPTH, self.likelihood.outputs_per_target)

    def init(self, key: Array, members: int) -> Params:
        """Return independent parameters of several members, leaves (members, ...)."""
        inputs = self.spec.obs_dim + self.spec.action_dim
        params = {"network": network_params.init_stacked(self._network, key, members, inputs)}
        if self.reward_from_next_state:
            params["reward_network"] = network_params.init_stacked(
                self._reward_network,
                jax.random.fold_in(key, 1),
                members,
                inputs + self.spec.obs_dim,
            )
        bounds = self.likelihood.init_bounds((members, self.spec.obs_dim + 1))
        return params if bounds is None else {**params, "bounds": bounds}

    def predict_joint(
        self,
        params: Params,
        stats: DataStats,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
    ) -> Gaussian:
        """Return the prediction of all Z targets by the first network."""
        inputs = self.normalize_inputs(stats, obs, action)
        output = network_params.apply(self._network, params["network"], inputs)
        return self.likelihood.read(output, params.get("bounds"))

    def predict_reward(
        self,
        params: Params,
        stats: DataStats,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
        next_obs: Float[Array, "*B D"],
    ) -> Gaussian:
        """Return the prediction of the reward from (s, a, s'), X = 1."""
        dim = obs.shape[-1]
        following = (next_obs - stats.input_mean[:dim]) / stats.input_std[:dim]
        inputs = jnp.concatenate([self.normalize_inputs(stats, obs, action), following], -1)
        output = network_params.apply(self._reward_network, params["reward_network"], inputs)
        return self.likelihood.read(output, params.get("bounds"))

    def loss(self, params: Params, stats: DataStats, batch: Transition) -> Float[Array, ""]:
        """Return negative log-likelihood, decay, and the member's share of the bounds' cost."""
        z = targets.encode(stats.transform, batch.obs, batch.reward, batch.next_obs)
        prediction = self.predict(params, stats, batch.obs, batch.action, batch.next_obs)
        value = self.likelihood.loss(prediction, z, stats.transform.exponent)
        value += self.config.weight_decay * self.decay(params["network"])
        if self.reward_from_next_state:
            value += self.config.weight_decay * self.decay(params["reward_network"])
        cost = self.likelihood.bounds_cost(params.get("bounds"))
        return value if cost is None else value + cost

    def output_heads(self) -> tuple[OutputHead, ...]:
        """Return the head of the network, and that of the reward network."""
        joint = OutputHead(("network", self.HEAD), slice(None), fan_in)
        if not self.reward_from_next_state:
            return (joint,)
        return joint, OutputHead(("reward_network", self.HEAD), slice(-1, None), fan_in)


class MLPModel(NeuralModel):
    """The network of PETS and MBPO: swish layers of one width."""

    def make_network(self, depth: int, outputs: int) -> nn.Module:
        """Return an MLP; the fan-in of its initial weights is that of one member."""
        return MLP((self.config.width,) * depth, outputs, nn.swish, fan_in)

    def decay(self, layers: Params) -> Float[Array, ""]:
        """Return the sum over layers of lambda/2 |W|^2, with PETS's lambdas."""
        hidden = len(layers) - 1
        rates = [DECAY_FIRST, DECAY_SECOND, *[DECAY_MIDDLE] * hidden][:hidden]
        ordered = [layers[f"hidden_{i}"] for i in range(hidden)] + [layers[self.HEAD]]
        return sum(
            (
                0.5 * rate * jnp.square(layer["kernel"]).sum()
                for rate, layer in zip([*rates, DECAY_LAST], ordered, strict=True)
            ),
            start=jnp.zeros(()),
        )


class ResNetModel(NeuralModel):
    """Residual blocks with LayerNorm, as in SimBa (Lee et al., 2024).

    DHMBPO's ablation reports 518 without and 850 with LayerNorm in the model on quadruped-run. Each
    block has two layers, so `model.depth` hidden layers are depth / 2 blocks, rounded up.
    """

    def make_network(self, depth: int, outputs: int) -> nn.Module:
        """Return a residual network whose stream is `model.width` wide."""
        return ResNet(self.config.width, -(-depth // 2), outputs, fan_in)

    def decay(self, layers: Params) -> Float[Array, ""]:
        """Return the sum over kernels of lambda/2 |W|^2, with PETS's lambdas by depth."""
        rates = {"embed": DECAY_FIRST, self.HEAD: DECAY_LAST}
        kernels = ((name, layer["kernel"]) for name, layer in layers.items() if "kernel" in layer)
        return sum(
            (
                0.5 * rates.get(name, DECAY_MIDDLE) * jnp.square(kernel).sum()
                for name, kernel in kernels
            ),
            start=jnp.zeros(()),
        )
