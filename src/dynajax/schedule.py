"""When things happen in a run: said once, for every engine and for the benchmark.

An environment step is numbered by the steps done before it, from 0. What a step's transition
teaches is learned in the step after it, while the environment moves (BUILD_NOTES.md).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from dynajax.config import Config


class Due(NamedTuple):
    """What falls due at an environment step, in this order; bools, or bool arrays."""

    reset: Any  # a fresh agent, before anything else
    fit: Any  # the model is refitted
    random: Any  # the action is uniform
    insert: Any  # the transition before this step is stored, and no more
    learn: Any  # it is stored, and learned from
    evaluate: Any  # the policy is evaluated, once this step is done


def due(config: Config, step: Any) -> Due:
    """What falls due at environment step `step`, a whole number or a traced one, ()."""
    learn, model = config.learn, config.model
    random = step < config.random_steps
    # In steps since learning began.
    learning = step - config.random_steps
    reset = np.bool_(False)
    if learn.reset_every:
        reset = reset | (step % learn.reset_every == 0)
    for at in learn.reset_at:
        reset = reset | (step == at)
    return Due(
        reset=reset & (learning > 0),
        fit=config.has_model & (learning >= 0) & (learning % model.fit_every == 0),
        random=random,
        insert=(step > 0) & random,
        learn=(step > 0) & (learning >= 0),
        evaluate=((step + 1) % config.eval.every == 0) | (step + 1 == config.steps),
    )


def learns(config: Config) -> bool:
    """Whether a run is long enough for the agent to learn at all."""
    return bool(due(config, config.steps - 1).learn)


def segments(config: Config) -> tuple[int, ...]:
    """Static numbers of environment steps by which an engine that scans may go, longest first.

    Resets, fits and evaluations fall between segments of the first length; a second one is what
    is left of a last interval that is shorter than the others.
    """
    learn = config.learn
    # Without a model too: an interruption is heard between segments.
    every = [config.eval.every, config.random_steps, config.model.fit_every]
    length = math.gcd(*every, learn.reset_every, *learn.reset_at)
    rest = config.steps % length
    return (length, rest) if rest and config.steps > length else (min(length, config.steps),)


def until_due(config: Config, step: int) -> int:
    """The length of the segment that begins at `step`: one of `segments`, but where a run goes on
    from the end of a shorter one.
    """
    length = segments(config)[0]
    return min(length - step % length, config.steps - step)
