"""Printed messages of a run, and a progress bar on a terminal."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynajax import schedule
from dynajax.algorithms import describe
from dynajax.config import Config
from dynajax.types import Evaluation, finite_statistics

#: Learning steps before the remaining time is first printed.
_MIN_STEPS = 30
#: First learning steps, which the estimate ignores because they include one-time work.
_WARMUP_STEPS = 3
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} steps{postfix}"


class _Mean:
    """Mean of durations, without the first ones unless there are no others."""

    def __init__(self, ignored: int) -> None:
        self.count, self._ignored = 0, ignored
        self._first, self._total = 0.0, 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= self._ignored:
            self._first += seconds
        else:
            self._total += seconds

    def __call__(self) -> float:
        """Return the mean, 0 if there is nothing to average."""
        if self.count > self._ignored:
            return self._total / (self.count - self._ignored)
        return self._first / max(1, self.count)


class Progress:
    """Print what happens in a run, and estimate the remaining time.

    On a terminal a progress bar is below the printed lines, which remain.

    Args:
      config: configuration of the run.
      quiet: print nothing.
    """

    def __init__(self, config: Config, quiet: bool) -> None:
        self._config, self._quiet = config, quiet
        self._bar: Any = None

    def print(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if self._quiet:
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)
            sys.stdout.flush()

    def begin(self, step: int) -> None:
        """Begin to measure after `step` agent steps, and show the bar on a terminal."""
        self._step, self._last = step, time.perf_counter()
        self._learning = _Mean(_WARMUP_STEPS)  # per step with gradient updates but no fit
        self._fits, self._evaluations = _Mean(1), _Mean(1)
        self._printed_estimate = False
        if not self._quiet and step < self._config.steps and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._config.steps,
                initial=step,
                dynamic_ncols=True,
                desc=self._config.env,
                bar_format=_BAR,
                leave=False,
            )

    def update(self, step: int) -> None:
        """Update the display after `step` agent steps."""
        seconds, steps = time.perf_counter() - self._last, step - self._step
        self._last, self._step = self._last + seconds, step
        due = schedule.due(self._config, step - steps)
        if due.fit:
            self._fits.add(seconds)
        elif due.learn:
            self._learning.add(seconds / steps)
        if self._bar is not None:
            self._bar.set_postfix_str(self.time_left(), refresh=False)
            self._bar.update(steps)
        elif not self._printed_estimate and self._learning.count > _MIN_STEPS:
            self._printed_estimate = True
            self.print(self.time_left())

    def seconds_left(self) -> float:
        """Return the estimated remaining time, or NaN before enough steps have been measured.

        Evaluations count once one has been measured, and fits likewise.
        """
        if self._learning.count <= _WARMUP_STEPS:
            return math.nan
        steps = self._config.steps - self._step
        return (
            steps * self._learning()
            + self._fits_left() * self._fits()
            + self._evaluations_left() * self._evaluations()
        )

    def _fits_left(self) -> int:
        """Return the number of fits from the current step on, if there is a model."""
        random, every = self._config.random_steps, self._config.model.fit_every
        begin, end = max(self._step - random, 0), max(self._config.steps - random, 0)
        return -(-end // every) - -(-begin // every)

    def _evaluations_left(self) -> int:
        """Return the number of evaluations after the current step."""
        every, total = self._config.eval.every, self._config.steps
        return -(-total // every) - self._step // every if self._step < total else 0

    def time_left(self) -> str:
        """Return the estimated remaining time in words, or "" if there is no estimate yet."""
        seconds = self.seconds_left()
        if self._step >= self._config.steps:
            return "finishing"
        if math.isnan(seconds):
            return ""
        unknown = "" if self._evaluations.count else f" and {self._count_evaluations()}"
        return f"about {duration(max(1.0, seconds))}{unknown} left"

    def _count_evaluations(self) -> str:
        count = self._evaluations_left()
        return f"{count} evaluation{'s' * (count != 1)}"

    def show_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Print each variant's return, mean and standard deviation over seeds."""
        self._evaluations.add(time.perf_counter() - self._last)
        variants = self._config.variants
        returns_by_variant = finite_statistics(evaluation.returns)[0].reshape(len(variants), -1)
        parts = [
            (f"{variant.name} " if len(variants) > 1 else "") + _format_returns(returns)
            for variant, returns in zip(variants, returns_by_variant, strict=True)
        ]
        text, left = "return " + ", ".join(parts), self.time_left()
        self.print(f"step {step}/{self._config.steps}  {text}{f'  {left}' if left else ''}")
        # Exclude the time of the evaluation from the next step.
        self._last = time.perf_counter()

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _format_returns(returns: np.ndarray) -> str:
    """Return the mean and standard deviation of some returns (seeds,)."""
    mean, deviation = returns.mean(), returns.std()
    size = max(abs(mean), deviation)
    # Three significant digits, because the returns of a task may be small.
    digits = 2 - math.floor(math.log10(size)) if 0 < size < 10 else 1
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(returns) > 1 else "")


def header(config: Config, folder: Path) -> list[str]:
    """Return the lines that describe a run before anything slow happens."""
    last = config.seed + config.seeds - 1
    seeds = f"seed {config.seed}" if config.seeds == 1 else f"seeds {config.seed} to {last}"
    repeat = f" of {config.task.repeat} frames" if config.task.repeat > 1 else ""
    return [
        f"{config.env}, {seeds}, in {folder}: {describe(config)}",
        f"{config.steps:,} agent steps{repeat}, {config.random_steps:,} with random actions",
    ]


def compilation_notice() -> str:
    """Return a line that says how long compilation takes."""
    options: Any = jax.config
    if options.jax_compilation_cache_dir and options.jax_enable_compilation_cache:
        return "compiling (about 30 s the first time, a few seconds after that)"
    return "compiling (about 30 s, since JAX_COMPILATION_CACHE_DIR is not set)"


def duration(seconds: float) -> str:
    """Format a number of seconds for reading, such as "3 h 05 min"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.0f} min"
    if minutes < 48 * 60:
        return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
    return f"{minutes / 60 / 24:.1f} days"
