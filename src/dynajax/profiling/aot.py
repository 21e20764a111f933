"""Ahead-of-time compilation: memory and kernel counts for a GPU or TPU that you do not have.

The programs of a run are compiled by the device's own compiler, so memory, kernels and loops are
those of the real programs. Time is not measured: a lower bound is computed from operations and
bytes.
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

#: Copies of more bytes than this are listed in the report.
LARGE_COPY = 2**20


class CompileJob(NamedTuple):
    """A program to compile."""

    lower: Callable[[], jax.stages.Lowered]
    per_step: float  # how often it runs in an environment step
    trip_count: int  # assumed trip count of loops whose length depends on data
    operations: Callable[[], int]  # of one run, over all devices


class ProgramCost(NamedTuple):
    """The cost of a compiled program on each device."""

    argument_bytes: int
    temporary_bytes: int
    donated_bytes: int
    needed_bytes: int
    summary: hlo.Summary
    operations: int  # floating-point operations of matmuls in one run, over all devices
    per_step: float
    trip_count: int  # assumed trip count of loops whose length depends on data

    def total(self, field: str) -> int:
        """Return the total of a field of `hlo.Summary` in one run."""
        return self.summary.total(field, self.trip_count)

    def min_bytes(self, cache: int) -> int:
        """Return the bytes that one run must at least move to or from memory."""
        return self.summary.min_bytes(cache, self.trip_count)

    def as_dict(self, learners: int, cache: int) -> dict[str, Any]:
        """Return the cost as JSON.

        Args:
          learners: number of learners on a device.
          cache: bytes of the device's cache.
        """
        summaries, main = list(self.summary.walk()), self.summary.main_loop()
        main_kernels = main.total("kernels", self.trip_count) if main else 0
        main_trips = (
            0 if main is None else self.trip_count if main.trip_count is None else main.trip_count
        )
        return {
            "bytes": {
                "arguments": self.argument_bytes,
                "temporaries": self.temporary_bytes,
                "donated": self.donated_bytes,
                "needed": self.needed_bytes,
                "needed_per_learner": self.needed_bytes // learners,
            },
            "kernels": {
                "all": self.total("kernels"),
                "outside_main_loop": self.total("kernels") - main_trips * main_kernels,
                "in_main_loop": main_kernels,
                "main_loop_trips": main.trip_count if main else 0,
            },
            "loops": [
                {"name": s.name, "trips": s.trip_count, "kernels": s.kernels} for s in summaries[1:]
            ],
            "data_dependent_loops": sum(s.trip_count is None for s in summaries),
            "large_copies": [c for s in summaries for c in s.copies if c > LARGE_COPY],
            "all_reduces": self.total("all_reduces"),
            "operations": self.operations,
            "bytes_moved_by_kernels": self.total("kernel_bytes"),
            "bytes_at_least": self.min_bytes(cache),
            "runs_per_environment_step": self.per_step,
        }


def compile_jobs(program: Program) -> dict[str, CompileJob]:
    """Return the programs of a run by name."""
    config, model = program.config, program.config.model
    fit_steps = model.fit_steps
    if model.schedule != "fixed":
        fit_steps = -(-model.fit_steps // model.round_steps)
    trip_counts = {"fit": fit_steps}
    every = {"evaluation": config.eval.every, "fit": model.fit_every}
    if config.engine == "mjx":
        programs = DeviceEngine(program, Clock()).programs()
        length, *rest = schedule.segments(config)
        # A shorter last segment runs once in the whole run.
        every |= {f"steps of {length}": length, **{f"steps of {n}": config.steps for n in rest}}
    else:
        obs = transition_shapes(program.placement.num_learners, program.spec)[0].obs
        state = program.shapes()
        programs = {"act": (program.act, (state, obs, np.int32(0))), **program.programs()}
        trip_counts["learn"] = int(horizon(config, jnp.asarray(config.random_steps)))

    def job(name: str, function: Any, arguments: tuple[Any, ...]) -> CompileJob:
        trip_count = trip_counts.get(name, 1)
        return CompileJob(
            lambda: function.lower(*arguments),
            1 / every.get(name, 1),
            trip_count,
            lambda: flops.count(function, *arguments, trips=trip_count),
        )

    return {name: job(name, *program) for name, program in programs.items()}


def measure(
    job: CompileJob, accelerator: devices.Accelerator, *, count_operations: bool = True
) -> ProgramCost:
    """Compile a program for a device, and return its cost."""
    compiled = job.lower().compile(compiler_options=dict(accelerator.options))
    size: Any = compiled.memory_analysis()
    return ProgramCost(
        size.argument_size_in_bytes,
        size.temp_size_in_bytes,
        size.alias_size_in_bytes,
        backend.needed(compiled),
        hlo.summarize(compiled.as_text() or ""),
        job.operations() if count_operations else 0,
        job.per_step,
        job.trip_count,
    )


def with_learners(config: Config, learners: int) -> Config:
    """Return the configuration with that many learners: seeds of its first variant."""
    return dataclasses.replace(config, seeds=learners, variants=config.variants[:1])


class MemoryFit(NamedTuple):
    """The largest number of learners that fits into the memory of a device."""

    learners: int  # on one device
    needed_bytes: int  # of that many learners
    bytes_with_one_more: int | None  # None if the compiler refuses one more learner
    tried: tuple[int, ...]  # numbers of learners that were compiled


def _interpolate(tried: dict[int, int], low: int, high: int | None, limit: int) -> int:
    """Return the number of learners at which a line through two known points reaches the limit.

    The points are those next to the edge between `low`, which fits, and `high`, which does not.
    """
    known = sorted(tried)
    right = high if high in tried else known[-1]
    left = low if low in tried and low != right else known[0]
    if left == right:
        return int(limit * right / tried[right])
    slope = (tried[right] - tried[left]) / (right - left)
    return left + int((limit - tried[left]) / slope) if slope > 0 else 2 * low


def _needed_bytes(
    jobs: dict[str, CompileJob], accelerator: devices.Accelerator, limit: int
) -> int | None:
    """Compile programs until one exceeds the limit, and return the bytes of the largest.

    Returns None if the compiler refuses a program because it is too large.
    """
    largest = 0
    for job in jobs.values():
        try:
            cost = measure(job, accelerator, count_operations=False)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error):
                raise
            return None
        largest = max(largest, cost.needed_bytes)
        if largest > limit:
            break
    return largest


def max_learners(
    config: Config,
    spec: EnvSpec,
    name: str,
    begin: int,
    needed: dict[str, int],
) -> MemoryFit:
    """Find the most learners whose programs fit into the memory of one device, by compiling them.

    The search ends when a number fits and one more does not. The next number to try is where a line
    through known points meets the limit, or the middle if that is not in the interval.

    Args:
      config, spec: the run.
      name: the device.
      begin: learners per device that were compiled already.
      needed: the bytes of each of their programs, by name.
    """
    accelerator, targets = devices.accelerator(name), devices.devices(name)[:1]
    limit = int(backend.FILLED * accelerator.memory)
    # Largest first, because a number is refused as soon as one program is too large.
    order = sorted(needed, key=lambda program: needed[program], reverse=True)
    tried = {begin: max(needed.values())}
    refused: set[int] = set()
    low, high = (begin, None) if tried[begin] <= limit else (0, begin)
    while high is None or high - low > 1:
        guess = _interpolate(tried, low, high, limit)
        if high is not None and not low < guess < high:
            # The edge is estimated at one end of the interval, so try the number next to it.
            guess = low + 1 if guess <= low else high - 1
        if high is not None and len(tried) + len(refused) > 4:
            guess = (low + high) // 2
        guess = max(guess, low + 1)
        jobs = compile_jobs(build(with_learners(config, guess), spec, targets))
        size = _needed_bytes({program: jobs[program] for program in order}, accelerator, limit)
        if size is None:
            refused.add(guess)
        else:
            tried[guess] = size
        if size is not None and size <= limit:
            low = guess
        else:
            high = guess
    return MemoryFit(
        low,
        tried.get(low, 0),
        None if high in refused else tried[high],
        tuple(sorted({*tried, *refused})),
    )


def _environment_step(
    costs: dict[str, ProgramCost], accelerator: devices.Accelerator, num_devices: int
) -> dict[str, Any]:
    """Return the cost of an environment step on each device, with a lower bound of its time."""

    def per_step(of: Callable[[ProgramCost], float]) -> float:
        return sum(cost.per_step * of(cost) for cost in costs.values())

    operations = per_step(lambda cost: cost.operations) / num_devices
    min_bytes = per_step(lambda cost: cost.min_bytes(accelerator.cache))
    step: dict[str, Any] = {
        "kernels": per_step(lambda cost: cost.total("kernels")),
        "all_reduces": per_step(lambda cost: cost.total("all_reduces")),
        "operations": operations,
        "bytes_moved_by_kernels": per_step(lambda cost: cost.total("kernel_bytes")),
        "bytes_at_least": min_bytes,
    }
    if accelerator.peak:
        arithmetic, memory = operations / accelerator.peak, min_bytes / accelerator.bandwidth
        step["seconds_at_least"] = {
            "arithmetic": arithmetic,
            "memory": memory,
            "bound": max(arithmetic, memory),
        }
    return step


def report(
    config: Config, spec: EnvSpec, name: str, *, learners_that_fit: bool = True
) -> dict[str, Any]:
    """Return the costs of a run's programs on a device, as JSON.

    Args:
      config, spec: the run.
      name: the device, one of `devices.ACCELERATORS`.
      learners_that_fit: also find how many learners fit into its memory.

    Raises:
      UsageError: the device is unknown, or its compiler is not installed.
    """
    accelerator, targets = devices.accelerator(name), devices.devices(name)
    with backend.compiling_for("gpu" if accelerator.platform == "cuda" else accelerator.platform):
        program = build(config, spec, targets)
        placement = program.placement
        costs = {n: measure(job, accelerator) for n, job in compile_jobs(program).items()}
        fit = None
        if accelerator.memory and learners_that_fit:
            needed = {n: cost.needed_bytes for n, cost in costs.items()}
            fit = max_learners(config, spec, name, placement.learners_per_device, needed)
    return {
        "device": name,
        "jax": jax.__version__,
        "env": config.env,
        "preset": config.preset,
        "algo": config.algo,
        "agent": config.agent_name,
        "engine": config.engine,
        "learners": config.num_learners,
        "devices": placement.mesh.size,
        "learners_on_a_device": placement.learners_per_device,
        "programs": {
            n: cost.as_dict(placement.learners_per_device, accelerator.cache)
            for n, cost in costs.items()
        },
        "environment_step": _environment_step(costs, accelerator, placement.mesh.size),
        "memory_limit": int(backend.FILLED * accelerator.memory) or None,
        "learners_that_fit": fit
        and {
            "on_a_device": fit.learners,
            "bytes": fit.needed_bytes,
            "bytes_with_one_more": fit.bytes_with_one_more,
            "tried": list(fit.tried),
        },
    }
