"""What a dynamics model is.

A model predicts the normalized target z of a transition (`targets`): next state, then reward. It is
written for one member of the ensemble; `ensemble` maps it over the members, `training` fits it, and
`model_env` samples transitions from it. A member never needs another one.

To add a model, subclass `DynamicsModel` in one file (or `models.neural.NeuralModel`, if only the
network differs) and add it to `MODELS`, or name it as `--set model.network=module:name`.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.types import DataStats, EnvSpec, Params, Transition


class Gaussian(NamedTuple):
    """A prediction of targets z: independent normal distributions."""

    mean: Float[Array, "*B X"]
    log_variance: Float[Array, "*B X"] | None  # None if the model predicts no variance


def replace_reward(prediction: Gaussian, reward: Gaussian) -> Gaussian:
    """Return a prediction of all targets with the reward's (X = 1) in the last place."""

    def replace(whole: Array, last: Array) -> Array:
        return jnp.concatenate([whole[..., :-1], last], -1)

    mean = replace(prediction.mean, reward.mean)
    if prediction.log_variance is None or reward.log_variance is None:
        return Gaussian(mean, None)
    return Gaussian(mean, replace(prediction.log_variance, reward.log_variance))


class OutputHead(NamedTuple):
    """A linear output layer, {"kernel": (X, O), "bias": (O,)}, and the targets that it predicts.

    Its O outputs are the means of these targets, followed by their log-variances if there are any.
    When the target transform changes, its columns are rescaled so that predictions stay the same.
    """

    path: tuple[str, ...]  # of the layer in the parameters
    dims: slice  # of the Z targets
    init: Callable[..., Array]  # (key, shape) -> a new kernel

    def get(self, params: Params) -> Params:
        """Return the layer out of the parameters, or out of a tree of the same structure."""
        for name in self.path:
            params = params[name]
        return params

    def set(self, params: Params, layer: Params) -> Params:
        """Return the parameters with another layer in this place."""
        return _set(params, self.path, layer)


def _set(params: Params, path: tuple[str, ...], value: Params) -> Params:
    if not path:
        return value
    return {**params, path[0]: _set(params[path[0]], path[1:], value)}


@dataclass(frozen=True)
class DynamicsModel(metaclass=abc.ABCMeta):
    """One member of the ensemble, p(z | s, a), as pure functions of its parameters.

    Attributes:
      config: the settings `model.*`; traced fields may be arrays.
      spec: the task.
    """

    config: ModelConfig
    spec: EnvSpec

    @classmethod  # noqa: B027 -- an extension may leave it out
    def check(cls, config: ModelConfig) -> None:
        """Refuse settings that the model cannot work with.

        Raises:
          UsageError: one line that names the setting and the remedy.
        """

    @property
    def reward_from_next_state(self) -> bool:
        """Whether the reward is predicted from state, action and next state."""
        return self.config.reward_from == "next_state"

    @property
    @abc.abstractmethod
    def has_variance(self) -> bool:
        """Whether predictions have a variance; `beta` and some trust rules need it.

        It depends on `config` alone. A subclass may set it as a class attribute.
        """

    @abc.abstractmethod
    def init(self, key: Array, members: int) -> Params:
        """Return independent parameters of several members, leaves (members, ...)."""

    @abc.abstractmethod
    def predict_joint(
        self,
        params: Params,
        stats: DataStats,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
    ) -> Gaussian:
        """Return the prediction of all Z targets from state and action by one member.

        Args:
          params: the member's.
          stats: target transform and input normalization.
        """

    def predict_reward(
        self,
        params: Params,
        stats: DataStats,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
        next_obs: Float[Array, "*B D"],
    ) -> Gaussian:
        """Return the prediction of the reward alone, X = 1, given a sampled next state.

        Called only with `model.reward_from=next_state`.
        """
        raise NotImplementedError

    def predict(
        self,
        params: Params,
        stats: DataStats,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
        next_obs: Float[Array, "*B D"] | None = None,
    ) -> Gaussian:
        """Return the prediction of all Z targets, the reward given the next state if it depends on it.

        Args:
          next_obs: what the reward is conditioned on; by default the member's own mean prediction.
        """
        prediction = self.predict_joint(params, stats, obs, action)
        if not self.reward_from_next_state:
            return prediction
        if next_obs is None:
            next_obs, _ = targets.decode(stats.transform, obs, prediction.mean)
        reward = self.predict_reward(params, stats, obs, action, next_obs)
        return replace_reward(prediction, reward)

    @abc.abstractmethod
    def loss(self, params: Params, stats: DataStats, batch: Transition) -> Float[Array, ""]:
        """Return what one member minimizes on a minibatch, leaves (B, ...)."""

    @abc.abstractmethod
    def output_heads(self) -> tuple[OutputHead, ...]:
        """Return the output layers, which follow changes of the target transform."""

    def normalize_inputs(
        self, stats: DataStats, obs: Float[Array, "*B D"], action: Float[Array, "*B A"]
    ) -> Float[Array, "*B D+A"]:
        """Return states and actions in standard deviations from their means."""
        chex.assert_equal_shape_prefix([obs, action], obs.ndim - 1)
        chex.assert_axis_dimension(stats.input_mean, -1, obs.shape[-1] + action.shape[-1])
        inputs = jnp.concatenate([obs, action], -1)
        return (inputs - stats.input_mean) / stats.input_std
