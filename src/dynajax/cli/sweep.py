"""Complete every run of a study file, on this machine or on a cluster.

  dynajax sweep launch/studies/tiny.toml

After an interruption the same command resumes the study; it does nothing once all runs are done.
--status shows the progress of a study, from any shell that sees its folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

import dynajax
from dynajax import report
from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.config import as_dict
from dynajax.launch import backends, status, study
from dynajax.launch.job import Job
from dynajax.runs.directory import check_resumable, expand_user
from dynajax.runs.lock import try_lock
from dynajax.runtime import exit_status
from dynajax.types import UsageError

FLAGS = flags.FLAGS
#: Name of the copy of the study file in the study's folder.
COPY = "study.toml"
shared.define_choice(
    "on",
    "here",
    ["here", "ray", "slurm", "submitit"],
    "Where the runs are executed: here, ray, slurm, or submitit, which tests the path of slurm on this "
    "machine.",
)
flags.DEFINE_integer("parallel", 1, "Runs at a time, with --on=here and --on=submitit.", 1)
shared.define_out(
    None,
    "The study's folder. By default runs/NAME-OF-THE-STUDY, or the folder of the study file if it is "
    "the copy that a study has in its folder.",
)
flags.DEFINE_integer(
    "attempts", 3, "Consecutive starts without progress after which a run has failed.", 1
)
flags.DEFINE_string("address", "auto", "Address of the Ray cluster, with --on=ray.")
flags.DEFINE_bool("status", False, "Only show the progress of the study.")


def main(arguments: Sequence[str]) -> int:
    """Run a study and compare its runs, or show its progress."""
    if len(arguments) != 1:
        raise UsageError("name one study file, such as launch/studies/tiny.toml")
    _refuse_unused_flags()
    # The accelerator is left to the runs. This setting does not reach their environment.
    jax.config.update("jax_platforms", "cpu")
    if (script := _find_script("run")) is not None:
        # run.py imports modules from its folder, so the study's tasks may be there.
        sys.path.insert(0, str(script.parent))
    path = expand_user(arguments[0])
    plan = study.load(path)
    out = Path("runs") / plan.name
    if _is_copy(path):
        out = path.absolute().parent
        plan = plan._replace(name=out.name)
    out = (expand_user(FLAGS.out) if FLAGS.out else out).absolute()
    for run in plan.runs:
        check_resumable(out / run.name, as_dict(run.config))
    statuses = [status.run_status(run, out) for run in plan.runs]
    if FLAGS.status:
        print(status.table(statuses))
        return 0
    unfinished = [s.name for s in statuses if s.state != "done"]
    if unfinished:
        _execute(plan, path, unfinished, out)
        statuses = [status.run_status(run, out) for run in plan.runs]
    print(status.table(statuses))
    states = {s.state for s in statuses}
    if states == {"done"}:
        if not unfinished:
            print("nothing to do: every run is done")
        return _compare([out / s.name for s in statuses], out)
    if "failed" in states:
        print(
            f"the output of a run is in {out / 'launch'}/NAME.log; correct what it reports, or "
            f"delete {out}/NAME to restart that run, then run the same command again"
        )
        return 1
    print("interrupted; the same command resumes the study")
    return exit_status.INTERRUPTED


def _refuse_unused_flags() -> None:
    """Refuse flags that have no effect with --status, or where --on starts the runs."""
    if FLAGS.status:
        common.refuse_flags(
            ("on", "parallel", "attempts", "address"), "with --status, which starts no run"
        )
    if FLAGS.on in ("ray", "slurm"):
        common.refuse_flags(
            ("parallel",),
            f"with --on={FLAGS.on}, which starts as many runs as the cluster has room for",
        )
    if FLAGS.on != "ray":
        common.refuse_flags(("address",), "without --on=ray")


def _is_copy(path: Path) -> bool:
    """Return whether a study file is the copy in a study's folder."""
    # The lock distinguishes the folder from one that contains another `launch`, such as a clone.
    return path.name == COPY and (path.parent / "launch" / "lock").exists()


def _execute(plan: study.Study, path: Path, names: Sequence[str], out: Path) -> None:
    """Execute the named runs of a study until each is done, has failed or is interrupted."""
    runs = [run for run in plan.runs if run.name in names]
    # First, so that a cluster that cannot be used is refused before anything is written.
    progress = _start([_make_job(run, out) for run in runs], plan, out)
    with _locked(out):
        with contextlib.suppress(shutil.SameFileError):  # started from its own copy
            shutil.copyfile(path, out / COPY)
        for name in names:
            status.write_note(out, name, state="queued", on=FLAGS.on, attempts=0, message="")
        print(
            f"{plan.name}: {len(names)} of {len(plan.runs)} runs to do in {out}; the output of each "
            "is in launch/NAME.log there",
            flush=True,
        )
        _print_progress(progress, runs, out)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of the study's folder.

    Raises:
      UsageError: another launcher holds it, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            (out / "launch").mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(out / "launch" / "lock", "a"))
        except OSError as error:
            raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
        if not try_lock(lock):
            raise UsageError(
                f"--out={out}: another `dynajax sweep` is running this study; --status shows its progress"
            )
        yield


def _make_job(run: study.StudyRun, out: Path) -> Job:
    program = _program("run", "train")
    return Job(run.name, run.flags, str(out), program, os.getcwd(), FLAGS.attempts)


def _find_script(name: str) -> Path | None:
    """Return a script of `experiments/` if this program is a script of the same clone."""
    if Path(sys.argv[0]).suffix != ".py":
        return None
    script = Path(sys.argv[0]).resolve().parents[1] / "experiments" / f"{name}.py"
    return script if script.exists() else None


def _program(script: str, command: str) -> tuple[str, ...]:
    """Return the arguments of `python` that start another command the way this one was started."""
    path = _find_script(script)
    return ("-m", "dynajax", command) if path is None else (str(path),)


def _start(jobs: Sequence[Job], plan: study.Study, out: Path) -> Iterator[None]:
    """Start jobs where --on says; see `backends`."""
    if FLAGS.on == "here":
        return backends.local(jobs, FLAGS.parallel)
    if FLAGS.on == "ray":
        return backends.ray_cluster(jobs, plan, FLAGS.address)
    return backends.scheduler(FLAGS.on, jobs, plan, out, FLAGS.parallel)


def _print_progress(progress: Iterator[None], runs: Sequence[study.StudyRun], out: Path) -> None:
    """Print a line whenever a run starts, evaluates, ends, or starts again."""
    relays = [Relay(run, out) for run in runs]
    for _ in progress:
        for relay in relays:
            relay.print_news()
    for relay in relays:
        relay.print_news()


class Relay:
    """Print what happens to one run of a study, as read from its folders on any machine."""

    def __init__(self, run: study.StudyRun, out: Path) -> None:
        self._run, self._out = run, out
        self._state = ("queued", 0)
        self._size = self._eval_size()  # of the evaluations that were read
        self._step = status.run_status(run, out).step  # of the last one that was printed

    def print_news(self) -> None:
        """Print the evaluations since the last call, and the state if it has changed."""
        note = status.read_note(self._out, self._run.name)
        state = note.get("state", "queued"), note.get("attempts", 0)
        began = state != self._state and state[0] == "running"
        if began:
            self._print_state(state, note)
        if (size := self._eval_size()) != self._size:
            self._size = size
            self._print_evaluations()
        if state != self._state and not began:
            self._print_state(state, note)
        self._state = state

    def _eval_size(self) -> int:
        try:
            return (self._out / self._run.name / "eval.csv").stat().st_size
        except OSError:
            return 0

    def _print_state(self, state: tuple[str, int], note: dict[str, Any]) -> None:
        start = f", start {state[1]}" if state[1] > 1 else ""
        message = f" ({note['message']})" if note.get("message") else ""
        print(f"{self._run.name}: {state[0]}{start}{message}", flush=True)

    def _print_evaluations(self) -> None:
        try:
            results = report.read_run(self._out / self._run.name)
        except UsageError:  # its config.json is being replaced
            return
        for index, step in enumerate(results.steps.tolist()):
            if step > self._step:
                self._step = step
                means = status.mean_returns(results, index)
                print(
                    f"{self._run.name}: step {step:,} of {self._run.config.steps:,}, return "
                    f"{status.format_returns(means)}",
                    flush=True,
                )


def _compare(folders: Sequence[Path], out: Path) -> int:
    """Write the study's figures and table unless they show these very results; print the table."""
    table, drawn = out / "table.md", out / "launch" / "drawn.sha256"
    results = _digest(folders)
    if not table.exists() or not drawn.exists() or drawn.read_text() != results:
        command = [sys.executable, *_program("plot", "plot"), *map(str, folders)]
        done = subprocess.run([*command, f"--out={out}"], stdout=subprocess.DEVNULL)
        if done.returncode:
            return done.returncode
        drawn.parent.mkdir(exist_ok=True)
        drawn.write_text(results)
    print(table.read_text(), end="")
    print(f"figures: {out / 'headline.png'}, {out / 'comparison.png'}")
    return 0


def _digest(folders: Sequence[Path]) -> str:
    """Return a digest of what the figures show: the runs, and their settings and evaluations."""
    digest = hashlib.sha256(dynajax.__version__.encode())
    for folder in folders:
        settings = json.loads((folder / "config.json").read_text())["config"]
        digest.update(f"\n{folder.name} {json.dumps(settings)}\n".encode())
        digest.update((folder / "eval.csv").read_bytes())
    return digest.hexdigest()
