"""Fixtures of all tests: the compilation cache, a small task, and a small configuration."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

# Most of the tests' time is the compilation of tiny programs. To shorten it, this process and its
# children compile without LLVM's optimisations, with XLA's older code generator for fusions (which
# takes a third of the newer one's time) and with one LLVM module per program, and they cache every
# program. JAX reads these variables when it is imported.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA aborts if it does not know a flag; this version knows these.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )

import jax
import pytest

from dynajax import config, make_config
from dynajax.cli import common
from dynajax.engines.oracle import OracleMBPO
from dynajax.mbpo import MBPO
from dynajax.runtime import program
from dynajax.types import EnvSpec
from sizes import SMALL
from sizes import SMALL_OF_ANY as SMALL_OF_ANY

common.use_compilation_cache()
# Tracing makes so many objects that garbage collection would take a tenth of its time.
gc.set_threshold(200_000, 20, 50)

CORES = sorted(os.sched_getaffinity(0))

#: Tests of the slow tier, as parts of their names: several processes and schedulers, notebooks, whole
#: learning runs, double precision, and combinations of mechanisms that the first tier tests singly.
SLOW = (
    "test_processes.py::test_two_interrupted",
    "test_own_tasks.py::test_task_with_mixed_units",
    "test_placement.py::test_several_devices",
    "test_sweep.py::test_ray",
    "test_sweep.py::test_preempted_submitit",
    "test_sweep.py::test_interrupted_and_killed_sweeps",
    "test_bench.py::test_bench_measures_every_stage",
    "test_bench.py::test_bench_compares",
    "test_examples.py::test_examples_together",
    "test_examples.py::test_command_of_an_example_trains",
    "test_run.py::test_killed_run_resumes_bit_for_bit[2]",
    "test_run.py::test_interrupted_run_saves_and_resumes_bit_for_bit[15]",
    "test_run.py::test_dynajax_learns_pendulum",
    "test_notebooks.py::test_notebook_runs",
    "test_device_tasks.py::test_one_control_step",
    "test_device_brax.py::test_step_equals",
    "test_train.py::test_compiler_options",
    "test_package.py::test_wheel",
    "test_levers.py::test_run_of_two_variants_resumes_bit_for_bit",
    "test_page_runs.py::test_documented_training_command",
    "test_commands.py::test_documented_command_runs",
    "test_device.py::test_both_engines_reach_the_same_state[arguments2",
)
#: Of those, the ones that the first tier keeps, so that it tests every mechanism once.
KEPT = (
    "test_examples.py::test_command_of_an_example_trains[own_source",
    "test_device_tasks.py::test_one_control_step_in_float32[cartpole-balance]",
    "test_device_tasks.py::test_one_control_step_in_float32[cheetah-run]",
    "test_levers.py::test_run_of_two_variants_resumes_bit_for_bit[sac-host]",
    "test_levers.py::test_run_of_two_variants_resumes_bit_for_bit[simba-mjx]",
    "test_page_runs.py::test_documented_training_command[python experiments/run.py "
    "--env=cheetah-run --fix=scale,target]",
)
#: Files that take longest, which start first.
LONGEST = (
    "test_run.py",
    "test_device.py",
    "test_sources.py",
    "test_levers.py",
    "test_train.py",
    "test_starting.py",
    "test_diagnose_run.py",
    "test_sweep.py",
    "test_device_tasks.py",
    "test_policy.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-tasks", action="store_true", help="test every task of the device engine (an hour)"
    )
    parser.addoption(
        "--states", type=int, default=0, help="seed of the states that device tasks are tested on"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "all_tasks: runs with --all-tasks only")
    # Each of the processes that share the tests gets one core. With shared cores, threads that wait
    # for each other slow the other process down more than they help.
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Divide the tests into tiers, and put the longest files first.

    Raises:
      UsageError: a name of a tier is that of no test.
    """
    if {item.path for item in items} >= set(Path(__file__).parent.glob("test_*.py")):
        for part in (*SLOW, *KEPT):
            if not any(part in item.nodeid for item in items):
                raise pytest.UsageError(f"conftest.py names {part}, and no test has that name")
    all_tasks = config.getoption("--all-tasks")
    for item in items:
        name = item.nodeid
        if all_tasks and item.path.name.startswith("test_device_"):
            continue  # asked for by the flag, in either tier
        if any(part in name for part in SLOW) and not any(part in name for part in KEPT):
            item.add_marker(pytest.mark.slow)
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if not all_tasks:
        skipped = [item for item in items if item.get_closest_marker("all_tasks")]
        items[:] = [item for item in items if item not in skipped]
        config.hook.pytest_deselected(items=skipped)


@pytest.fixture(scope="module", autouse=True)
def released_programs() -> Iterator[None]:
    """Release the programs of a file after its tests: those of all files take 8 GB."""
    yield
    program._jitted.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Enable optimisations, for a test that runs longer than its programs take to compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def new_programs() -> Iterator[Callable[[], None]]:
    """Forget the kept programs before and after a test, and return the function that does it."""
    forget = program._jitted.cache_clear
    forget()
    yield forget
    forget()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, new_programs: Callable) -> Counter[str]:
    """Count how often methods of `MBPO` and `OracleMBPO` are traced, by name."""
    times: Counter[str] = Counter()

    def count(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def counted(self, *arguments):
            times[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(cls, name, counted)

    for name in ("fit", "learn", "train_member", "value"):
        count(MBPO, name)
    for name in ("propose_transitions", "learn_corrected"):
        count(OracleMBPO, name)
    return times


@pytest.fixture(scope="session")
def spec() -> EnvSpec:
    """Return a task of three observations and two actions that ends once the first one exceeds 5."""
    return EnvSpec("walk", 3, 2, 50, ("x", "y", "z"), lambda obs, action, new: new[0] > 5)


@pytest.fixture(scope="session")
def make() -> Callable[..., config.Config]:
    """Return `make_config` with small sizes: make({"learn.utd": 3}, fixes=["scale"], seeds=2)."""

    def small(settings=(), *, steps=100, **arguments):
        return make_config(
            "walk", preset="paper", settings=SMALL | dict(settings), steps=steps, **arguments
        )

    return small
