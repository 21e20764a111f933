"""Progress display of a run: a bar on a terminal, otherwise one line per evaluation."""

import sys
import time

import numpy as np

from dynajax import schedule
from dynajax.config import Config
from dynajax.types import Evaluation

#: Learning steps before the remaining time is first printed.
_MIN_STEPS = 30
#: First learning steps, which the estimate ignores because they include one-time work.
_WARMUP_STEPS = 3


class Progress:
    """Show the progress of a run and estimate the remaining time.

    Args:
      config: configuration of the run.
      step: environment steps done so far.
      quiet: print nothing.
    """

    def __init__(self, config: Config, step: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._config, self._step = config, step
        self._last = time.perf_counter()
        self._learn_seconds: list[float] = []  # per step with gradient updates but no fit
        self._fit_seconds: list[float] = []  # per step with a fit
        self._printed_estimate = False
        self._bar = tqdm(
            total=config.steps,
            initial=step,
            disable=not self._live,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            desc=config.env,
        )

    def print(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if self._live:
            self._bar.write(text)
        elif not self._quiet:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), flush=True)

    def update(self, step: int) -> None:
        """Update the display after `step` environment steps."""
        seconds, steps = time.perf_counter() - self._last, step - self._step
        self._last, self._step = self._last + seconds, step
        self._bar.update(steps)
        due = schedule.due(self._config, step - steps)
        if due.fit:
            self._fit_seconds.append(seconds)
        elif due.learn:
            self._learn_seconds.append(seconds / steps)
        if not self._printed_estimate and len(self._learn_seconds) > _MIN_STEPS:
            self._printed_estimate = True
            self.print(f"about {duration(self.seconds_left())} left")

    def seconds_left(self) -> float:
        """Return the estimated remaining time, or NaN before enough steps have been measured."""
        if len(self._learn_seconds) <= _WARMUP_STEPS:
            return float("nan")
        seconds_per_step = float(np.mean(self._learn_seconds[_WARMUP_STEPS:]))
        steps = self._config.steps - self._step
        fits = steps / self._config.model.fit_every if self._fit_seconds else 0
        return steps * seconds_per_step + fits * float(np.mean(self._fit_seconds or [0.0]))

    def show_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Show each variant's return, mean and standard deviation over seeds."""
        variants = self._config.variants
        returns_by_variant = evaluation.returns.mean(1).reshape(len(variants), -1)
        parts = [
            (f"{variant.name} " if len(variants) > 1 else "")
            + f"{returns.mean():.1f}"
            + (f" ± {returns.std():.1f}" if len(returns) > 1 else "")
            for variant, returns in zip(variants, returns_by_variant, strict=True)
        ]
        text = "return " + ", ".join(parts)
        self._bar.set_postfix_str(text)
        if not self._live:
            seconds = self.seconds_left()
            left = f"  {duration(seconds)} left" if np.isfinite(seconds) else ""
            self.print(f"step {step}/{self._config.steps}  {text}{left}")
        # Exclude the time of the evaluation from the next step.
        self._last = time.perf_counter()

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Format a number of seconds for reading, such as "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.0f} min"
    if minutes < 48 * 60:
        return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
    return f"{minutes / 60 / 24:.1f} days"
