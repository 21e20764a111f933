"""Measures the machine, every stage of training, and a whole environment step.

    dynajax bench
    dynajax bench --env=cheetah-run,humanoid-stand --rows=1,2,4,6 --start --out=bench
    dynajax bench --compare=results/bench/two-cores/bench.csv

Every stage is timed in turn with 256-cubed float32 matmuls of NumPy and JAX, so that a drifting
machine drifts for all three, and is printed at once. "x ideal" is the median of a stage's time over
what its floating-point operations (`dynajax.profiling.flops`) take at the better matmul's rate. Where
there is a GPU or TPU its matmuls at the networks' own shapes are measured in every precision too.
Writes bench.csv and bench.png into --out.
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
from dynajax.cli import common
from dynajax.config import Config
from dynajax.config.presets import PRESETS
from dynajax.profiling import benchmark
from dynajax.profiling.benchmark import Stage, Workload
from dynajax.report import figures
from dynajax.report.figures import Panel
from dynajax.runs.directory import device_name, write_atomically
from dynajax.types import UsageError
from dynajax.xla import backend

FLAGS = flags.FLAGS
flags.DEFINE_list("env", ["cheetah-run"], "Tasks.")
flags.DEFINE_list("rows", ["1"], "Rows of a program.")
flags.DEFINE_enum("algo", "mbpo", ["mbpo", "model-free"], "With a model; sac: the agent alone.")
flags.DEFINE_string(
    "agent", None, "What acts and learns: sac, simba, bro, module:NAME; the preset's by default."
)
flags.DEFINE_string("trust", "none", "Rule of trust in synthetic data: none, penalty, module:NAME.")
flags.DEFINE_enum("preset", "paper", list(PRESETS), "Sizes and cadence.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration, such as model.width=400.")
flags.DEFINE_float("seconds", 2, "To spend on each stage; five rounds at least.", lower_bound=0.01)
flags.DEFINE_bool("start", False, "Time a start with an empty and with a filled compile cache.")
flags.DEFINE_string("out", "bench", "Folder for the table and the picture.")
flags.DEFINE_string("compare", None, "bench.csv of an earlier run, to show ratios to.")
flags.DEFINE_string("probe", None, "For the benchmark's own use.")

#: One line of bench.csv. Times in ms of one call, over all rows; bytes of one row.
COLUMNS = (
    "device",
    "jax",
    "precision",
    "algo",
    "agent",
    "trust",
    "preset",
    "env",
    "rows",
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
#: Stages that older tables name otherwise.
_RENAMED = {"SAC update": "agent update"}


class Timing(NamedTuple):
    """A stage's rounds, over all rows."""

    ms: np.ndarray  # (3,) of one call: the median, and the quartiles around it
    ideal: float  # operations that the better matmul does in that time


def _timing(runs: dict[str, Stage], name: str, seconds: float) -> Timing:
    """Times a stage in turn with the matmuls."""
    rounds = benchmark.interleave({n: stage.run for n, stage in runs.items()}, seconds)
    each = {n: rounds[n] / stage.calls for n, stage in runs.items()}
    peak = np.max([runs[n].flops / each[n] for n in _PEAK], axis=0)
    ms = 1e3 * np.quantile(each[name], (0.5, 0.25, 0.75))
    return Timing(ms, float(np.median(each[name] * peak)))


def _line(name: str, stage: Stage, timing: Timing) -> Line:
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


def _whole_step(stages: dict[str, Stage], timings: dict[str, Timing]) -> Line:
    """An environment step at the preset's cadence: acting and learning, and its share of a fit."""
    parts = [
        (stages[name], timings[name], stages[name].per_step or 1.0)
        for name in benchmark.WHOLE_STEP
        if name in stages
    ]
    operations = sum(share * stage.flops for stage, _, share in parts)
    ms = np.sum([share * timing.ms for _, timing, share in parts], 0)
    ideal = sum(share * timing.ideal for _, timing, share in parts)
    whole = Stage(lambda: None, flops=round(operations), per_step=1)
    return _line("environment step", whole, Timing(ms, ideal))


def measure(work: Workload, seconds: float) -> Iterator[Line]:
    """The lines of one task at one number of rows, each as soon as it is known.

    Args:
      seconds: for each stage.
    """
    config, program = work.config, work.program
    common = {"env": config.env, "rows": config.num_learners}
    peak = {
        _PEAK[0]: benchmark.numpy_matmul(),
        _PEAK[1]: benchmark.jax_matmul(1, benchmark.SIDE, benchmark.SIDE, "float32"),
    }
    with work:
        stages, timings = peak | benchmark.matmuls(program) | work.stages(), {}
        for name, stage in stages.items():
            timings[name] = _timing({**peak, name: stage}, name, seconds)
            yield common | _line(name, stage, timings[name])
        yield common | _whole_step(stages, timings)
        for name, properties in work.program_properties().items():
            values = properties._asdict()
            for size in ("state_bytes", "temporary_bytes"):
                values[size] = round(values[size] / program.placement.learners_per_device)
            yield common | {"stage": f"program {name}", **values}


def probe(config: Config) -> None:
    """Starts as `train` does, and prints the seconds of each part as JSON."""
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
        # A fit of a few steps: its compiled program was made above, and its length is no start.
        for name in ("fit step", "learn"):
            if name in stages:
                stages[name].run()
    mark("first fit steps and learn")
    print(json.dumps(seconds))


def start(config: Config) -> list[Line]:
    """Seconds of a start with an empty and then with a filled compile cache, by new processes."""
    lines = []
    # The command line again, so that the child has the same settings.
    command = [*common.again(), f"--probe={config.env}"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            total = time.perf_counter() - begin
            if done.returncode:
                raise UsageError(f"--start: {done.stderr.strip().splitlines()[-1]}")
            parts = json.loads(done.stdout.strip().splitlines()[-1])
            parts = {"import": total - sum(parts.values()), **parts, "all": total}
            lines += [
                {
                    "env": config.env,
                    "rows": config.num_learners,
                    "stage": f"{name} start: {part}",
                    "ms": 1e3 * seconds,
                }
                for part, seconds in parts.items()
            ]
    return lines


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


#: Over the lines of one task and number of rows.
HEAD = (
    f"{'stage':<44}{'ms':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}{'x ideal':>9}"
    f"{'ms / env step':>15}"
)


def row(line: Line) -> str:
    """A line for a terminal."""
    get = line.get
    if get("state_bytes") is not None:
        return (
            f"{line['stage']}: {line['state_bytes'] / 2**20:.1f} MiB of state a row, "
            f"{line['temporary_bytes'] / 2**20:.1f} of temporaries, {line['donated']:.1%} "
            f"donated, {line['kernels']} kernels, {line['ring_copies']} copies of a replay"
        )
    return (
        f"{line['stage']:<44}{_cell(get('ms'), '.3f'):>10}{_cell(get('gflop'), '.3f'):>9}"
        f"{_cell(get('gflops'), '.0f'):>9}{_cell(get('of_peak'), '.0%'):>9}"
        f"{_cell(get('x_ideal'), '.2f'):>9}{_cell(get('ms_per_step'), '.2f'):>15}"
    )


def figure(lines: Sequence[Line]) -> bytes:
    """Cost of an environment step against rows, a panel for each task."""
    panels = []
    for env in dict.fromkeys(line["env"] for line in lines):
        shown = {}
        for stage in ("environment step", "fit step", "agent update", "rollout", "host step"):
            points = [
                (line["rows"], line["ms_per_step"] / line["rows"])
                for line in lines
                if line["env"] == env and line["stage"] == stage
            ]
            if points:
                x, y = np.array(sorted(points)).T
                shown[stage] = (x, y[None])
        title = f"{env}, preset {FLAGS.preset}"
        panels.append(
            Panel(
                shown,
                "ms of an environment step, a row",
                title,
                scale="log",
                xlabel="rows of one program",
            )
        )
    return figures.png(figures.curves(panels, title=f"Cost against rows, {device_name()}"))


def compare(lines: Sequence[Line], path: Path) -> str:
    """Old time over new by stage; also with each relative to its own machine's peak."""
    with path.open(newline="") as file:
        old = {
            (o["env"], o["rows"], _RENAMED.get(o["stage"], o["stage"])): o
            for o in csv.DictReader(file)
        }
    rows = [f"{'against ' + str(path):<60}{'old ms':>10}{'new ms':>10}{'faster':>9}{'of peak':>9}"]
    for line in lines:
        before = old.get((line["env"], str(line["rows"]), line["stage"]))
        if before and before["ms"] and line.get("ms"):
            ideal = ""
            if before["x_ideal"] and line.get("x_ideal"):
                ideal = f"{float(before['x_ideal']) / line['x_ideal']:.2f}x"
            name = f"{line['env']} {line['rows']}: {line['stage']}"
            rows.append(
                f"{name:<60}{float(before['ms']):>10.3f}{line['ms']:>10.3f}"
                f"{float(before['ms']) / line['ms']:>8.2f}x{ideal:>9}"
            )
    return "\n".join(rows)


def write(lines: Sequence[Line], out: Path) -> None:
    """bench.csv and bench.png."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    options: Any = jax.config
    precision = options.jax_default_matmul_precision or "default"
    common = {
        "device": device_name(),
        "jax": jax.__version__,
        "precision": precision,
        "algo": FLAGS.algo,
        "agent": FLAGS.agent or PRESETS[FLAGS.preset].agent,
        "trust": FLAGS.trust,
        "preset": FLAGS.preset,
    }
    for line in lines:
        short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
        writer.writerow(common | short)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "bench.csv", text.getvalue().encode())
        write_atomically(out / "bench.png", figure(lines))
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None


def _rows() -> list[int]:
    try:
        rows = [int(text) for text in FLAGS.rows]
        assert min(rows) > 0
    except (ValueError, AssertionError):
        raise UsageError(f"--rows={','.join(FLAGS.rows)}: whole numbers from 1, as 1,6") from None
    return rows


def main(argv: Sequence[str]) -> int:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    common.start()
    settings, counts = common.assignments("--set", FLAGS.set), _rows()
    if FLAGS.compare and not common.folder(FLAGS.compare).is_file():
        raise UsageError(f"--compare={FLAGS.compare}: there is no such file")

    def config(env: str, rows: int) -> Config:
        return make_config(
            env,
            algo=FLAGS.algo,
            agent=FLAGS.agent,
            trust=FLAGS.trust,
            preset=FLAGS.preset,
            fixes=["scale,target"] if FLAGS.algo == "mbpo" else [],
            seeds=rows,
            settings=settings,
        )

    if FLAGS.probe:
        probe(config(FLAGS.probe, 1))
        return 0
    for env in FLAGS.env:
        envs.spec(env)
        config(env, 1)
    print(f"{device_name()}, jax {jax.__version__}, preset {FLAGS.preset}", flush=True)
    lines: list[Line] = []
    for env in FLAGS.env:
        for rows in counts:
            work = Workload(config(env, rows))
            used = work.program.placement.mesh.size
            memory = backend.available(used) * used
            if backend.size(work.program.shapes()) > 0.9 * memory:
                print(f"\n{env}, {rows} rows: left out, for they do not fit into memory")
                continue
            print(f"\n{env}, {rows} row{'s' * (rows > 1)}\n{HEAD}", flush=True)
            for line in measure(work, FLAGS.seconds):
                print(row(line), flush=True)
                lines.append(line)
            write(lines, common.folder(FLAGS.out))
    if FLAGS.start:
        for line in start(config(FLAGS.env[0], 1)):
            print(f"{line['stage']:<44}{line['ms'] / 1e3:>9.2f} s", flush=True)
            lines.append(line)
        write(lines, common.folder(FLAGS.out))
    if FLAGS.compare:
        print("\n" + compare(lines, common.folder(FLAGS.compare)))
    print(f"written: {FLAGS.out}/bench.csv, {FLAGS.out}/bench.png")
    return 0
