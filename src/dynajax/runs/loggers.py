"""Loggers of a run: `eval.csv` and `metrics.jsonl`, TensorBoard, Weights & Biases."""

import contextlib
import csv
import io
import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dynajax.config import Config, as_dict
from dynajax.runs.directory import write_atomically
from dynajax.types import Evaluation, UsageError, finite_statistics


def learner_names(config: Config) -> list[tuple[str, int]]:
    """Return (variant, seed) of each of the S learners."""
    return [(config.variants[index].name, seed) for index, seed in config.variant_seed_pairs]


class Entry(NamedTuple):
    """Metrics of one agent step."""

    step: int
    kind: str  # "fit", "learn" or "evaluation"
    values: Mapping[str, np.ndarray]  # by name, (S,) or per dimension (S, D)


class Record(NamedTuple):
    """Everything that one call of `Loggers.write` passes to each logger."""

    step: int
    entries: Sequence[Entry]  # in the order of steps; the evaluation comes last
    evaluation: Evaluation | None
    frames: np.ndarray | None  # (S,) simulator steps so far, with an evaluation
    time: Mapping[str, Any] | None


class Logger(Protocol):
    """Interface of a logger. A new one is created whenever a run starts or resumes.

    Args:
      folder: run directory.
      config: configuration of the run.
      step: agent steps done so far.
      offsets: result of `offsets` when the checkpoint was saved; empty for a new run.
    """

    def __init__(
        self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]
    ) -> None: ...

    def write(self, record: Record) -> None:
        """Write everything that happened since the previous call."""

    def offsets(self) -> dict[str, int]:
        """Flush everything to disk and return the sizes and checksums of files to truncate."""

    def close(self) -> None:
        """Release all resources."""


class Files:
    """Write `eval.csv` and `metrics.jsonl`.

    `eval.csv` has one line per learner and evaluation, `metrics.jsonl` one line per learner and
    entry. A resumed run truncates them to the sizes in `offsets`, once it is known that both begin
    with what was written.

    Raises:
      UsageError: the files are not those that were written, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        self._learners = learner_names(config)
        self._num_episodes = config.eval.episodes
        contents = written_parts(folder, offsets)
        self._files = {}
        for name, (content, is_original) in contents.items():
            if not is_original:
                write_atomically(folder / name, content)
            self._files[name] = open(folder / name, "ab")  # noqa: SIM115 (held until close)
            self._files[name].truncate(len(content))
        self._sizes = {name: len(content) for name, (content, _) in contents.items()}
        self._checksums = {name: zlib.crc32(content) for name, (content, _) in contents.items()}

    def write(self, record: Record) -> None:
        if (result := record.evaluation) is not None:
            assert record.frames is not None
            if not self._sizes["eval.csv"]:
                episodes = [f"return_{k}" for k in range(self._num_episodes)]
                columns = ["variant", "seed", "step", "frames"]
                self._csv_line([*columns, "return_mean", "return_std", "length_mean", *episodes])
            statistics = *finite_statistics(result.returns), np.mean(result.lengths, 1)
            for (variant, seed), frames, returns, *moments in zip(
                self._learners, record.frames, result.returns, *statistics, strict=True
            ):
                steps = record.step, int(frames)
                self._csv_line([variant, seed, *steps, *map(float, [*moments, *returns])])
        for entry in record.entries:
            if entry.kind == "evaluation":
                continue
            for s, (variant, seed) in enumerate(self._learners):
                line = {"kind": entry.kind, "variant": variant, "seed": seed, "step": entry.step}
                self._json_line(line | {name: _to_json(x[s]) for name, x in entry.values.items()})
        if record.time:
            self._json_line({"kind": "time", "step": record.step, **record.time})

    def _csv_line(self, values: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        self._append("eval.csv", text.getvalue())

    def _json_line(self, values: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", json.dumps(values, allow_nan=False) + "\n")

    def _append(self, name: str, text: str) -> None:
        file, data = self._files[name], text.encode()
        try:
            opened = os.fstat(file.fileno())
            if (
                not os.path.samestat(opened, os.stat(file.name))
                or opened.st_size != self._sizes[name]
            ):
                raise UsageError(
                    f"{file.name}: another program changed the file during the run; start the same "
                    "command again, which resumes from the last checkpoint"
                )
            file.write(data)
            file.flush()
            self._sizes[name] += len(data)
            self._checksums[name] = zlib.crc32(data, self._checksums[name])
        except OSError as error:
            raise UsageError(f"--out: {name} cannot be written ({error.strerror})") from None

    def offsets(self) -> dict[str, int]:
        for file in self._files.values():
            os.fsync(file.fileno())
        checksums = {name + _CHECKSUM: value for name, value in self._checksums.items()}
        return self._sizes | checksums

    def close(self) -> None:
        for file in self._files.values():
            file.close()


#: Suffix of the names of checksums in `Files.offsets`.
_CHECKSUM = " crc32"


def written_parts(folder: Path, offsets: Mapping[str, int]) -> dict[str, tuple[bytes, bool]]:
    """Return the result of `_written_part` for each of the files that `Files` writes.

    Raises:
      UsageError: a file is not the one that was written.
    """
    return {
        name: _written_part(folder / name, offsets.get(name, 0), offsets.get(name + _CHECKSUM, 0))
        for name in ("eval.csv", "metrics.jsonl")
    }


def _written_part(path: Path, size: int, checksum: int) -> tuple[bytes, bool]:
    """Return the first `size` bytes of a log as they were written, and whether the file has them.

    Other line ends, a byte order mark and a missing last line end, as editors write them, are
    corrected.

    Args:
      checksum: of these bytes.

    Raises:
      UsageError: the file has other content.
    """
    if not size:
        return b"", True
    original = path.read_bytes() if path.exists() else b""
    plain = original.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n") + b"\n"
    for content in (original, plain):
        part = content[:size]
        if len(part) == size and zlib.crc32(part) == checksum:
            return part, content is original
    change = "is shorter than" if len(original) < size else "has other content than"
    raise UsageError(
        f"--out={path.parent}: {path.name} {change} when the checkpoint was saved; restore it, or "
        "choose another folder"
    )


class TensorBoard:
    """Write event files in `tensorboard/`, with one scalar per learner and metric."""

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        from tensorboardX import SummaryWriter  # slow to import

        self._learners = learner_names(config)
        # Purge events that were written after the checkpoint. Events at the step of the checkpoint
        # stay, because a checkpoint is saved after the evaluation of its step.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"),
            purge_step=step + 1 if offsets else step,
            filename_suffix=f".{step:09d}",  # separate files for two starts within a second
        )

    def write(self, record: Record) -> None:
        for entry in record.entries:
            for name, value in _scalars(self._learners, entry).items():
                self._writer.add_scalar(name, value, entry.step)

    def offsets(self) -> dict[str, int]:
        self._writer.flush()
        return {}

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Log to a run of the project dynajax on Weights & Biases.

    The id of the W&B run is stored in `wandb-id`, so that a resumed run continues it. W&B ignores
    steps lower than the last one, so entries must come in the order of steps. Entries that a
    resumed run repeats are ignored as well; W&B already has them with the same values.

    Raises:
      UsageError: wandb is not installed, or cannot start a run.
    """

    def __init__(self, folder: Path, config: Config, step: int, offsets: Mapping[str, int]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "--wandb: install the extra first: pip install -e '.[wandb]'"
            ) from None
        self._learners = learner_names(config)
        path = folder / "wandb-id"
        run_id = path.read_text() if path.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project="dynajax",
                dir=str(folder),
                name=folder.name,
                id=run_id,
                resume="allow",
                reinit="create_new",  # a run that the caller has open stays open
                config=as_dict(config),
                allow_val_change=True,  # a resumed run may have more steps
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--wandb: cannot start a run ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        write_atomically(path, run_id.encode())

    def write(self, record: Record) -> None:
        for entry in record.entries:
            self._run.log(_scalars(self._learners, entry), step=entry.step)

    def offsets(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._run.finish()


#: All loggers by name. To add one, write a class with the interface `Logger` and add it here.
LOGGERS: dict[str, type[Logger]] = {
    "files": Files,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
#: Loggers that every run uses.
DEFAULT_LOGGERS = ("files", "tensorboard")


class Loggers:
    """Pass metrics to the loggers of a run.

    A checkpoint stores the result of `offsets`. `Loggers` created with these offsets truncates the
    files accordingly, so that the files of a resumed run equal those of an uninterrupted run,
    except for wall times.

    Args:
      folder, config, step, offsets: see `Logger`.
      names: names from `LOGGERS`; empty in processes that do not write logs.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        step: int,
        offsets: Mapping[str, int],
        names: Sequence[str] = DEFAULT_LOGGERS,
    ) -> None:
        self._loggers: list[Logger] = []
        with contextlib.ExitStack() as opened:
            for name in names:
                logger = LOGGERS[name](folder, config, step, offsets)
                self._loggers.append(opened.enter_context(contextlib.closing(logger)))
            self._opened = opened.pop_all()

    def write(
        self,
        step: int,
        fits: Sequence[tuple[int, Mapping[str, Any]]] = (),
        learn: Mapping[str, Any] | None = None,
        evaluation: Evaluation | None = None,
        frames: np.ndarray | None = None,
        time: Mapping[str, Any] | None = None,
    ) -> None:
        """Log the metrics since the previous call, in the order of steps.

        Args:
          step: agent steps done so far.
          fits: step and metrics, arrays (S,), of each model fit since the previous call.
          learn: metrics of the gradient updates, arrays (S,).
          evaluation: evaluation of all S learners.
          frames: (S,) simulator steps so far, needed with an evaluation.
          time: wall times and other metrics of the whole run.
        """
        entries = [_entry(fit_step, "fit", metrics) for fit_step, metrics in fits]
        entries.sort(key=lambda entry: entry.step)
        if learn:
            entries.append(_entry(step, "learn", learn))
        if evaluation is not None:
            entries.append(
                _entry(step, "evaluation", {"return": finite_statistics(evaluation.returns)[0]})
            )
        record = Record(step, entries, evaluation, frames, time)
        for logger in self._loggers:
            logger.write(record)

    def offsets(self) -> dict[str, int]:
        """Flush all files to disk and return their sizes in bytes and their checksums."""
        return {name: size for logger in self._loggers for name, size in logger.offsets().items()}

    def close(self) -> None:
        """Close all loggers."""
        self._opened.close()


def _entry(step: int, kind: str, values: Mapping[str, Any]) -> Entry:
    return Entry(step, kind, {name: np.asarray(value) for name, value in values.items()})


def _scalars(learners: Sequence[tuple[str, int]], entry: Entry) -> dict[str, float]:
    """Return the finite scalars of an entry by name, such as "none/1/learn/critic_loss"."""
    scalars = {
        f"{variant}/{seed}/{entry.kind}/{name}": _to_json(values[s])
        for s, (variant, seed) in enumerate(learners)
        for name, values in entry.values.items()
        if values.ndim == 1
    }
    return {name: value for name, value in scalars.items() if value is not None}


def _to_json(value: Any) -> Any:
    """Return a value that JSON can represent; elements of arrays have four significant digits.

    Numbers that are not finite become None, because JSON has no NaN.
    """
    if np.ndim(value):
        return [None if (x := _to_json(v)) is None else float(f"{x:.4g}") for v in value]
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
