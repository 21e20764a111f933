"""Measures what synthetic data can be of a task, before training or of a run, on one page.

  dynajax diagnose --env=humanoid-stand
  dynajax diagnose --run=runs/cheetah-run-mbpo-...

With --env it collects random transitions, fits small models under every fix, and measures which
parts of the task they learn. --data=FOLDER takes a run's replay for that. With --run it asks a run's
critic and model where they are wrong, and the simulator for the truth.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from dynajax import envs, report
from dynajax.cli import common
from dynajax.diagnose import data, fits, loaded_run, offline, offline_report, online, online_report
from dynajax.models import targets
from dynajax.report import html
from dynajax.runs.progress import duration
from dynajax.types import EnvSpec, UsageError

FLAGS = flags.FLAGS
flags.DEFINE_string("env", None, "A task to diagnose: DOMAIN-TASK, or [module:]Name-v0.")
flags.DEFINE_string("data", None, "A run's folder, whose replay takes the random policy's place.")
flags.DEFINE_string("run", None, "A run's folder, to diagnose its critic and its model.")
flags.DEFINE_multi_string("fix", [], "Comma list; repeat for more. All sensible ones by default.")
flags.DEFINE_integer("transitions", 12_000, "Real transitions for each seed.", lower_bound=600)
flags.DEFINE_integer("seeds", 3, "Seeds: data, split and weights of their own.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
flags.DEFINE_string("out", None, "The page's folder; diagnosis/NAME by default.")


def before(command: str) -> None:
    """The diagnosis before training."""
    begin = time.perf_counter()
    codes = [",".join(targets.parse_fixes(fix)) or "none" for fix in FLAGS.fix or fits.FIX_SETS]
    for code in codes:
        if codes.count(code) > 1:
            raise UsageError(f"--fix={code}: it stands there twice")
    if FLAGS.out is not None:
        # Before the minutes that it takes.
        with _written(out := common.folder(FLAGS.out)):
            out.mkdir(parents=True, exist_ok=True)
    spec, recordings, source = _recordings()
    out = common.folder(FLAGS.out or f"diagnosis/{re.sub('[:/]', '.', spec.name)}")
    size = min(len(r.episode) for r in recordings)
    print(
        f"{spec.name}: {len(codes)} codes x {len(recordings)} seeds, {size:,} transitions each, "
        f"after {duration(time.perf_counter() - begin)}",
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
        spec, recordings, codes, source=source, seed=FLAGS.seed, progress=progress
    )
    with _written(out):
        lines = offline_report.write(result, out, command)
    _print(lines, begin, out)


def _recordings() -> tuple[EnvSpec, list[data.Recording], str]:
    """The task, what happened in it for every seed, and where that comes from."""
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    if FLAGS.data is None:
        if FLAGS.env.startswith("brax:"):
            raise UsageError(
                f"--env={FLAGS.env}: Brax's tasks have no simulator on the host; diagnose the "
                "replay of a run (--data=FOLDER)"
            )
        spec = envs.spec(FLAGS.env)
        recordings = [data.collect(spec, FLAGS.transitions, seed) for seed in seeds]
        return spec, recordings, "Random policy, half white and half correlated actions"
    reader = loaded_run.Reader(common.folder(FLAGS.data))
    loaded = reader.load(reader.steps[-1])
    # A run with fewer rows gives some of them twice: split, weights and minibatches still differ.
    rows = [row % reader.config.num_learners for row in range(FLAGS.seeds)]
    recordings = [data.last(loaded_run.recording(loaded, row), FLAGS.transitions) for row in rows]
    if min(len(r.episode) for r in recordings) < 600:
        raise UsageError(f"--data={FLAGS.data}: its replay has fewer than 600 transitions yet")
    return reader.spec, recordings, f"The replay of {FLAGS.data} at step {loaded.step:,}"


def after(command: str) -> None:
    """The diagnosis of a run."""
    begin = time.perf_counter()
    reader = loaded_run.Reader(common.folder(FLAGS.run))
    if reader.config.env.startswith("brax:"):
        raise UsageError(
            f"--run={FLAGS.run}: Brax's tasks have no simulator on the host to ask; --data takes "
            "its replay"
        )
    out = common.folder(FLAGS.out or f"{FLAGS.run}/diagnosis")
    findings = []
    for step in reader.steps:
        loaded = reader.load(step)
        for row in range(reader.config.num_learners):
            findings.append(online.inspect(loaded, row))
            print(
                f"step {step:,}, {findings[-1].variant}, seed {findings[-1].seed}: "
                f"{duration(time.perf_counter() - begin)}",
                flush=True,
            )
    with _written(out):
        lines = online_report.write(findings, reader.config, reader.spec, out, command)
        if online_report.add_to_logs(findings, common.folder(FLAGS.run)):
            report.write_report(FLAGS.run)
        else:
            print("the run is under way, so its logs and its report are left as they are")
    _print(lines, begin, out)


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


def _print(lines: Sequence[str], begin: float, out: Path) -> None:
    print("\n".join(html.plain_text(line) for line in lines))
    print(f"{duration(time.perf_counter() - begin)}; page: {out / 'diagnosis.html'}")


def main(argv: Sequence[str]) -> None:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    subjects = [name for name in ("env", "data", "run") if FLAGS[name].value is not None]
    if len(subjects) != 1:
        text = (
            f"--{' and --'.join(subjects)} are two things" if subjects else "say what to diagnose"
        )
        raise UsageError(f"{text}: give one of --env=TASK, --data=FOLDER or --run=FOLDER")
    common.start()
    after(common.command()) if subjects == ["run"] else before(common.command())
