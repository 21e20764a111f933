"""Diagnose a task before training: fit small ensembles under every fix, and measure them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dynajax.config import ModelConfig
from dynajax.diagnose import fits, measures
from dynajax.diagnose.data import Recording, split
from dynajax.diagnose.measures import Measures
from dynajax.models.base import DynamicsModel
from dynajax.types import EnvSpec, ModelState, Transition

#: Length of multi-step predictions.
STEPS = 20


class OfflineResult(NamedTuple):
    """Measures of R seeds, F combinations of fixes, D dimensions, H steps."""

    env: str
    source: str  # where the transitions come from, in words
    dims: tuple[str, ...]
    fixes: tuple[str, ...]
    transitions: int  # of each seed
    first_seed: int
    targets: Measures  # (R, ...), see `measures.target_statistics`
    held_out: Measures  # (R, F, ...), `measures.one_step` on random transitions that no fit used
    new_episodes: Measures  # (R, F, ...), the same on whole episodes that no fit used
    open_loop: Measures  # (R, F, ...), see `measures.open_loop`


def measure(
    spec: EnvSpec,
    recordings: Sequence[Recording],
    fixes: Sequence[str] = fits.FIX_SETS,
    *,
    source: str,
    seed: int = 0,
    config: ModelConfig = fits.MODEL,
    rounds: int = fits.ROUNDS,
    steps: int = STEPS,
    progress: Callable[[int], None] = lambda rounds: None,
) -> OfflineResult:
    """Fit an ensemble under every combination of fixes to every recording, and measure each.

    Args:
      recordings: one for each seed, of about the same length.
      fixes: comma lists of `FIXES`.
      source: see `OfflineResult`.
      seed: of the first recording's split, weights and minibatches.
      steps: see `STEPS`.
      progress: is called with the number of rounds of fitting that are done.
    """
    divided = [split(recording) for recording in recordings]
    size = min(len(known.episode) for known, _ in divided)
    known = [k.select(slice(size)) for k, _ in divided]
    new = [n for _, n in divided]
    fitted = fits.fit(spec, fixes, [k.transitions for k in known], seed, config, rounds, progress)
    dynamics = fitted.dynamics
    held_out = [
        k.select(chosen).transitions for k, chosen in zip(known, fitted.held_out, strict=True)
    ]

    models = [
        [fits.select_model(fitted.models, r, f) for f in range(len(fixes))]
        for r in range(len(recordings))
    ]

    def over_models(measure_one: Callable[[ModelState, int], Measures]) -> Measures:
        """Stack the measures of all models: leaves (R, F, ...)."""
        return _stack(
            [_stack([measure_one(m, r) for m in of_seed]) for r, of_seed in enumerate(models)]
        )

    return OfflineResult(
        env=spec.name,
        source=source,
        dims=spec.obs_names,
        fixes=tuple(fixes),
        transitions=size + len(new[0].episode),
        first_seed=seed,
        targets=_stack([_target_statistics(x.transitions) for x in recordings]),
        held_out=over_models(lambda m, r: one_step(dynamics, m, held_out[r])),
        new_episodes=over_models(lambda m, r: one_step(dynamics, m, new[r].transitions)),
        open_loop=over_models(lambda m, r: open_loop(dynamics, m, new[r], steps)),
    )


def _target_statistics(data: Transition) -> Measures:
    return measures.target_statistics(data.obs, data.next_obs, data.reward)


def _stack(parts: Sequence[Measures]) -> Measures:
    stacked: Measures = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    return stacked


def _truth(transitions: Transition) -> np.ndarray:
    return np.concatenate([transitions.next_obs, transitions.reward[..., None]], -1)


def one_step(dynamics: DynamicsModel, model: ModelState, data: Transition) -> Measures:
    """Return `measures.one_step` of one model on transitions (B, ...)."""
    predicted = fits.predict(dynamics, model, data.obs, data.action)
    return measures.one_step(predicted.mean, predicted.variance, data.obs, _truth(data))


def open_loop(
    dynamics: DynamicsModel, model: ModelState, recording: Recording, steps: int
) -> Measures:
    """Return `measures.open_loop` of one model along the actions of a recording."""
    data = recording.transitions
    starts, valid = measures.windows(recording.episode, steps)
    index = np.minimum(np.arange(steps)[:, None] + starts, len(recording.episode) - 1)
    actions = np.swapaxes(data.action[index], 0, 1)
    predicted = fits.open_loop(dynamics, model, data.obs[starts], actions)
    return measures.open_loop(predicted, data.obs[starts], _truth(data)[index], valid)
