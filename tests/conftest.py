"""What the tests share: the compilation cache, a small task, and a small configuration."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version

# Most of the tests' time is compilation of tiny programs. For these processes and those that they
# start, and before jax is imported: no optimisation by LLVM, XLA's older code generator for
# fusions, which takes a third of the newer one's time, one LLVM module for each program, and
# every program kept for the next process.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA ends a process over a flag that it does not know, so only where these are known to be.
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
from dynajax.mbpo import Algorithm
from dynajax.types import EnvSpec

common.use_compilation_cache()
# Tracing makes so many objects that looking for cycles among them takes a tenth of its time.
gc.set_threshold(200_000, 20, 50)

CORES = sorted(os.sched_getaffinity(0))
#: Sizes at which a program compiles and runs in seconds.
SMALL = {
    "random_steps": 50,
    "agent.hidden": (8, 8),
    "learn.utd": 2,
    "learn.batch": 20,
    "model.members": 3,
    "model.elites": 2,
    "model.width": 8,
    "model.depth": 2,
    "model.batch": 16,
    "model.schedule": "fixed",
    "model.fit_steps": 20,
    "model.round_steps": 10,
    "model.patience": 3,
    "model.max_holdout": 40,
    "rollout.batch": 8,
    "replay.real": 120,
    "replay.synthetic": 64,
    "eval.every": 10,
}
#: The same for an agent with other fields than SAC's.
SMALL_OF_ANY = {name: value for name, value in SMALL.items() if not name.startswith("agent.")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-tasks", action="store_true", help="test every task of the device engine (an hour)"
    )
    parser.addoption(
        "--states", type=int, default=0, help="seed of the states that device tasks are tested on"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "all_tasks: runs with --all-tasks only")
    # A core for each of the processes that share the tests: threads that wait for each other's take
    # more from the other process than they give.
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-tasks"):
        skipped = [item for item in items if item.get_closest_marker("all_tasks")]
        items[:] = [item for item in items if item not in skipped]
        config.hook.pytest_deselected(items=skipped)


@pytest.fixture
def optimised() -> Iterator[None]:
    """For a test that runs its programs for longer than they take to be compiled."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often methods of the algorithm were traced, by their names."""
    times: Counter[str] = Counter()

    def count(name: str, method: Callable) -> None:
        def counted(self, *arguments):
            times[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(Algorithm, name, counted)

    for name in ("fit", "learn", "propose", "train_member", "value"):
        count(name, getattr(Algorithm, name))
    return times


@pytest.fixture(scope="session")
def spec() -> EnvSpec:
    """Three observations, two actions, and an end where the first observation passes 5."""
    return EnvSpec("walk", 3, 2, 50, ("x", "y", "z"), lambda obs, action, new: new[0] > 5)


@pytest.fixture(scope="session")
def make() -> Callable[..., config.Config]:
    """`make_config` with small sizes: make({"learn.utd": 3}, fixes=["scale"], seeds=2)."""

    def small(settings=(), *, steps=100, **arguments):
        return make_config(
            "walk", preset="paper", settings=SMALL | dict(settings), steps=steps, **arguments
        )

    return small
