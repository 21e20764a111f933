"""What a run writes while it runs: `eval.csv`, `metrics.jsonl`, TensorBoard, and a progress bar."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.config import Config
from dynajax.types import Evaluation, UsageError


def row_names(config: Config) -> list[tuple[str, int]]:
    """(variant, seed) of each of the S rows."""
    return [(config.variants[index].name, seed) for index, seed in config.row_pairs]


class Loggers:
    """The files of one run.

    `offsets` belong into a checkpoint; `Loggers` made with them cuts the files back to it, so a
    resumed run's files are those of an uninterrupted one.
    """

    def __init__(
        self, folder: Path, config: Config, step: int, offsets: dict[str, int], wandb: bool = False
    ) -> None:
        # TensorBoard's writer is slow to import.
        from tensorboardX import SummaryWriter

        self._rows = row_names(config)
        self._files = {}
        for name in ("eval.csv", "metrics.jsonl"):
            file = open(folder / name, "ab")  # noqa: SIM115 (held until close)
            if file.seek(0, os.SEEK_END) < offsets.get(name, 0):
                raise UsageError(
                    f"--out={folder}: {name} is shorter than the checkpoint says; "
                    "choose another folder"
                )
            file.truncate(offsets.get(name, 0))
            self._files[name] = file
        if not offsets.get("eval.csv"):
            episodes = [f"return_{k}" for k in range(config.eval.episodes)]
            self._csv_line(
                ["variant", "seed", "step", "return_mean", "return_std", "length_mean", *episodes]
            )
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._wandb = _start_wandb(folder, config) if wandb else None

    def _write(self, name: str, text: str) -> None:
        file = self._files[name]
        try:
            file.write(text.encode())
            file.flush()
        except OSError as error:
            raise UsageError(f"--out: {name} cannot be written ({error.strerror})") from None

    def _csv_line(self, values: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        self._write("eval.csv", text.getvalue())

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Logs one evaluation of all rows."""
        for (variant, seed), returns, lengths in zip(
            self._rows, result.returns, result.lengths, strict=True
        ):
            mean = float(returns.mean())
            values = [mean, float(returns.std()), float(lengths.mean()), *map(float, returns)]
            self._csv_line([variant, seed, step, *values])
            self._scalar(f"{variant}/{seed}/evaluation/return", mean, step)

    def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Logs one line a row; `values` are arrays (S,), by name."""
        columns = {name: np.asarray(value) for name, value in values.items()}
        for s, (variant, seed) in enumerate(self._rows):
            line = {name: _plain(column[s]) for name, column in columns.items()}
            self._line({"kind": kind, "variant": variant, "seed": seed, "step": step, **line})
            for name, value in line.items():
                self._scalar(f"{variant}/{seed}/{kind}/{name}", value, step)

    def time(self, step: int, values: dict[str, Any]) -> None:
        """Logs one line of times for the whole run."""
        self._line({"kind": "time", "step": step, **values})

    def _line(self, values: dict[str, Any]) -> None:
        self._write("metrics.jsonl", json.dumps(values, allow_nan=False) + "\n")

    def _scalar(self, name: str, value: float | None, step: int) -> None:
        if value is None:
            return
        self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value}, step=step)

    def write(self, step, fits=(), learn=None, evaluation=None, time=None):  # type: ignore[no-untyped-def]
        if evaluation is not None:
            self.evaluation(step, evaluation)
        for at, metrics in fits:
            self.metrics("fit", at, metrics)
        if learn:
            self.metrics("learn", step, learn)
        if time:
            self.time(step, time)

    def offsets(self) -> dict[str, int]:
        """The files' lengths in bytes, all of it on disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self._board.flush()
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLoggers:
    """`Loggers` of a process that writes none of the files."""

    def evaluation(self, step: int, result: Evaluation) -> None: ...
    def metrics(self, kind: str, step: int, values: dict[str, Any]) -> None: ...
    def time(self, step: int, values: dict[str, Any]) -> None: ...
    def write(self, step, **kw): ...  # type: ignore[no-untyped-def]
    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


def _start_wandb(folder: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("--wandb: install the extra first: pip install 'dynajax[wandb]'") from None
    from dynajax.config import as_dict

    return wandb.init(project="dynajax", dir=str(folder), name=folder.name, config=as_dict(config))


def _plain(value: Any) -> float | int | None:
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
