"""What a run prints: a progress bar on a terminal, a line an evaluation elsewhere."""

import sys
import time

import numpy as np

from dynajax import schedule
from dynajax.config import Config
from dynajax.types import Evaluation

#: Environment steps that learn before the time that is left is told, and of those the first ones,
#: which do what comes once.
_STEPS, _FIRST = 30, 3


class Progress:
    """How far a run is, and how long it will take."""

    def __init__(self, config: Config, step: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._config, self._step = config, step
        self._last = time.perf_counter()
        self._plain: list[float] = []  # seconds of steps that learned
        self._fits: list[float] = []  # and of those with a fit
        self._told = False
        self._bar = tqdm(
            total=config.steps,
            initial=step,
            disable=not self._live,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            desc=config.env,
        )

    def say(self, text: str) -> None:
        """Prints a line, unless the run is quiet."""
        if self._live:
            self._bar.write(text)
        elif not self._quiet:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), flush=True)

    def stepped(self, step: int) -> None:
        """Notes that `step` environment steps are done."""
        seconds, steps = time.perf_counter() - self._last, step - self._step
        self._last, self._step = self._last + seconds, step
        self._bar.update(steps)
        first = schedule.due(self._config, step - steps)
        if first.fit:
            self._fits.append(seconds)
        elif first.learn:
            self._plain.append(seconds / steps)
        if not self._told and len(self._plain) > _STEPS:
            self._told = True
            self.say(f"about {duration(self.seconds_left())} left")

    def seconds_left(self) -> float:
        """From the steps so far; NaN before enough of them have learned."""
        if len(self._plain) <= _FIRST:
            return float("nan")
        each = float(np.mean(self._plain[_FIRST:]))
        left = self._config.steps - self._step
        fits = left / self._config.model.fit_every if self._fits else 0
        return left * each + fits * float(np.mean(self._fits or [0.0]))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Shows each variant's latest return, mean and standard deviation over seeds."""
        variants = self._config.variants
        scores = evaluation.returns.mean(1).reshape(len(variants), -1)
        parts = [
            (f"{variant.name} " if len(variants) > 1 else "")
            + f"{row.mean():.1f}"
            + (f" ± {row.std():.1f}" if len(row) > 1 else "")
            for variant, row in zip(variants, scores, strict=True)
        ]
        text = "return " + ", ".join(parts)
        self._bar.set_postfix_str(text)
        if not self._live:
            seconds = self.seconds_left()
            left = f"  {duration(seconds)} left" if np.isfinite(seconds) else ""
            self.say(f"step {step}/{self._config.steps}  {text}{left}")
        # The evaluation is no part of the next step.
        self._last = time.perf_counter()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Seconds in the two largest units, such as "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{minutes:.0f} min"
    if minutes < 48 * 60:
        return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
    return f"{minutes / 60 / 24:.1f} days"
