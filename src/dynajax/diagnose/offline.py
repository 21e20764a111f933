"""The diagnosis before training: real transitions, small ensembles under every code, measures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dynajax.config import ModelConfig
from dynajax.diagnose import fits, measures
from dynajax.diagnose.data import Recording, parts
from dynajax.models.base import DynamicsModel
from dynajax.types import EnvSpec, Transition

#: Steps that a chain of predictions is followed for.
STEPS = 20


class Offline(NamedTuple):
    """What was measured; R seeds, C codes, D channels, H steps. `scores` is of transitions that no
    fit was shown, drawn at random; `new` of whole episodes that no fit was shown."""

    env: str
    source: str  # where the transitions come from, in words
    channels: tuple[str, ...]
    codes: tuple[str, ...]
    transitions: int  # of each seed
    scales: measures.Named  # (R, ...), see `measures.scales`
    scores: measures.Named  # (R, C, ...), see `measures.scores`
    new: measures.Named  # (R, C, ...), likewise
    chains: measures.Named  # (R, C, ...), see `measures.open_loop`


def measure(
    spec: EnvSpec,
    recordings: Sequence[Recording],
    codes: Sequence[str] = fits.CODES,
    *,
    source: str,
    seed: int = 0,
    config: ModelConfig = fits.MODEL,
    rounds: int = fits.ROUNDS,
    steps: int = STEPS,
    progress: Callable[[int], None] = lambda rounds: None,
) -> Offline:
    """Fits every code to every recording, and measures each.

    Args:
      recordings: one for each seed, of about the same length.
      source: see `Offline`.
      seed: of the first split, weights and minibatches.
      progress: is called with the rounds of fitting that are done.
    """
    divided = [parts(recording) for recording in recordings]
    size = min(len(known.episode) for known, _ in divided)
    known = [k.part(slice(size)) for k, _ in divided]
    new = [n for _, n in divided]
    fitted = fits.fit(spec, codes, [k.transitions for k in known], seed, config, rounds, progress)
    dynamics = fitted.dynamics

    def both(recording: Recording, model: fits.ModelState) -> tuple[measures.Named, measures.Named]:
        return (
            step_ahead(dynamics, model, recording.transitions),
            chain(dynamics, model, recording, steps),
        )

    held = [k.part(chosen).transitions for k, chosen in zip(known, fitted.held_out, strict=True)]
    cells = []
    for r, (some, fresh) in enumerate(zip(held, new, strict=True)):
        models = [fits.row(fitted.models, r, c) for c in range(len(codes))]
        cells.append([(step_ahead(dynamics, m, some), *both(fresh, m)) for m in models])
    return Offline(
        env=spec.name,
        source=source,
        channels=spec.obs_names,
        codes=tuple(codes),
        transitions=size + len(new[0].episode),
        scales=_stack([measures.scales(*_ends(x.transitions)) for x in recordings]),
        scores=_stack([_stack([cell[0] for cell in row]) for row in cells]),
        new=_stack([_stack([cell[1] for cell in row]) for row in cells]),
        chains=_stack([_stack([cell[2] for cell in row]) for row in cells]),
    )


def _ends(transitions: Transition) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return transitions.obs, transitions.next_obs, transitions.reward


def _stack(parts: Sequence[measures.Named]) -> measures.Named:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def _truth(transitions: Transition) -> np.ndarray:
    return np.concatenate([transitions.next_obs, transitions.reward[..., None]], -1)


def step_ahead(dynamics: DynamicsModel, model: fits.ModelState, data: Transition) -> measures.Named:
    """`measures.scores` of one model on transitions (B, ...)."""
    predicted = fits.predict(dynamics, model, data.obs, data.action)
    return measures.scores(predicted.mean, predicted.variance, data.obs, _truth(data))


def chain(
    dynamics: DynamicsModel, model: fits.ModelState, recording: Recording, steps: int
) -> measures.Named:
    """`measures.open_loop` of one model along a recording's actions."""
    data = recording.transitions
    starts, there = measures.windows(recording.episode, steps)
    index = np.minimum(np.arange(steps)[:, None] + starts, len(recording.episode) - 1)
    actions = np.swapaxes(data.action[index], 0, 1)
    predicted = fits.open_loop(dynamics, model, data.obs[starts], actions)
    return measures.open_loop(predicted, data.obs[starts], _truth(data)[index], there)
