"""The schedule of a run: at which agent steps the model is fitted, the agent learns, etc.

All engines and the benchmark read it from here. An agent step is numbered by the steps done
before it, from 0. The transition of a step is learned from in the next step, while the environment
moves (docs/dev/decisions.md).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dynajax.config import Config


class Due(NamedTuple):
    """The operations that are due at an agent step, in this order; bools or bool arrays."""

    reset: Any  # reinitialise the agent, before anything else
    fit: Any  # refit the model
    random: Any  # take a uniformly random action
    insert: Any  # store the previous transition, without learning
    learn: Any  # store the previous transition, and learn
    evaluate: Any  # evaluate the policy, after this step


def due(config: Config, step: Any) -> Due:
    """Return the operations that are due at agent step `step`, a traced or Python integer."""
    learn, model = config.learn, config.model
    random = step < config.random_steps
    steps_of_learning = step - config.random_steps
    reset = np.bool_(False)
    if learn.reset_every:
        reset = reset | (step % learn.reset_every == 0)
    for at in learn.reset_at:
        reset = reset | (step == at)
    return Due(
        reset=reset & (steps_of_learning > 0),
        fit=config.has_model
        & (steps_of_learning >= 0)
        & (steps_of_learning % model.fit_every == 0),
        random=random,
        insert=(step > 0) & random,
        learn=(step > 0) & (steps_of_learning >= 0),
        evaluate=((step + 1) % config.eval.every == 0) | (step + 1 == config.steps),
    )


def learns(config: Config) -> bool:
    """Return whether the run is long enough for the agent to learn."""
    return bool(due(config, config.steps - 1).learn)


def random_steps_done(config: Config, step: int) -> bool:
    """Return whether all random steps are done after `step` agent steps, or the run is over."""
    return step >= min(config.random_steps, config.steps)


def segments(config: Config) -> tuple[int, ...]:
    """Return the static segment lengths of an engine that scans over steps, longest first.

    Resets, fits and evaluations happen between segments of the first length. A second length is the
    remainder of a last interval that is shorter than the others.
    """
    learn = config.learn
    # Without a model `fit_every` counts too: an interruption takes effect between segments.
    every = [config.eval.every, config.random_steps, config.model.fit_every]
    length = math.gcd(*every, learn.reset_every, *learn.reset_at)
    rest = config.steps % length
    return (length, rest) if rest and config.steps > length else (min(length, config.steps),)


def segment_length(config: Config, step: int) -> int:
    """Return the length of the segment that begins at `step`.

    It is one of `segments`, unless the run was extended after a shorter last segment.
    """
    length = segments(config)[0]
    return min(length - step % length, config.steps - step)
