"""Trained dynamics model as a function of observations and actions."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.actions import to_unit
from dynajax.config import ModelConfig, parse_variant
from dynajax.models import ensemble, make_model, targets
from dynajax.policy import selection
from dynajax.runs import policies, serialization
from dynajax.runtime import distributed
from dynajax.types import Array, EnvSpec, ModelState, UsageError
from dynajax.xla import backend


class Estimate(NamedTuple):
    """Prediction with two standard deviations, all in the task's units and of the same shape."""

    mean: Any  # mean over the elite members
    aleatoric: Any  # noise: root of the mean of the members' predicted variances
    epistemic: Any  # disagreement: standard deviation of the members' means


class ModelPrediction(NamedTuple):
    """Prediction for one agent step, which covers all frames that the action is repeated for."""

    next_obs: Estimate  # (..., D)
    reward: Estimate  # (...)


@dataclass(frozen=True, eq=False, repr=False)
class Dynamics(selection.Loaded):
    """Trained model: `model(obs, action)`, (..., D), (..., A) -> `ModelPrediction`.

    Attributes:
      spec: name and sizes of the task, and names of the observation's dimensions.
      repeat: number of frames that an action is repeated for.
      variant, seed: learner of the run.
      step: agent steps of training.
      config, model: configuration and state of the ensemble, see `dynajax.models.ensemble`.
    """

    noun: ClassVar[str] = "model"

    spec: EnvSpec
    repeat: int
    variant: str
    seed: int
    step: int
    config: ModelConfig
    model: ModelState

    @functools.cached_property
    def _predict(self) -> Any:
        def model_step(model: ModelState, obs: Array, action: Array) -> ModelPrediction:
            shape = obs.shape[:-1]
            obs, action = (x.reshape(-1, x.shape[-1]) for x in (obs, action))
            elites = ensemble.select_elites(model)
            dynamics = make_model(self.config, self.spec)
            z, log_variance = ensemble.predict_all(dynamics, elites, obs, action)
            transform = model.stats.transform
            next_obs, reward = targets.decode(transform, obs, z)
            means = jnp.concatenate([next_obs, reward[..., None]], -1)
            variance = jnp.zeros_like(means)
            if log_variance is not None:
                variance = jnp.exp(log_variance) * jnp.square(transform.scale)
            estimate = Estimate(means.mean(0), jnp.sqrt(variance.mean(0)), means.std(0))
            return ModelPrediction(
                Estimate(*(x[:, :-1].reshape(*shape, -1) for x in estimate)),
                Estimate(*(x[:, -1].reshape(shape) for x in estimate)),
            )

        return backend.jit(model_step)

    def __call__(self, obs: Any, action: Any) -> ModelPrediction:
        """Predict the next observation and the reward.

        Args:
          obs: (..., D), or as the task returns them, see `Policy`.
          action: (..., A) or as the task takes them, within the task's bounds.

        Returns:
          The prediction as float32 arrays.

        Raises:
          UsageError: the shapes do not match the task or each other.
        """
        obs, action = self._flatten(obs), np.asarray(action)
        flat_shape = *obs.shape[:-1], self.spec.action_dim
        shape = self.spec.action_shape
        if shape is not None and action.shape == (*obs.shape[:-1], *shape):
            action = action.reshape(flat_shape)
        if action.shape != flat_shape:
            raise UsageError(
                f"the model of {self.spec.name} takes observations (..., {self.spec.obs_dim}) and "
                f"actions (..., {self.spec.action_dim}), but got {obs.shape} and {action.shape}"
            )
        if self.spec.bounds is not None:
            action = to_unit(action, *map(np.asarray, self.spec.bounds))
        with backend.required_settings():
            prediction = self._predict(self.model, obs, action.astype(np.float32))
            return jax.tree.map(np.array, prediction)


def load_model(folder: str | Path, learner: int = 0) -> Dynamics:
    """Load a learner's model from the newest checkpoint of a run.

    Args:
      folder: run directory.
      learner: its index, see `load_policy`.

    Raises:
      UsageError: the model is missing or cannot be read; the message has one line.
    """
    selected = selection.select_learner(folder, learner)
    if selected.config["algo"] == "model-free":
        raise UsageError(f"{folder}: this run has no model, it was trained with --algo=model-free")
    spec = policies.read_spec(selected.folder / "policies")
    try:
        settings = parse_variant(selected.variant)
        values = {p.removeprefix("model."): v for p, v in settings if p.startswith("model.")}
        config = ModelConfig(**{**selected.config["model"], **values})
    except TypeError as error:
        raise UsageError(f"{folder}: the model settings cannot be read ({error})") from None

    def init(key: Array) -> Any:
        return ensemble.init(make_model(config, spec), key)._replace(opt_state=None)

    checkpoints, index = _find_checkpoints(selected)
    prefix = "learners/model/"
    step, leaves = _read_newest(checkpoints, prefix)
    leaves = {name.removeprefix(prefix): leaf[index] for name, leaf in leaves.items()}
    with backend.required_settings():
        shapes = selection.init_shapes(init)
        model = jax.device_put(selection.unflatten(shapes, leaves, checkpoints))
    repeat = selected.config["task"]["repeat"]
    return Dynamics(spec, repeat, selected.variant, selected.seed, step, config, model)


def _find_checkpoints(learner: selection.SelectedLearner) -> tuple[Path, int]:
    """Return the folder of the checkpoints of a learner, and its index within them."""
    folder, num_processes = learner.folder / "checkpoints", learner.num_processes
    if num_processes == 1:
        return folder, learner.learner_index
    num_learners = len(selection.learner_names(learner.config))
    shares = [distributed.share(num_learners, i, num_processes) for i in range(num_processes)]
    process = next(i for i, share in enumerate(shares) if learner.learner_index in share)
    return folder / f"process-{process}", shares[process].index(learner.learner_index)


def _read_newest(folder: Path, prefix: str) -> tuple[int, serialization.Arrays]:
    """Return the step of the newest intact checkpoint, and its leaves with a prefix.

    The leaves of optimisers are left out.
    """
    checkpoints = serialization.list_steps(folder)
    for path, step in reversed(checkpoints.items()):
        try:
            return step, serialization.read(
                path.absolute(),
                serialization.read_meta(path),
                lambda name: name.startswith(prefix) and "opt_state" not in name,
            )
        except serialization.Damaged as error:
            warnings.warn(f"{path}: damaged checkpoint ({error})", stacklevel=3)
    reason = "all checkpoints are damaged" if checkpoints else "the run has no checkpoint yet"
    raise UsageError(f"{folder}: {reason}")
