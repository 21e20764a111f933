"""Programs of a configuration compiled for a device that is not here, and what they would cost.

The compiler is the device's own, so memory, kernels and loops are those of the real programs. A
time is not: it is given as a lower bound, from operations and bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import schedule
from dynajax.config import Config
from dynajax.engines.device import DeviceEngine
from dynajax.profiling import devices, flops, hlo
from dynajax.runtime.program import Program, build, transition_shapes
from dynajax.runtime.timers import Clock
from dynajax.synthetic.buffered import horizon
from dynajax.types import EnvSpec
from dynajax.xla import backend

#: A copy of more bytes than this is worth a look.
LARGE = 2**20


class CompileJob(NamedTuple):
    """One program to compile."""

    lower: Callable[[], jax.stages.Lowered]
    per_step: float  # how often it runs in an environment step
    trips: int  # how often a loop is taken to run whose end depends on data
    operations: Callable[[], int]  # of one run, over all devices


class Measured(NamedTuple):
    """One compiled program, on each device."""

    arguments: int  # bytes
    temporaries: int
    donated: int
    needed: int
    part: hlo.Part
    operations: int  # floating-point ones of matmuls, in one run, over all devices
    per_step: float
    trips: int

    def as_dict(self, rows: int, cache: int) -> dict[str, Any]:
        """For JSON; `rows` on a device."""
        parts, main = list(self.part.walk()), self.part.main()
        return {
            "bytes": {
                "arguments": self.arguments,
                "temporaries": self.temporaries,
                "donated": self.donated,
                "needed": self.needed,
                "needed_by_row": self.needed // rows,
            },
            "kernels": {
                "all": self.part.total("kernels", self.trips),
                "outside_main_loop": self.part.total("kernels", self.trips)
                - (_rounds(main, self.trips) * main.total("kernels", self.trips) if main else 0),
                "in_main_loop": main.total("kernels", self.trips) if main else 0,
                "main_loop_trips": main.trips if main else 0,
            },
            "loops": [{"name": p.name, "trips": p.trips, "kernels": p.kernels} for p in parts[1:]],
            "data_dependent_loops": sum(p.trips is None for p in parts),
            "large_copies": [c for p in parts for c in p.copies if c > LARGE],
            "all_reduces": self.part.total("all_reduces", self.trips),
            "operations": self.operations,
            "bytes_moved_by_kernels": self.part.total("moved", self.trips),
            "bytes_at_least": self.part.traffic(cache, self.trips),
            "runs_per_environment_step": self.per_step,
        }


def _rounds(loop: hlo.Part, trips: int) -> int:
    return trips if loop.trips is None else loop.trips


def jobs(program: Program) -> dict[str, CompileJob]:
    """The programs of a run, by name."""
    config, model = program.config, program.config.model
    longest = model.fit_steps
    if model.schedule != "fixed":
        longest = -(-model.fit_steps // model.round_steps)
    trips = {"fit": longest}
    every = {"evaluation": config.eval.every, "fit": model.fit_every}
    if config.engine == "mjx":
        programs = DeviceEngine(program, Clock()).programs()
        length, *rest = schedule.segments(config)
        # What is left at the end runs once.
        every |= {f"steps of {length}": length, **{f"steps of {n}": config.steps for n in rest}}
    else:
        obs = transition_shapes(program.placement.num_learners, program.spec)[0].obs
        state = program.shapes()
        programs = {"act": (program.act, (state, obs, np.int32(0))), **program.programs()}
        trips["learn"] = int(horizon(config, jnp.asarray(config.random_steps)))

    def job(name: str, function: Any, arguments: tuple[Any, ...]) -> CompileJob:
        rounds = trips.get(name, 1)
        return CompileJob(
            lambda: function.lower(*arguments),
            1 / every.get(name, 1),
            rounds,
            lambda: flops.count(function, *arguments, trips=rounds),
        )

    return {name: job(name, *program) for name, program in programs.items()}


def measure(job: CompileJob, accelerator: devices.Accelerator, *, count: bool = True) -> Measured:
    """Compiles a program for a device."""
    compiled = job.lower().compile(compiler_options=dict(accelerator.options))
    size: Any = compiled.memory_analysis()
    return Measured(
        size.argument_size_in_bytes,
        size.temp_size_in_bytes,
        size.alias_size_in_bytes,
        backend.needed(compiled),
        hlo.read(compiled.as_text() or ""),
        job.operations() if count else 0,
        job.per_step,
        job.trips,
    )


def of_rows(config: Config, rows: int) -> Config:
    """The configuration with so many rows, seeds of its first variant."""
    return dataclasses.replace(config, seeds=rows, variants=config.variants[:1])


class MemoryFit(NamedTuple):
    """How many rows a device has room for."""

    each: int  # rows on a device
    needed: int  # bytes that so many take
    more: int | None  # bytes that one more row takes; None where its compiler refuses it
    tried: tuple[int, ...]  # numbers of rows that were compiled


def _where_line_meets(tried: dict[int, int], low: int, high: int | None, limit: int) -> int:
    """Rows at which the line through the two known points next to the edge reaches the limit."""
    known = sorted(tried)
    right = high if high in tried else known[-1]
    left = low if low in tried and low != right else known[0]
    if left == right:
        return int(limit * right / tried[right])
    slope = (tried[right] - tried[left]) / (right - left)
    return left + int((limit - tried[left]) / slope) if slope > 0 else 2 * low


def most_rows(
    config: Config,
    spec: EnvSpec,
    name: str,
    begin: int,
    needed: dict[str, int],
) -> MemoryFit:
    """The most rows whose programs fit into one device's memory, found by compiling them.

    A number is right when so many fit and one more does not. Which to try next is where the
    straight line through what is known meets the limit, or the middle if that is not between.

    Args:
      begin: rows on a device that were compiled already.
      needed: and the bytes of each of their programs.
    """
    accelerator = devices.accelerator(name)
    limit = int(backend.FILLED * accelerator.memory)
    targets = devices.devices(name)[:1]
    by_need = sorted(needed, key=lambda program: needed[program], reverse=True)

    def need(rows: int) -> int | None:
        program = build(of_rows(config, rows), spec, targets)
        todo = jobs(program)
        worst = 0
        # The largest first, for a number of rows is refused by any program that is too large.
        for program_name in by_need:
            try:
                worst = max(worst, measure(todo[program_name], accelerator, count=False).needed)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error):
                    raise
                return None
            if worst > limit:
                break
        return worst

    tried = {begin: max(needed.values())}
    refused: set[int] = set()
    low, high = (begin, None) if tried[begin] <= limit else (0, begin)
    while high is None or high - low > 1:
        guess = _where_line_meets(tried, low, high, limit)
        if high is not None and not low < guess < high:
            # The line says that the edge is at one of the ends: look beside it.
            guess = low + 1 if guess <= low else high - 1
        if high is not None and len(tried) + len(refused) > 4:
            guess = (low + high) // 2
        guess = max(guess, low + 1)
        bytes_of = need(guess)
        if bytes_of is None:
            refused.add(guess)
        else:
            tried[guess] = bytes_of
        if bytes_of is not None and bytes_of <= limit:
            low = guess
        else:
            high = guess
    return MemoryFit(
        low,
        tried.get(low, 0),
        None if high in refused else tried[high],
        tuple(sorted({*tried, *refused})),
    )


def report(
    config: Config, spec: EnvSpec, name: str, *, rows_that_fit: bool = True
) -> dict[str, Any]:
    """All that is known of a run's programs on a device, for JSON.

    Raises:
      UsageError: the device is not known, or its compiler is not here.
    """
    accelerator, targets = devices.accelerator(name), devices.devices(name)
    with backend.compiling_for("gpu" if accelerator.platform == "cuda" else accelerator.platform):
        program = build(config, spec, targets)
        placement = program.placement
        measured = {n: measure(job, accelerator) for n, job in jobs(program).items()}
        fits = None
        if accelerator.memory and rows_that_fit:
            needed = {n: m.needed for n, m in measured.items()}
            fits = most_rows(config, spec, name, placement.learners_per_device, needed)
    of_step = {
        field: sum(m.per_step * m.part.total(field, m.trips) for m in measured.values())
        for field in ("kernels", "moved", "all_reduces")
    }
    operations = sum(m.per_step * m.operations for m in measured.values()) / placement.mesh.size
    at_least = sum(
        m.per_step * m.part.traffic(accelerator.cache, m.trips) for m in measured.values()
    )
    step: dict[str, Any] = {
        "kernels": of_step["kernels"],
        "all_reduces": of_step["all_reduces"],
        "operations": operations,
        "bytes_moved_by_kernels": of_step["moved"],
        "bytes_at_least": at_least,
    }
    if accelerator.peak:
        arithmetic, memory = operations / accelerator.peak, at_least / accelerator.bandwidth
        step["seconds_at_least"] = {
            "arithmetic": arithmetic,
            "memory": memory,
            "bound": max(arithmetic, memory),
        }
    return {
        "device": name,
        "jax": jax.__version__,
        "env": config.env,
        "preset": config.preset,
        "algo": config.algo,
        "agent": config.agent_name,
        "engine": config.engine,
        "rows": config.num_learners,
        "devices": placement.mesh.size,
        "rows_on_a_device": placement.learners_per_device,
        "programs": {
            n: m.as_dict(placement.learners_per_device, accelerator.cache)
            for n, m in measured.items()
        },
        "environment_step": step,
        "memory_limit": int(backend.FILLED * accelerator.memory) or None,
        "rows_that_fit": fits
        and {
            "on_a_device": fits.each,
            "bytes": fits.needed,
            "bytes_with_one_more": fits.more,
            "tried": list(fits.tried),
        },
    }
