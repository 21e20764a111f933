"""What a run writes while it runs: `eval.csv` and `metrics.jsonl`, TensorBoard, Weights & Biases."""

import csv
import io
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dynajax.config import Config, as_dict
from dynajax.runs.directory import write_atomically
from dynajax.types import Evaluation, UsageError


def row_names(config: Config) -> list[tuple[str, int]]:
    """(variant, seed) of each of the S rows."""
    return [(config.variants[index].name, seed) for index, seed in config.variant_seed_pairs]


class Entry(NamedTuple):
    """What is logged of one environment step."""

    step: int
    kind: str  # "fit", "learn" or "evaluation"
    values: Mapping[str, np.ndarray]  # (S,) by name, or (S, D) of every channel


class Record(NamedTuple):
    """What one call of `Loggers.write` gives to every logger."""

    step: int
    entries: Sequence[Entry]  # their steps never fall; the evaluation's comes last
    evaluation: Evaluation | None
    time: Mapping[str, Any] | None


class Logger(Protocol):
    """A place that metrics go to; it is opened anew when a run is resumed.

    Args:
      folder: the run's.
      config: the run's.
      step: the environment steps done so far.
      offsets: what `offsets` returned then; empty for a new run.
    """

    def __init__(
        self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]
    ) -> None: ...

    def write(self, record: Record) -> None:
        """Writes what has happened since the call before."""

    def offsets(self) -> dict[str, int]:
        """Brings everything to the disk; says how long the files are that a resume cuts back."""

    def close(self) -> None: ...


class Files:
    """`eval.csv`, a line a row and evaluation, and `metrics.jsonl`, a line a row and entry.

    Raises:
      UsageError: the files are shorter than `offsets`, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        self._rows, self._repeat = row_names(config), config.task.repeat
        self._files = {}
        for name in ("eval.csv", "metrics.jsonl"):
            file = open(folder / name, "ab")  # noqa: SIM115 (held until close)
            if file.seek(0, os.SEEK_END) < offsets.get(name, 0):
                raise UsageError(
                    f"--out={folder}: {name} is shorter than the checkpoint says; put it back, "
                    "or choose another folder"
                )
            file.truncate(offsets.get(name, 0))
            self._files[name] = file
        if not offsets.get("eval.csv"):
            episodes = [f"return_{k}" for k in range(config.eval.episodes)]
            columns = ["variant", "seed", "step", "frames"]
            self._csv_line([*columns, "return_mean", "return_std", "length_mean", *episodes])

    def write(self, record: Record) -> None:
        if (result := record.evaluation) is not None:
            for (variant, seed), returns, lengths in zip(
                self._rows, result.returns, result.lengths, strict=True
            ):
                mean = [float(x) for x in (returns.mean(), returns.std(), lengths.mean())]
                at = record.step, record.step * self._repeat
                self._csv_line([variant, seed, *at, *mean, *map(float, returns)])
        for entry in record.entries:
            if entry.kind == "evaluation":
                continue
            for s, (variant, seed) in enumerate(self._rows):
                line = {"kind": entry.kind, "variant": variant, "seed": seed, "step": entry.step}
                self._json_line(line | {name: _plain(x[s]) for name, x in entry.values.items()})
        if record.time:
            self._json_line({"kind": "time", "step": record.step, **record.time})

    def _csv_line(self, values: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        self._append("eval.csv", text.getvalue())

    def _json_line(self, values: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", json.dumps(values, allow_nan=False) + "\n")

    def _append(self, name: str, text: str) -> None:
        file = self._files[name]
        try:
            file.write(text.encode())
            file.flush()
        except OSError as error:
            raise UsageError(f"--out: {name} cannot be written ({error.strerror})") from None

    def offsets(self) -> dict[str, int]:
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class TensorBoard:
    """Event files in `tensorboard/`, a scalar a row and value."""

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        from tensorboardX import SummaryWriter  # slow to import

        self._rows = row_names(config)
        # What an earlier start wrote from this step on is void. A checkpoint comes after the
        # evaluation of its step, so what was written at that step stays.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=step + 1 if offsets else step,
            filename_suffix=f".{step:09d}",  # two starts within a second have a file each
        )

    def write(self, record: Record) -> None:
        for entry in record.entries:
            for name, value in _scalars(self._rows, entry).items():
                self._writer.add_scalar(name, value, entry.step)

    def offsets(self) -> dict[str, int]:
        self._writer.flush()
        return {}

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project dynajax, which a resume goes on with: its id is in `wandb-id`.

    W&B takes no step below one that it has. So entries must come in the order of steps; those that
    a resume repeats are there already, with the same values.

    Raises:
      UsageError: wandb is not installed, or it cannot start a run.
    """

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "--wandb: install the extra first: pip install 'dynajax[wandb]'"
            ) from None
        self._rows = row_names(config)
        path = folder / "wandb-id"
        if not path.exists():
            write_atomically(path, secrets.token_hex(4).encode())
        try:
            self._run = wandb.init(
                project="dynajax",
                dir=str(folder),
                name=folder.name,
                id=path.read_text(),
                resume="allow",
                config=as_dict(config),
                allow_val_change=True,  # a resumed run may have more steps
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--wandb: no run can be started ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None

    def write(self, record: Record) -> None:
        for entry in record.entries:
            self._run.log(_scalars(self._rows, entry), step=entry.step)

    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._run.finish()


#: Every logger by name. A new one is a class of the form `Logger`, and an entry here.
LOGGERS: dict[str, type[Logger]] = {
    "files": Files,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
#: Those of every run.
DEFAULT = ("files", "tensorboard")


class Loggers:
    """The loggers of one run.

    `offsets` belong into a checkpoint; `Loggers` made with them cuts the files back to it, so a
    resumed run's files are those of an uninterrupted one but for times.

    Args:
      folder, config, step, offsets: see `Logger`.
      names: which of `LOGGERS`; none in a process that leaves the writing to another.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        step: int,
        offsets: Mapping[str, int],
        names: Sequence[str] = DEFAULT,
    ) -> None:
        self._loggers = [LOGGERS[name](folder, config, step, offsets) for name in names]

    def write(
        self,
        step: int,
        fits: Sequence[tuple[int, Mapping[str, Any]]] = (),
        learn: Mapping[str, Any] | None = None,
        evaluation: Evaluation | None = None,
        time: Mapping[str, Any] | None = None,
    ) -> None:
        """Logs what has happened until an environment step, in the order of steps.

        Args:
          step: the environment steps done.
          fits: the step of each fit since the last call, and its figures, arrays (S,).
          learn: figures of learning, arrays (S,).
          evaluation: of all S rows.
          time: figures of the whole run.
        """
        entries = [_entry(at, "fit", metrics) for at, metrics in fits]
        entries.sort(key=lambda entry: entry.step)
        if learn:
            entries.append(_entry(step, "learn", learn))
        if evaluation is not None:
            entries.append(_entry(step, "evaluation", {"return": np.mean(evaluation.returns, 1)}))
        record = Record(step, entries, evaluation, time)
        for logger in self._loggers:
            logger.write(record)

    def offsets(self) -> dict[str, int]:
        """The files' lengths in bytes, all of it on disk."""
        return {name: size for logger in self._loggers for name, size in logger.offsets().items()}

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def _entry(step: int, kind: str, values: Mapping[str, Any]) -> Entry:
    return Entry(step, kind, {name: np.asarray(value) for name, value in values.items()})


def _scalars(rows: Sequence[tuple[str, int]], entry: Entry) -> dict[str, float]:
    """The finite scalars of an entry, such as "none/1/learn/critic_loss"."""
    scalars = {
        f"{variant}/{seed}/{entry.kind}/{name}": _plain(values[s])
        for s, (variant, seed) in enumerate(rows)
        for name, values in entry.values.items()
        if values.ndim == 1
    }
    return {name: value for name, value in scalars.items() if value is not None}


def _plain(value: Any) -> Any:
    """A number as JSON has it, null where it is not finite; of several four digits are enough."""
    if np.ndim(value):
        return [None if (x := _plain(v)) is None else float(f"{x:.4g}") for v in value]
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
