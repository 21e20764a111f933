"""Training states for the checkpoint tests, and helpers to save, restore and inspect them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint

from dynajax import replay
from dynajax.agents.sac import SACState
from dynajax.config import Config
from dynajax.runs import checkpoint
from dynajax.runs.checkpoint import Checkpoints
from dynajax.types import (
    DataStats,
    LearnerState,
    ModelState,
    ReplayBuffer,
    Shared,
    TargetTransform,
    TrainState,
    Transition,
)

S, N, D, A = 2, 8, 3, 2


def transitions(numbers: np.ndarray) -> Transition:
    """Return transitions (S, n, ...) whose content is determined by their numbers."""
    x = np.arange(1, S + 1)[:, None] * 1000 + numbers.astype(np.float32)
    wide = x[..., None] + np.linspace(0, 0.5, D, dtype=np.float32)
    return Transition(wide, -wide[..., :A], x / 7, (numbers % 3 > 0) * np.ones_like(x), wide + 1)


def real_buffer(count: int, capacity: int = N) -> ReplayBuffer:
    """Return the real replay buffer after `count` transitions have been inserted."""
    numbers = np.arange(max(0, count - capacity), count)
    data = jax.tree.map(
        lambda x: np.zeros((S, capacity, *x.shape[2:]), np.float32), transitions(numbers)
    )
    valid = np.zeros((S, capacity), bool)
    for array, new in zip((*data, valid), (*transitions(numbers), numbers % 5 != 2), strict=True):
        array[:, numbers % capacity] = new
    return replay.of_transitions(Transition(*map(jnp.asarray, data)), jnp.asarray(valid))


@functools.cache
def make_state(count: int, seed: int = 0, capacity: int = N, width: int = 4) -> TrainState:
    """Return a state with every kind of leaf that occurs in training."""
    random = np.random.default_rng(seed + count)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((S, *shape)), jnp.float32)

    params = {"Dense_0": {"kernel": normal(D, width), "bias": normal(width)}}
    opt_state = jax.vmap(optax.adam(1e-3).init)(params)
    agent = SACState(params, params, params, normal(), opt_state, opt_state, opt_state)
    elites = jnp.asarray(random.integers(0, 5, (S, 2)), jnp.int32)
    transform = TargetTransform(normal(D), normal(D + 1), normal(D + 1), normal())
    stats = DataStats(transform, normal(5), normal(5), normal(D + 1), normal(D + 1) > 0)
    model = ModelState(params, opt_state, stats, elites, elites[:, 0])
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(S) + seed + count)
    config = jax.tree.map(lambda x: jnp.full(S, x, jnp.float32), Config())
    data = Transition(normal(6, 1), normal(6, 1), normal(6), normal(6), normal(6, 1))
    learners = LearnerState(
        config=config,
        variant=jnp.arange(S),
        key=keys,
        seed_key=keys + 1,
        agent=agent,
        real_buffer=real_buffer(count, capacity),
        model=model,
        synthetic=replay.of_transitions(data, normal(6) > 0, normal(6)),
        trust=(normal(), {"threshold": normal(D)}),
    )
    return TrainState(Shared(jnp.asarray(count, jnp.int32), jnp.asarray(3, jnp.int32)), learners)


def assert_same(got: Any, want: Any) -> None:
    """Assert that two trees have the same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save(checkpoints: Checkpoints, *counts: int) -> None:
    """Save a checkpoint at step 10 * count for each count of real transitions."""
    for count in counts:
        checkpoints.save(count * 10, make_state(count), {}, {"count": count})


def pieces(folder: Path) -> list[str]:
    """Return the names of the stored pieces of the real buffer."""
    return sorted(p.name for p in (folder / "replay").iterdir())


def newest(folder: Path) -> Path:
    """Return the newest checkpoint."""
    return sorted(folder.glob("*-step-*"))[-1]


def files(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def data_file(folder: Path) -> Path:
    """Return the file that contains the array data; all others contain metadata."""
    return max(files(folder), key=lambda p: p.stat().st_size * (p.name != "meta.json"))


def read_with_orbax(folder: Path) -> Any:
    """Read a checkpoint, or a piece of the real buffer, with Orbax alone."""
    return orbax.checkpoint.PyTreeCheckpointer().restore(folder)


def restore(folder: Path, keep: int = 2) -> tuple[Checkpoints, checkpoint.Restored]:
    """Restore the newest checkpoint with a new `Checkpoints` object, and return both."""
    checkpoints = Checkpoints(folder, keep)
    restored = checkpoints.restore(make_state(0))
    assert restored is not None
    return checkpoints, restored
