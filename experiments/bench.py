"""Measures the machine, every stage of training, and a whole environment step.

    python experiments/bench.py
    python experiments/bench.py --compare=results/bench/two-cores/bench.csv

All stages are timed in turn with 256-cubed float32 matmuls of NumPy and JAX, so that a drifting
machine drifts for all of them. "x ideal" is the median of a stage's time over what its
floating-point operations (`dynajax.flops`) take at the better matmul's rate. Where there is a
GPU or TPU its matmuls at the networks' own shapes are measured in every precision too. Writes
bench.csv and bench.png into --out.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dynajax import cli, compiler, envs, make_config
from dynajax.config import PRESETS, Config
from dynajax.measure import benchmark, flops
from dynajax.measure.benchmark import Stage, Workload
from dynajax.record.folder import device_name, write_atomically
from dynajax.report import figures
from dynajax.report.figures import Panel
from dynajax.types import UsageError

FLAGS = flags.FLAGS
flags.DEFINE_list("env", ["cheetah-run", "humanoid-stand", "quadruped-run"], "Tasks.")
flags.DEFINE_list("rows", [], "Rows of a program; by default those that suit the device.")
flags.DEFINE_enum("algo", "mbpo", ["mbpo", "sac"], "Algorithm.")
flags.DEFINE_enum("preset", "paper", list(PRESETS), "Sizes and cadence.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration, such as model.width=400.")
flags.DEFINE_float("seconds", 10, "To spend on each task and number of rows.", lower_bound=0.01)
flags.DEFINE_bool("start", True, "Time a start with an empty and with a filled compile cache.")
flags.DEFINE_string("out", "bench", "Folder for the table and the picture.")
flags.DEFINE_string("compare", None, "bench.csv of an earlier run, to show ratios to.")
flags.DEFINE_string("probe", None, "For the benchmark's own use.")

#: One line of bench.csv. Times in ms of one call, over all rows; bytes of one row.
COLUMNS = (
    "device",
    "jax",
    "precision",
    "algo",
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


def _lines(runs: dict[str, Stage], seconds: dict[str, np.ndarray]) -> dict[str, Line]:
    """What the timed rounds say of each stage; `seconds` (R,) are of one `Stage.run`."""
    each = {name: seconds[name] / stage.calls for name, stage in runs.items()}
    peak = np.max([runs[name].flops / each[name] for name in _PEAK], axis=0)
    found = {}
    for name, stage in runs.items():
        ms = 1e3 * float(np.median(each[name]))
        low, high = 1e3 * np.quantile(each[name], (0.25, 0.75))
        line: Line = {"stage": name, "ms": ms, "low": low, "high": high}
        if stage.per_step:
            line["ms_per_step"] = ms * stage.per_step
        if stage.flops:
            ratio = float(np.median(each[name] * peak / stage.flops))
            line |= {
                "gflop": stage.flops / 1e9,
                "gflops": stage.flops / ms / 1e6,
                "of_peak": 1 / ratio,
                "x_ideal": ratio,
            }
        found[name] = line
    return found


def _whole_step(work: Workload, runs: dict[str, Stage], seconds: dict[str, np.ndarray]) -> Stage:
    """An environment step at the preset's cadence: acting and learning, and its share of a fit."""
    first, *shares = benchmark.WHOLE_STEP
    loop = runs[first]
    total = seconds[first] / loop.calls
    for name in shares:
        if name in runs:
            total = total + seconds[name] / runs[name].calls * runs[name].per_step
    seconds["environment step"] = total
    count = work.config.rows * flops.environment_step(work.config, work.spec)
    return Stage(loop.run, 1, count, 1)


def measure(work: Workload, budget: float) -> list[Line]:
    """All lines of one task at one number of rows."""
    config = work.config
    with work:
        runs = {_PEAK[0]: benchmark.numpy_matmul()}
        runs[_PEAK[1]] = benchmark.jax_matmul(1, benchmark.SIDE, benchmark.SIDE, "float32")
        runs |= benchmark.matmuls(config) | work.stages()
        seconds = benchmark.interleave({n: stage.run for n, stage in runs.items()}, budget)
        runs["environment step"] = _whole_step(work, runs, seconds)
        lines = _lines(runs, seconds)
        for name, facts in work.facts().items():
            values = facts._asdict()
            for size in ("state_bytes", "temporary_bytes"):
                values[size] = round(values[size] / work.placement.each)
            lines.setdefault(name, {"stage": name}).update(values)
    return [{"env": config.env, "rows": config.rows, **line} for line in lines.values()]


def probe(config: Config) -> None:
    """Starts as `train` does, and prints the seconds of each part as JSON."""
    from dynajax.runtime.placement import place
    from dynajax.runtime.program import build

    begin, found = time.perf_counter(), {}

    def mark(name: str) -> None:
        nonlocal begin
        found[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    spec = envs.spec(config.env, time_limit=config.host.time_limit)
    program = build(config, spec, place(config, jax.local_devices()[:1]))
    mark("task")
    for lowered in program.lower(config, spec):
        lowered.compile()
    mark("compile fit and learn")
    with Workload(config) as work:
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
    print(json.dumps(found))


def start(config: Config) -> list[Line]:
    """Seconds of a start with an empty and then with a filled compile cache, by new processes."""
    lines = []
    # The command line again, so that the child has the same settings.
    command = [sys.executable, *sys.argv, f"--probe={config.env}"]
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
                    "rows": config.rows,
                    "stage": f"{name} start: {part}",
                    "ms": 1e3 * seconds,
                }
                for part, seconds in parts.items()
            ]
    return lines


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(lines: Sequence[Line]) -> str:
    """The lines of one task and number of rows, for a terminal."""
    head = f"{'stage':<44}{'ms':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>9}{'x ideal':>9}"
    head += f"{'ms / env step':>15}"
    rows = [head]
    for line in lines:
        get = line.get
        rows.append(
            f"{line['stage']:<44}{_cell(get('ms'), '.3f'):>10}{_cell(get('gflop'), '.3f'):>9}"
            f"{_cell(get('gflops'), '.0f'):>9}{_cell(get('of_peak'), '.0%'):>9}"
            f"{_cell(get('x_ideal'), '.2f'):>9}{_cell(get('ms_per_step'), '.2f'):>15}"
        )
    for line in lines:
        if line.get("state_bytes") is not None:
            rows.append(
                f"program {line['stage']}: {line['state_bytes'] / 2**20:.1f} MiB of state a row, "
                f"{line['temporary_bytes'] / 2**20:.1f} of temporaries, {line['donated']:.1%} "
                f"donated, {line['kernels']} kernels, {line['ring_copies']} copies of a replay"
            )
    return "\n".join(rows)


def figure(lines: Sequence[Line]) -> bytes:
    """Cost of an environment step against rows, a panel for each task."""
    panels = []
    for env in dict.fromkeys(line["env"] for line in lines):
        shown = {}
        for stage in ("environment step", "fit step", "SAC update", "rollout", "host step"):
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
        old = {(o["env"], o["rows"], o["stage"]): o for o in csv.DictReader(file)}
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
    if not FLAGS.rows:
        on_cpu = jax.local_devices()[0].platform == "cpu"
        return [1, 2, 4, 6] if on_cpu else [1, 2, 4, 6, 16, 64]
    try:
        rows = [int(text) for text in FLAGS.rows]
        assert min(rows) > 0
    except (ValueError, AssertionError):
        raise UsageError(f"--rows={','.join(FLAGS.rows)}: whole numbers from 1, as 1,6") from None
    return rows


def main(argv: Sequence[str]) -> int:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    compiler.use_cores()
    settings, counts = cli.assignments("--set", FLAGS.set), _rows()
    if FLAGS.compare and not Path(FLAGS.compare).is_file():
        raise UsageError(f"--compare={FLAGS.compare}: there is no such file")

    def config(env: str, rows: int) -> Config:
        fixes = ["scale,target"] if FLAGS.algo == "mbpo" else []
        return make_config(
            env, algo=FLAGS.algo, preset=FLAGS.preset, fixes=fixes, seeds=rows, settings=settings
        )

    cli.use_compilation_cache()
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
            used = work.placement.mesh.size
            memory = compiler.available(used) * used
            if compiler.size(work.shapes) > 0.9 * memory:
                print(f"\n{env}, {rows} rows: left out, for they do not fit into memory")
                continue
            new = measure(work, FLAGS.seconds)
            print(f"\n{env}, {rows} row{'s' * (rows > 1)}\n{table(new)}", flush=True)
            lines += new
            write(lines, Path(FLAGS.out))
    if FLAGS.start:
        lines += start(config(FLAGS.env[0], 1))
        for line in lines:
            if " start: " in line["stage"]:
                print(f"{line['stage']:<44}{line['ms'] / 1e3:>9.2f} s")
        write(lines, Path(FLAGS.out))
    if FLAGS.compare:
        print("\n" + compare(lines, Path(FLAGS.compare)))
    print(f"written: {FLAGS.out}/bench.csv, {FLAGS.out}/bench.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
