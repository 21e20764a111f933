"""Runs a study: every run of a study file, here or on a cluster, until all of them are done.

  dynajax sweep launch/studies/tiny.toml

The same command goes on after an interruption, and does nothing when all is done. --status shows
how far a study is, from any shell that sees its folder.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from dynajax import UsageError
from dynajax.cli import common
from dynajax.config import as_dict
from dynajax.launch import backends, status, study
from dynajax.launch.job import Job
from dynajax.runs.directory import check_resumable
from dynajax.runtime import exit_status

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "on",
    "here",
    ["here", "ray", "slurm", "submitit"],
    "Where the runs go; submitit is slurm's way, tried on this machine.",
)
flags.DEFINE_integer("parallel", 1, "Runs at once, with --on=here and --on=submitit.", 1)
flags.DEFINE_string("out", None, "The study's folder; runs/NAME-OF-THE-STUDY by default.")
flags.DEFINE_integer("attempts", 3, "Starts in a row without progress until a run failed.", 1)
flags.DEFINE_string("address", "auto", "Of the Ray cluster.")
flags.DEFINE_bool("status", False, "Only show how far the study is.")


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("name one study file, such as launch/studies/tiny.toml")
    # The accelerator is for the runs. (Their environment does not know of this line.)
    jax.config.update("jax_platforms", "cpu")
    if (script := _script("run")) is not None:
        sys.path.insert(0, str(script.parent))  # where run.py finds modules with own tasks, too
    path = common.folder(arguments[0])
    plan = study.load(path)
    out = (common.folder(FLAGS.out) if FLAGS.out else Path("runs") / plan.name).absolute()
    for run in plan.runs:
        check_resumable(out / run.name, as_dict(run.config))
    if FLAGS.status:
        print(status.table(status.look(run, out) for run in plan.runs))
        return 0

    rows = [status.look(run, out) for run in plan.runs]
    todo = [row.name for row in rows if row.state != "done"]
    if todo:
        with _alone(out):
            with contextlib.suppress(shutil.SameFileError):  # started from its own copy
                shutil.copyfile(path, out / "study.toml")
            for name in todo:
                status.write_note(out, name, state="queued", attempts=0, message="")
            print(f"{plan.name}: {len(todo)} of {len(rows)} runs to do in {out}", flush=True)
            jobs = [_job(run, out) for run in plan.runs if run.name in todo]
            _watch(_place(jobs, plan, out), todo, out)
        rows = [status.look(run, out) for run in plan.runs]
    print(status.table(rows))
    states = {row.state for row in rows}
    if states == {"done"}:
        if not todo:
            print("nothing to do: every run is done")
        return _compare([out / row.name for row in rows], out)
    if "failed" in states:
        print(
            f"the output of a run is in {out / 'launch'}/NAME.log; put right what it says, or delete "
            f"{out}/NAME to begin that run anew, and the same command tries again"
        )
        return 1
    print("interrupted; the same command goes on")
    return exit_status.INTERRUPTED


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the study's folder for this launcher."""
    with contextlib.ExitStack() as stack:
        try:
            (out / "launch").mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(out / "launch" / "lock", "a"))
        except OSError as error:
            raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"--out={out}: another sweep.py is at work on it; --status shows how far it is"
            ) from None
        yield


def _job(run: study.StudyRun, out: Path) -> Job:
    program = _program("run", "train")
    return Job(run.name, run.flags, str(out), program, os.getcwd(), FLAGS.attempts)


def _script(name: str) -> Path | None:
    """A script of `experiments/`, where this program is one of the same clone."""
    if Path(sys.argv[0]).suffix != ".py":
        return None
    script = Path(sys.argv[0]).resolve().parents[1] / "experiments" / f"{name}.py"
    return script if script.exists() else None


def _program(script: str, command: str) -> tuple[str, ...]:
    """What comes after `python` to start another command in the way that this one was started."""
    path = _script(script)
    return ("-m", "dynajax", command) if path is None else (str(path),)


def _place(jobs: Sequence[Job], plan: study.Study, out: Path) -> Iterator[None]:
    if FLAGS.on == "here":
        return backends.here(jobs, FLAGS.parallel)
    if FLAGS.on == "ray":
        return backends.ray_cluster(jobs, plan, FLAGS.address)
    return backends.scheduler(FLAGS.on, jobs, plan, out, FLAGS.parallel)


def _watch(progress: Iterator[None], names: Sequence[str], out: Path) -> None:
    """Prints a line whenever a run begins, ends, or begins again."""
    shown = dict.fromkeys(names, ("queued", 0))
    for _ in progress:
        _changes(shown, out)
    _changes(shown, out)


def _changes(shown: dict[str, tuple[str, int]], out: Path) -> None:
    for name, before in shown.items():
        note = status.read_note(out, name)
        current = note.get("state", "queued"), note.get("attempts", 0)
        if current != before:
            shown[name] = current
            again = f", start {current[1]}" if current[1] > 1 else ""
            message = f" ({note['message']})" if note.get("message") else ""
            print(f"{name}: {current[0]}{again}{message}", flush=True)


def _compare(folders: Sequence[Path], out: Path) -> int:
    """The study's figure and table, unless they are newer than every run."""
    latest = max((folder / "eval.csv").stat().st_mtime for folder in folders)
    table = out / "table.md"
    if not table.exists() or table.stat().st_mtime < latest:
        command = [sys.executable, *_program("plot", "plot"), *map(str, folders)]
        done = subprocess.run([*command, f"--out={out}"], stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode
    print(table.read_text(), end="")
    print(f"figures: {out / 'headline.png'}, {out / 'comparison.png'}")
    return 0
