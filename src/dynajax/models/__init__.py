"""Dynamics models: what they are, how they are fitted, and how transitions are sampled from them.

`MODELS` lists them by the name that `--set model.network` takes.
"""

from typing import Any, cast

from dynajax import registry
from dynajax.config import ModelConfig
from dynajax.models.base import DynamicsModel, Gaussian, OutputHead
from dynajax.models.neural import MLPModel, NeuralModel, ResNetModel
from dynajax.types import EnvSpec
from dynajax.user_code import array, attribute, call

__all__ = [
    "MODELS",
    "DynamicsModel",
    "Gaussian",
    "MLPModel",
    "NeuralModel",
    "OutputHead",
    "ResNetModel",
    "make_model",
    "model_class",
    "predicts_variance",
]

MODELS: dict[str, type[DynamicsModel]] = {"mlp": MLPModel, "resnet": ResNetModel}


def model_class(name: str) -> type[DynamicsModel]:
    """Return the model called `name`, or `module:name`.

    Raises:
      UsageError: there is no such model.
    """
    return registry.lookup("--set model.network", MODELS, name)


def make_model(config: ModelConfig, spec: EnvSpec) -> DynamicsModel:
    """Return the dynamics model of one member; traced fields of `config` may be arrays."""
    return model_class(config.network)(config, spec)


def predicts_variance(config: ModelConfig) -> bool:
    """Return whether the configured model's predictions have a variance."""
    owner = f"--set model.network={config.network}"
    model = call(owner, model_class(config.network), config, cast(Any, None))
    return bool(attribute(owner, model, "has_variance", returns=array(bool)))
