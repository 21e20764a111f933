"""Measure what a model can learn of a task before training, or what went wrong in a run.

  dynajax diagnose --env=humanoid-stand
  dynajax diagnose --run=runs/cheetah-run-mbpo-...

With --env it collects random transitions, fits small models with every fix, and measures which
parts of the task they learn. --data=FOLDER does the same with the replay buffer of a run. With
--run it compares the predictions of a run's critic and model with the simulator. Writes a report.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from dynajax import envs, report
from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.diagnose import data, fits, loaded_run, offline, offline_report, online, online_report
from dynajax.models import targets
from dynajax.report import html
from dynajax.runs.directory import expand_user, make_writable
from dynajax.runs.progress import duration
from dynajax.types import EnvSpec, UsageError
from dynajax.xla import backend

FLAGS = flags.FLAGS
shared.define_env(None, "The task to diagnose: DOMAIN-TASK, or [module:]Name-v0.")
flags.DEFINE_string(
    "data", None, "A run's folder, whose replay buffer is used instead of random transitions."
)
flags.DEFINE_string("run", None, "A run's folder, whose critic and model are diagnosed.")
shared.define_fixes("Repeat for several. By default each fix, and scale with others.")
flags.DEFINE_integer("transitions", 12_000, "Real transitions for each seed.", lower_bound=600)
flags.DEFINE_integer(
    "repeat",
    1,
    "Frames per action of --env. The presets quick, medium and modern train with 2.",
    lower_bound=1,
)
shared.define_seeds(3, "Number of seeds of data, holdout split and initial weights.", lower_bound=1)
shared.define_seed("The first seed.", lower_bound=0)
shared.define_out(None, "The report's folder. By default diagnosis/NAME.")

#: Flags that have no effect on what is diagnosed.
_UNUSED = {
    "env": (),
    "data": ("repeat",),
    "run": ("repeat", "fix", "transitions", "seeds", "seed"),
}
#: The shortest replay buffer that can be diagnosed.
_MIN_TRANSITIONS = 600


def diagnose_task(command: str) -> None:
    """Diagnose a task before training, from random transitions or from a run's replay buffer."""
    begin = time.perf_counter()
    fixes = [",".join(targets.parse_fixes(fix)) or "none" for fix in FLAGS.fix or fits.FIX_SETS]
    for fix in fixes:
        if fixes.count(fix) > 1:
            raise UsageError(f"--fix={fix}: it is given twice")
    if FLAGS.out is not None:
        # Find out that the folder cannot be written before minutes are spent on the measurement.
        make_writable(out := expand_user(FLAGS.out), f"--out={out}")
    spec, recordings, source = _recordings()
    if FLAGS.out is None:
        out = Path("diagnosis", re.sub("[:/]", ".", spec.name))
        make_writable(out, f"--out={out}")
    size = min(len(r.episode) for r in recordings)
    print(
        f"{spec.name}: {len(fixes)} combinations of fixes x {len(recordings)} seeds, "
        f"{size:,} transitions each, after {duration(time.perf_counter() - begin)}",
        flush=True,
    )
    fitting = time.perf_counter()

    def progress(rounds: int) -> None:
        nonlocal fitting
        if rounds == 1:  # the first round compiles
            fitting = time.perf_counter()
            print(f"compiled in {duration(fitting - begin)}", flush=True)
        elif rounds == 2:
            left = (time.perf_counter() - fitting) * (fits.ROUNDS - rounds)
            print(f"fitting: about {duration(left)} left", flush=True)

    result = offline.measure(
        spec, recordings, fixes, source=source, seed=FLAGS.seed, progress=progress
    )
    with _checked_out(out):
        lines = offline_report.write(result, out, command)
    _print(lines, begin, out)


def _recordings() -> tuple[EnvSpec, list[data.Recording], str]:
    """Return the task, the transitions of each seed, and a description of their source."""
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    if FLAGS.data is None:
        if envs.is_device_only(FLAGS.env):
            raise UsageError(
                f"--env={FLAGS.env}: this task has no simulator on the host; diagnose the replay "
                "buffer of a run (--data=FOLDER)"
            )
        repeat = FLAGS.repeat
        spec = envs.spec(FLAGS.env, repeat=repeat)
        recordings = [data.collect(spec, FLAGS.transitions, seed, repeat=repeat) for seed in seeds]
        frames = f"{repeat} frame{'s' * (repeat > 1)} per action"
        return spec, recordings, f"Random policy, half white and half correlated actions, {frames}"
    reader = loaded_run.Reader(expand_user(FLAGS.data))
    loaded = reader.load(reader.steps[-1])
    # With fewer learners than seeds some are used twice; the split, the initial weights and the
    # minibatches differ nevertheless.
    learners = [seed % reader.config.num_learners for seed in range(FLAGS.seeds)]
    recordings = [
        data.last(loaded_run.recording(loaded, learner), FLAGS.transitions) for learner in learners
    ]
    if min(len(r.episode) for r in recordings) < _MIN_TRANSITIONS:
        raise UsageError(
            f"--data={FLAGS.data}: its replay buffer has fewer than {_MIN_TRANSITIONS} transitions"
        )
    return reader.spec, recordings, f"The replay buffer of {FLAGS.data} at step {loaded.step:,}"


def diagnose_run(command: str) -> None:
    """Diagnose the critic and the model of a run."""
    begin = time.perf_counter()
    folder = expand_user(FLAGS.run)
    reader = loaded_run.Reader(folder)
    if envs.is_device_only(reader.config.env):
        raise UsageError(
            f"--run={FLAGS.run}: its task {reader.config.env} has no simulator on the host to compare "
            "with; --data takes its replay buffer"
        )
    out = expand_user(FLAGS.out) if FLAGS.out else folder / "diagnosis"
    make_writable(out, f"--out={out}")
    findings = []
    for step in reader.steps:
        loaded = reader.load(step)
        for learner in range(reader.config.num_learners):
            findings.append(online.inspect(loaded, learner))
            print(
                f"step {step:,}, {findings[-1].variant}, seed {findings[-1].seed}: "
                f"{duration(time.perf_counter() - begin)}",
                flush=True,
            )
    with _checked_out(out):
        lines = online_report.write(findings, reader.config, reader.spec, out, command)
    _add_to_run(findings, folder)
    _print(lines, begin, out)


def _add_to_run(findings: Sequence[online.Findings], folder: Path) -> None:
    """Add the findings to the logs and the report of a run, or print why they are left alone."""
    left = "its logs and its report are left as they are"
    try:
        if not online_report.add_to_logs(findings, folder):
            print(f"the run is still training, so {left}")
            return
        left = "its report is left as it is"
        report.write_report(folder)
    except OSError as error:
        print(f"the run's folder {folder} cannot be written ({error.strerror}), so {left}")


@contextlib.contextmanager
def _checked_out(out: Path) -> Iterator[None]:
    """Turn an error while writing into a `UsageError` about --out."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


def _print(lines: Sequence[str], begin: float, out: Path) -> None:
    print("\n".join(html.plain_text(line) for line in lines))
    print(f"{duration(time.perf_counter() - begin)}; report: {out / 'diagnosis.html'}")


def main(arguments: Sequence[str]) -> None:
    """Diagnose a task or a run."""
    common.refuse_arguments(arguments)
    subjects = [name for name in ("env", "data", "run") if FLAGS[name].value is not None]
    if len(subjects) != 1:
        problem = (
            f"--{' and --'.join(subjects)} exclude each other"
            if subjects
            else "there is nothing to diagnose"
        )
        raise UsageError(f"{problem}: give one of --env=TASK, --data=FOLDER or --run=FOLDER")
    common.refuse_flags(_UNUSED[subjects[0]], f"with --{subjects[0]}")
    common.start()
    backend.local_devices()  # in one line if there is none
    (diagnose_run if subjects == ["run"] else diagnose_task)(common.command_line())
