"""Likelihoods of dynamics models: how a network's outputs are read, and what is minimized.

`LIKELIHOODS` lists them; `--set model.likelihood=module:name` takes one of your own.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax import registry
from dynajax.config import ModelConfig
from dynajax.models.base import Gaussian
from dynajax.types import Params


@dataclass(frozen=True)
class Likelihood(metaclass=abc.ABCMeta):
    """A likelihood of targets z, bound to the settings `model.*`."""

    config: ModelConfig

    #: Whether predictions have a variance.
    has_variance: ClassVar[bool]
    #: Outputs that a network needs for each target.
    outputs_per_target: ClassVar[int]

    def init_bounds(self, shape: tuple[int, int]) -> Params | None:
        """Return learned bounds of the log-variance, leaves (E, Z), or None."""
        return None

    @abc.abstractmethod
    def read(self, output: Float[Array, "*B O"], bounds: Params | None) -> Gaussian:
        """Return the prediction that a network's outputs stand for."""

    @abc.abstractmethod
    def loss(
        self, prediction: Gaussian, z: Float[Array, "B Z"], exponent: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the mean loss over a minibatch and the targets."""

    def bounds_cost(self, bounds: Params | None) -> Float[Array, ""] | None:
        """Return a member's share of the cost of learned bounds, or None."""
        return None


def soft_clamp(raw: Array, low: Array | float, high: Array | float) -> Array:
    """Bend `raw` softly under `high`, then over `low` (Chua et al., 2018, appendix A)."""
    raw = high - jax.nn.softplus(high - raw)
    return low + jax.nn.softplus(raw - low)


def nll(
    mean: Float[Array, "*E B Z"],
    log_variance: Float[Array, "*E B Z"],
    z: Float[Array, "B Z"],
    exponent: Array | float,
) -> Float[Array, "*E"]:
    """Return the mean over B and Z of w (e^-l (mu - z)^2 + l), w = stop_gradient(e^(exponent l)).

    With exponent 0 the weight is exactly 1 and this is the Gaussian negative log-likelihood, up to
    constants; with exponent 0.5 it is the beta-NLL of Seitzer et al. (2022).
    """
    weight = jnp.exp(exponent * jax.lax.stop_gradient(log_variance))
    terms = weight * (jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance)
    return terms.mean((-2, -1))


class GaussianLikelihood(Likelihood):
    """Independent normal distributions with predicted, softly bounded variances."""

    has_variance = True
    outputs_per_target = 2

    def init_bounds(self, shape: tuple[int, int]) -> Params | None:
        """Return learned bounds, one pair per member and target.

        Chua et al. learn bounds that all members share; here no member waits for another.
        """
        if not self.config.learned_bounds:
            return None
        return {
            "low": jnp.full(shape, self.config.log_variance_min, jnp.float32),
            "high": jnp.full(shape, self.config.log_variance_max, jnp.float32),
        }

    def read(self, output: Float[Array, "*B O"], bounds: Params | None) -> Gaussian:
        """Split outputs into means and softly clamped log-variances of the last O/2 targets."""
        mean, raw = jnp.split(output, 2, -1)
        if bounds is None:
            low, high = self.config.log_variance_min, self.config.log_variance_max
            return Gaussian(mean, soft_clamp(raw, low, high))
        low, high = (bounds[name][-mean.shape[-1] :] for name in ("low", "high"))
        return Gaussian(mean, soft_clamp(raw, low, high))

    def loss(
        self, prediction: Gaussian, z: Float[Array, "B Z"], exponent: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the (weighted) negative log-likelihood."""
        assert prediction.log_variance is not None
        return nll(prediction.mean, prediction.log_variance, z, exponent)

    def bounds_cost(self, bounds: Params | None) -> Float[Array, ""] | None:
        """Return `model.bound_penalty` times the width of the bounds."""
        if bounds is None:
            return None
        width = bounds["high"].sum() - bounds["low"].sum()
        return self.config.bound_penalty / self.config.members * width


class Deterministic(Likelihood):
    """Point predictions, fitted by mean squared error."""

    has_variance = False
    outputs_per_target = 1

    def read(self, output: Float[Array, "*B O"], bounds: Params | None) -> Gaussian:
        """Return the outputs as means, without variances."""
        return Gaussian(output, None)

    def loss(
        self, prediction: Gaussian, z: Float[Array, "B Z"], exponent: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the mean squared error."""
        return jnp.square(prediction.mean - z).mean()


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "gaussian": GaussianLikelihood,
    "deterministic": Deterministic,
}


def likelihood_class(name: str) -> type[Likelihood]:
    """Return the likelihood called `name`, or `module:name`.

    Raises:
      UsageError: there is no such likelihood.
    """
    return registry.lookup("--set model.likelihood", LIKELIHOODS, name)


def make(config: ModelConfig) -> Likelihood:
    """Return the likelihood of a configuration."""
    return likelihood_class(config.likelihood)(config)
