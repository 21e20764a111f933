"""Measure the machine, every stage of training, and a whole environment step.

    dynajax bench
    dynajax bench --env=cheetah-run,humanoid-stand --learners=1,2,4,6 --start --out=bench
    dynajax bench --compare=results/bench/two-cores/bench.csv

Each stage alternates with 256 x 256 x 256 float32 matmuls of NumPy and JAX, so that a change in the
machine's speed affects all three, and its result is printed at once. "x ideal" is the median of a
stage's time over the time that its floating-point operations (`dynajax.profiling.flops`) take at the
rate of the faster matmul. On a GPU or TPU matmuls with the shapes of the networks are measured in
every precision too. The model has the fixes of --algo, or scale,target if it has none. A fit counts
with model.fit_steps gradient steps. With model.epochs or early stopping this is its limit, and the time
of an environment step an upper bound. Writes bench.csv and bench.png into --out.
"""

import csv
import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from dynajax import envs, make_config
from dynajax.algorithms import ALGORITHMS
from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.config import Config
from dynajax.config.presets import PRESETS
from dynajax.profiling import benchmark
from dynajax.profiling.benchmark import Stage, Workload
from dynajax.report import figures
from dynajax.report.figures import Panel
from dynajax.runs.directory import device_name, expand_user, write_atomically
from dynajax.types import UsageError
from dynajax.xla import backend

FLAGS = flags.FLAGS
shared.define_envs("cheetah-run")
flags.DEFINE_list("learners", ["1"], "Numbers of learners in a program, separated by commas.")
shared.define_method()
shared.define_preset("paper")
shared.define_settings()
flags.DEFINE_float(
    "seconds", 2, "Seconds for each stage; at least five rounds are timed.", lower_bound=0.01
)
flags.DEFINE_bool(
    "start", False, "Time the start of a run with an empty and with a filled compilation cache."
)
shared.define_out("bench", "Folder for the table and the figure.")
flags.DEFINE_string("compare", None, "bench.csv of an earlier run, to print ratios to.")
# The task whose start this process times for --start.
flags.DEFINE_string("probe", None, common.INTERNAL)

#: The columns of bench.csv. Times are in ms of one call for all learners, bytes are of one learner.
COLUMNS = (
    "device",
    "jax",
    "precision",
    "algo",
    "agent",
    "trust",
    "preset",
    "env",
    "learners",
    "stage",
    "ms",
    "low",
    "high",
    "gflop",
    "gflops",
    "of_peak",
    "x_ideal",
    "ms_per_step",
    "state_bytes",
    "temporary_bytes",
    "donated",
    "kernels",
    "ring_copies",
)
Line = dict[str, Any]
_PEAK = ("matmul numpy", "matmul jax")
#: Names of stages and columns in tables of older versions.
_RENAMED_STAGES = {"SAC update": "agent update"}
_OLD_LEARNERS = "rows"


class Timing(NamedTuple):
    """The rounds of a stage, for all learners."""

    ms: np.ndarray  # (3,) of one call: the median, and the quartiles around it
    ideal: float  # operations that the faster matmul does in that time


def _time_stage(stages: dict[str, Stage], name: str, seconds: float) -> Timing:
    """Time a stage, alternating with the matmuls."""
    rounds = benchmark.interleave({n: stage.run for n, stage in stages.items()}, seconds)
    per_call = {n: rounds[n] / stage.calls for n, stage in stages.items()}
    peak = np.max([stages[n].flops / per_call[n] for n in _PEAK], axis=0)
    ms = 1e3 * np.quantile(per_call[name], (0.5, 0.25, 0.75))
    return Timing(ms, float(np.median(per_call[name] * peak)))


def _make_line(name: str, stage: Stage, timing: Timing) -> Line:
    ms, low, high = map(float, timing.ms)
    line: Line = {"stage": name, "ms": ms, "low": low, "high": high}
    if stage.per_step:
        line["ms_per_step"] = ms * stage.per_step
    if stage.flops:
        ratio = timing.ideal / stage.flops
        line |= {
            "gflop": stage.flops / 1e9,
            "gflops": stage.flops / ms / 1e6,
            "of_peak": 1 / ratio,
            "x_ideal": ratio,
        }
    return line


def _environment_step(stages: dict[str, Stage], timings: dict[str, Timing]) -> Line:
    """Return the line of an environment step: acting, learning, and its share of a model fit."""
    parts = [
        (stages[name], timings[name], stages[name].per_step or 1.0)
        for name in benchmark.WHOLE_STEP
        if name in stages
    ]
    operations = sum(share * stage.flops for stage, _, share in parts)
    ms = np.sum([share * timing.ms for _, timing, share in parts], 0)
    ideal = sum(share * timing.ideal for _, timing, share in parts)
    whole = Stage(lambda: None, flops=round(operations), per_step=1)
    return _make_line("environment step", whole, Timing(ms, ideal))


def measure(work: Workload, seconds: float) -> Iterator[Line]:
    """Yield the lines of one task at one number of learners, each as soon as it is measured.

    Args:
      seconds: for each stage.
    """
    config, program = work.config, work.program
    common_columns = {"env": config.env, "learners": config.num_learners}
    peak = {
        _PEAK[0]: benchmark.numpy_matmul(),
        _PEAK[1]: benchmark.jax_matmul(1, benchmark.SIDE, benchmark.SIDE, "float32"),
    }
    with work:
        stages, timings = peak | benchmark.matmuls(program) | work.stages(), {}
        for name, stage in stages.items():
            timings[name] = _time_stage({**peak, name: stage}, name, seconds)
            yield common_columns | _make_line(name, stage, timings[name])
        yield common_columns | _environment_step(stages, timings)
        for name, properties in work.program_properties().items():
            values = properties._asdict()
            for size in ("state_bytes", "temporary_bytes"):
                if values[size] is not None:
                    values[size] = round(values[size] / program.placement.learners_per_device)
            yield common_columns | {"stage": f"program {name}", **values}


def probe(config: Config) -> None:
    """Start as `train` does, and print the seconds of each part as JSON."""
    begin, seconds = time.perf_counter(), {}

    def mark(name: str) -> None:
        nonlocal begin
        seconds[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    work = Workload(config)
    mark("task")
    for lowered in work.program.lower():
        lowered.compile()
    mark("compile fit and learn")
    with work:
        stages = work.stages()
        mark("state, environments")
        for name in ("act", "insert"):
            stages[name].run()
        mark("first act and insert")
        # A few steps of a fit are enough: the whole fit is compiled above, and its duration is not
        # part of the start.
        for name in ("fit step", "learn"):
            if name in stages:
                stages[name].run()
    mark("first fit steps and learn")
    print(json.dumps(seconds))


def _probed(done: "subprocess.CompletedProcess[str]") -> dict[str, float]:
    """Return the seconds that `probe` printed.

    Raises:
      UsageError: it failed, or printed no numbers.
    """
    printed = done.stdout.strip().splitlines() or [""]
    try:
        if done.returncode == 0:
            return {part: float(seconds) for part, seconds in json.loads(printed[-1]).items()}
    except (ValueError, AttributeError, TypeError):  # not a JSON object of numbers
        pass
    last = (done.stderr.strip().splitlines() or ["it printed no times"])[-1]
    raise UsageError(
        f"--start: the process that was timed failed (exit status {done.returncode}): "
        f"{last.removeprefix('error: ')}"
    )


def measure_start(config: Config) -> list[Line]:
    """Return the seconds of a start with an empty and then with a filled compilation cache."""
    lines = []
    # A new process with the same flags has the same settings.
    command = [*common.restart_command(), f"--probe={config.env}"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            total = time.perf_counter() - begin
            parts = _probed(done)
            parts = {"import": total - sum(parts.values()), **parts, "all": total}
            lines += [
                {
                    "env": config.env,
                    "learners": config.num_learners,
                    "stage": f"{name} start: {part}",
                    "ms": 1e3 * seconds,
                }
                for part, seconds in parts.items()
            ]
    return lines


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


#: The header above the lines of one task and number of learners.
HEADER = (
    f"{'stage':<44}{'ms':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}{'x ideal':>9}"
    f"{'ms / env step':>15}"
)


def format_line(line: Line) -> str:
    """Return a line as text for a terminal."""
    get = line.get
    if "kernels" in line:
        state, temporary = (
            "-" if size is None else f"{size / 2**20:.1f}"
            for size in (get("state_bytes"), get("temporary_bytes"))
        )
        return (
            f"{line['stage']}: {state} MiB of state per learner, {temporary} of temporaries, "
            f"{_cell(get('donated'), '.1%')} donated, {line['kernels']} kernels, "
            f"{line['ring_copies']} copies of a replay buffer"
        )
    return (
        f"{line['stage']:<44}{_cell(get('ms'), '.3f'):>10}{_cell(get('gflop'), '.3f'):>9}"
        f"{_cell(get('gflops'), '.0f'):>9}{_cell(get('of_peak'), '.0%'):>9}"
        f"{_cell(get('x_ideal'), '.2f'):>9}{_cell(get('ms_per_step'), '.2f'):>15}"
    )


def plot(lines: Sequence[Line]) -> bytes | None:
    """Return a PNG of the cost of an environment step against learners, a panel for each task.

    The result is None if no task was measured.
    """
    panels = []
    for env in dict.fromkeys(line["env"] for line in lines):
        shown = {}
        for stage in ("environment step", "fit step", "agent update", "rollout", "host step"):
            points = [
                (line["learners"], line["ms_per_step"] / line["learners"])
                for line in lines
                if line["env"] == env and line["stage"] == stage and line.get("ms_per_step")
            ]
            if points:
                x, y = np.array(sorted(points)).T
                shown[stage] = (x, y[None])
        if not shown:
            continue
        title = f"{env}, preset {FLAGS.preset}"
        panels.append(
            Panel(
                shown,
                "ms of an environment step per learner",
                title,
                scale="log",
                xlabel="learners in one program",
            )
        )
    if not panels:
        return None
    return figures.png(figures.curves(panels, title=f"Cost against learners, {device_name()}"))


#: The time and the ratio to the ideal of each stage of a table by task, learners and stage.
Table = dict[tuple[str, str, str], tuple[float | None, float | None]]


def read_table(path: Path) -> Table:
    """Return the numbers of an earlier bench.csv; None for those that it does not have.

    Raises:
      UsageError: there is no such file, or it is another kind of file.
    """
    if not path.is_file():
        raise UsageError(f"--compare={path}: there is no such file")

    def number(line: dict[str, str | None], name: str) -> float | None:
        text = line.get(name)  # a file that was cut off has shorter lines
        return float(text) if text else None

    try:
        with path.open(newline="") as file:
            return {
                (
                    line["env"],
                    line.get("learners") or line[_OLD_LEARNERS],
                    _RENAMED_STAGES.get(line["stage"], line["stage"]),
                ): (number(line, "ms"), number(line, "x_ideal"))
                for line in csv.DictReader(file)
            }
    except (KeyError, ValueError, csv.Error) as error:
        raise UsageError(
            f"--compare={path}: it is not a table of this benchmark "
            f"({type(error).__name__}: {error}); name the bench.csv of an earlier run"
        ) from None


def compare(lines: Sequence[Line], old: Table, path: Path) -> str:
    """Return old time over new by stage, also with each relative to its own machine's peak."""
    text = [f"{'against ' + str(path):<60}{'old ms':>10}{'new ms':>10}{'faster':>9}{'of peak':>9}"]
    for line in lines:
        key = line["env"], str(line["learners"]), line["stage"]
        (old_ms, old_ideal), ms = old.get(key, (None, None)), line.get("ms")
        if old_ms and ms:
            ideal = ""
            if old_ideal and line.get("x_ideal"):
                ideal = f"{old_ideal / line['x_ideal']:.2f}x"
            name = f"{line['env']} {line['learners']}: {line['stage']}"
            text.append(f"{name:<60}{old_ms:>10.3f}{ms:>10.3f}{old_ms / ms:>8.2f}x{ideal:>9}")
    return "\n".join(text)


def write(lines: Sequence[Line], out: Path) -> None:
    """Write bench.csv, and bench.png if a task was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    options: Any = jax.config
    precision = options.jax_default_matmul_precision or "default"
    common_columns = {
        "device": device_name(),
        "jax": jax.__version__,
        "precision": precision,
        "algo": FLAGS.algo,
        "agent": FLAGS.agent or PRESETS[FLAGS.preset].agent,
        "trust": FLAGS.trust or ALGORITHMS[FLAGS.algo].trust,
        "preset": FLAGS.preset,
    }
    for line in lines:
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
        writer.writerow(common_columns | short)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "bench.csv", text.getvalue().encode())
        if (image := plot(lines)) is not None:
            write_atomically(out / "bench.png", image)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


def _learner_counts() -> list[int]:
    """Return the numbers of learners that --learners lists."""
    try:
        counts = [int(text) for text in FLAGS.learners]
        assert min(counts) > 0
    except (ValueError, AssertionError):
        raise UsageError(
            f"--learners={','.join(FLAGS.learners)}: whole numbers from 1, as 1,6"
        ) from None
    return counts


def _make_config(env: str, learners: int) -> Config:
    fix = ALGORITHMS[FLAGS.algo].fix or "scale,target"
    return make_config(
        env,
        algo=FLAGS.algo,
        agent=FLAGS.agent,
        trust=FLAGS.trust,
        preset=FLAGS.preset,
        fixes=[fix] if FLAGS.algo != "model-free" else [],
        seeds=learners,
        settings=common.parse_assignments("--set", FLAGS.set),
    )


def _fit_note(config: Config) -> str:
    """Return a line on the number of gradient steps of a fit; empty if every fit has as many."""
    model = config.model
    if not config.has_model or (model.schedule == "fixed" and not model.epochs):
        return ""
    untimed = "; the evaluations between the rounds of early_stop are not timed"
    return (
        f"a fit counts with its limit, model.fit_steps={model.fit_steps}, so the time of an environment "
        f"step is an upper bound{untimed if model.schedule == 'early_stop' else ''}\n"
    )


def _fits_into_memory(work: Workload) -> bool:
    devices = work.program.placement.mesh.size
    memory = backend.available(devices) * devices
    return backend.size(work.program.shapes()) <= backend.FILLED * memory


def main(arguments: Sequence[str]) -> int:
    """Measure every task at every number of learners."""
    common.refuse_arguments(arguments)
    common.start()
    backend.local_devices()  # in one line if there is none
    counts = _learner_counts()
    if not FLAGS.env:
        raise UsageError("--env=: name at least one task, such as cheetah-run")
    old = read_table(expand_user(FLAGS.compare)) if FLAGS.compare else {}
    if FLAGS.probe:
        probe(_make_config(FLAGS.probe, 1))
        return 0
    for env in FLAGS.env:
        envs.spec(env)
        _make_config(env, 1)
    print(f"{device_name()}, jax {jax.__version__}, preset {FLAGS.preset}", flush=True)
    out = expand_user(FLAGS.out)
    lines: list[Line] = []
    for env in FLAGS.env:
        for count in counts:
            name = f"{env}, {count} learner{'s' * (count > 1)}"
            work = Workload(_make_config(env, count))
            if not _fits_into_memory(work):
                print(f"\n{name}: skipped, because the program does not fit into memory")
                continue
            print(f"\n{name}\n{_fit_note(work.config)}{HEADER}", flush=True)
            for line in measure(work, FLAGS.seconds):
                print(format_line(line), flush=True)
                lines.append(line)
            write(lines, out)
    if FLAGS.start:
        for line in measure_start(_make_config(FLAGS.env[0], 1)):
            print(f"{line['stage']:<44}{line['ms'] / 1e3:>9.2f} s", flush=True)
            lines.append(line)
        write(lines, out)
    if FLAGS.compare:
        print("\n" + compare(lines, old, expand_user(FLAGS.compare)))
    if lines:
        figure = f", {FLAGS.out}/bench.png" if (out / "bench.png").exists() else ""
        print(f"written: {FLAGS.out}/bench.csv{figure}")
    return 0
