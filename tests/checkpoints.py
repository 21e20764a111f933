"""States of every kind, and how the tests save, restore and look at them."""

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
    LearnerState,
    ModelState,
    Replay,
    Shared,
    TargetTransform,
    TrainState,
    Transition,
)

S, N, D, A = 2, 8, 3, 2


def transitions(numbers: np.ndarray) -> Transition:
    """The transitions with these numbers, (S, n, ...); each number has contents of its own."""
    x = np.arange(1, S + 1)[:, None] * 1000 + numbers.astype(np.float32)
    wide = x[..., None] + np.linspace(0, 0.5, D, dtype=np.float32)
    return Transition(wide, -wide[..., :A], x / 7, (numbers % 3 > 0) * np.ones_like(x), wide + 1)


def ring(count: int, capacity: int = N) -> Replay:
    """The real replay as it is when `count` transitions have been inserted."""
    numbers = np.arange(max(0, count - capacity), count)
    data = jax.tree.map(
        lambda x: np.zeros((S, capacity, *x.shape[2:]), np.float32), transitions(numbers)
    )
    valid = np.zeros((S, capacity), bool)
    for whole, new in zip((*data, valid), (*transitions(numbers), numbers % 5 != 2), strict=True):
        whole[:, numbers % capacity] = new
    return replay.pack(Transition(*map(jnp.asarray, data)), jnp.asarray(valid))


@functools.cache
def make_state(count: int, seed: int = 0, capacity: int = N, width: int = 4) -> TrainState:
    """A state with every kind of leaf that training has."""
    random = np.random.default_rng(seed + count)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((S, *shape)), jnp.float32)

    params = {"Dense_0": {"kernel": normal(D, width), "bias": normal(width)}}
    optimiser = jax.vmap(optax.adam(1e-3).init)(params)
    agent = SACState(params, params, params, normal(), optimiser, optimiser, optimiser)
    elites = jnp.asarray(random.integers(0, 5, (S, 2)), jnp.int32)
    code = TargetTransform(normal(D), normal(D + 1), normal(D + 1), normal())
    model = ModelState(
        params,
        optimiser,
        code,
        normal(5),
        normal(5),
        normal(D + 1),
        normal(D + 1) > 0,
        elites,
        elites[:, 0],
    )
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(S) + seed + count)
    config = jax.tree.map(lambda x: jnp.full(S, x, jnp.float32), Config())
    imagined = Transition(normal(6, 1), normal(6, 1), normal(6), normal(6), normal(6, 1))
    synthetic = replay.pack(imagined, normal(6) > 0, normal(6))
    real, trust = ring(count, capacity), (normal(), {"threshold": normal(D)})
    row = LearnerState(config, jnp.arange(S), keys, keys + 1, agent, real, model, synthetic, trust)
    return TrainState(Shared(jnp.asarray(count, jnp.int32), jnp.asarray(3, jnp.int32)), row)


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save(checkpoints: Checkpoints, *counts: int) -> None:
    for count in counts:
        checkpoints.save(count * 10, make_state(count), {}, {"count": count})


def pieces(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "replay").iterdir())


def newest(folder: Path) -> Path:
    return sorted(folder.glob("*-step-*"))[-1]


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def data_file(folder: Path) -> Path:
    """The file of the arrays' numbers, all others being descriptions."""
    return max(files(folder), key=lambda p: p.stat().st_size * (p.name != "meta.json"))


def opened(folder: Path) -> Any:
    """What Orbax alone makes of a checkpoint or a piece."""
    return orbax.checkpoint.PyTreeCheckpointer().restore(folder)


def restore(folder: Path, keep: int = 2) -> tuple[Checkpoints, checkpoint.Restored]:
    checkpoints = Checkpoints(folder, keep)
    restored = checkpoints.restore(make_state(0))
    assert restored is not None
    return checkpoints, restored
