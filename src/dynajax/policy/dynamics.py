"""A trained ensemble as a function of observations and actions."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    """A prediction and two standard deviations, of one shape and in the task's units."""

    mean: Any  # over the elites
    aleatoric: Any  # what the members say of the noise: the root of their mean variance
    epistemic: Any  # what they disagree on: the standard deviation of their means


class ModelPrediction(NamedTuple):
    """What comes of an action, after all the simulator steps that it is held for."""

    next_obs: Estimate  # (..., D)
    reward: Estimate  # (...)


@dataclass(frozen=True, eq=False)
class Dynamics:
    """A trained model: `model(obs, action)`, (..., D), (..., A) -> `ModelPrediction`.

    Attributes:
      spec: the task's name, sizes and names of observations.
      repeat: simulator steps that an action is held for.
      variant, seed: which row of the run it is.
      step: environment steps of training that it had.
      config, model: the ensemble, as `dynajax.models.ensemble` takes it.
    """

    spec: EnvSpec
    repeat: int
    variant: str
    seed: int
    step: int
    config: ModelConfig
    model: ModelState

    @functools.cached_property
    def _imagine(self) -> Any:
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
            parts = means.mean(0), jnp.sqrt(variance.mean(0)), means.std(0)
            return ModelPrediction(
                Estimate(*(x[:, :-1].reshape(*shape, -1) for x in parts)),
                Estimate(*(x[:, -1].reshape(shape) for x in parts)),
            )

        return backend.jit(model_step)

    def __call__(self, obs: np.ndarray, action: np.ndarray) -> ModelPrediction:
        """What the model expects.

        Args:
          obs: (..., D).
          action: (..., A), in the task's own bounds.

        Returns:
          float32 arrays.

        Raises:
          UsageError: the shapes do not go together.
        """
        obs, action = np.asarray(obs, np.float32), np.asarray(action)
        if (obs.shape, action.shape) != (
            (*obs.shape[:-1], self.spec.obs_dim),
            (*obs.shape[:-1], self.spec.action_dim),
        ):
            raise UsageError(
                f"the model of {self.spec.name} takes observations (..., {self.spec.obs_dim}) and "
                f"actions (..., {self.spec.action_dim}), and was given {obs.shape}, {action.shape}"
            )
        if self.spec.bounds is not None:
            action = to_unit(action, *map(np.asarray, self.spec.bounds))
        imagined = self._imagine(self.model, obs, action.astype(np.float32))
        return jax.tree.map(np.array, imagined)


def load_model(folder: str | Path, row: int = 0) -> Dynamics:
    """A row's model out of the newest checkpoint of a run's folder.

    Args:
      row: as of `load_policy`.

    Raises:
      UsageError: with one line that says what is missing.
    """
    chosen = selection.choose(folder, row)
    if chosen.plain["algo"] == "model-free":
        raise UsageError(f"{folder}: this run has no model, it was trained with --algo=model-free")
    spec = policies.task(chosen.folder / "policies")
    try:
        of_variant = parse_variant(chosen.variant)
        values = {p.removeprefix("model."): v for p, v in of_variant if p.startswith("model.")}
        config = ModelConfig(**{**chosen.plain["model"], **values})
    except TypeError as error:
        raise UsageError(f"{folder}: its model is another version's ({error})") from None

    def init(key: Array) -> Any:
        return ensemble.init(make_model(config, spec), key)._replace(opt_state=None)

    place, number = _place(chosen)
    step, leaves = _newest(place, "learners/model/")
    of_row = {name.removeprefix("learners/model/"): x[number] for name, x in leaves.items()}
    model = jax.device_put(selection.filled(selection.shapes(init), of_row, place))
    repeat = chosen.plain["task"]["repeat"]
    return Dynamics(spec, repeat, chosen.variant, chosen.seed, step, config, model)


def _place(chosen: selection.Chosen) -> tuple[Path, int]:
    """Where the checkpoints of a row are, and which of their rows it is."""
    place = chosen.folder / "checkpoints"
    if chosen.parts == 1:
        return place, chosen.number
    total = len(selection.rows(chosen.plain))
    shares = [distributed.share(total, i, chosen.parts) for i in range(chosen.parts)]
    part = next(i for i, share in enumerate(shares) if chosen.number in share)
    return place / f"process-{part}", shares[part].index(chosen.number)


def _newest(place: Path, prefix: str) -> tuple[int, serialization.Arrays]:
    """The step of the newest checkpoint that can be read, and its leaves under a prefix."""
    damages = []
    for path, step in reversed(serialization.steps(place).items()):
        try:
            return step, serialization.read(
                path.absolute(),
                serialization.read_meta(path),
                lambda name: name.startswith(prefix) and "opt_state" not in name,
            )
        except serialization.Damaged as damage:
            damages.append(str(damage))
            warnings.warn(f"{path}: damaged checkpoint ({damage})", stacklevel=3)
    raise UsageError(f"{place}: {'no checkpoint can be read' if damages else 'there is none yet'}")
