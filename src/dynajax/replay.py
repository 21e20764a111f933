"""A ring of transitions as pure functions on arrays.

A slot is drawn only while it is `valid`: dropped transitions and the ends of rollouts leave holes.
Draws are even among the valid slots, by rejection: draw among the filled slots, and redraw those
that hit a hole. This is exact and costs nothing where there is no hole.
"""

import chex
import jax
import jax.numpy as jnp

from dynajax.types import Array, Replay, Transition

#: Redraws before a hole is taken as it is; with one slot in 100 valid it happens once in 20,000.
MAX_REDRAWS = 1000


def init(capacity: int, obs_dim: int, action_dim: int, *, weighs: bool = False) -> Replay:
    """An empty ring of N = `capacity` slots, with a column of weights if it `weighs`."""
    return Replay(
        data=Transition(
            obs=jnp.zeros((capacity, obs_dim)),
            action=jnp.zeros((capacity, action_dim)),
            reward=jnp.zeros(capacity),
            discount=jnp.zeros(capacity),
            next_obs=jnp.zeros((capacity, obs_dim)),
        ),
        valid=jnp.zeros(capacity, bool),
        weight=jnp.zeros(capacity) if weighs else None,
    )


def add(
    replay: Replay,
    transitions: Transition,
    valid: Array,
    count: Array,
    weight: Array | None = None,
) -> Replay:
    """Writes B transitions over the oldest.

    Args:
      transitions, valid: leaves (B, ...), (B,). B divides N, so that a block never wraps.
      count: () transitions that were added so far, a multiple of B. It is an argument, not part
        of the ring, because all rows share it: under vmap an unbatched position keeps this a
        slice update in place.
      weight: (B,) where the ring has a column of them.
    """
    (capacity,) = replay.valid.shape
    start = count % capacity

    def write(ring: Array, block: Array) -> Array:
        at = (start,) + (0,) * (ring.ndim - 1)
        return jax.lax.dynamic_update_slice(ring, block.astype(ring.dtype), at)

    block = Replay(transitions, valid, weight)
    chex.assert_equal_shape_prefix(jax.tree.leaves(block), 1)
    return jax.tree.map(write, replay, block)


def draw(key: Array, replay: Replay, count: Array, shape: tuple[int, ...]) -> Array:
    """Slots of valid transitions, evenly and independently: int `shape`.

    Args:
      count: () transitions that were added so far.
    """
    size = jnp.clip(count, 1, replay.valid.shape[0])
    first_key, key = jax.random.split(key)

    def fresh(key: Array) -> Array:
        return jax.random.randint(key, shape, 0, size)

    def holes(carry: tuple[Array, Array, Array]) -> Array:
        slots, _, tries = carry
        return (tries < MAX_REDRAWS) & ~replay.valid[slots].all()

    def redraw(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slots, key, tries = carry
        key, redraw_key = jax.random.split(key)
        return jnp.where(replay.valid[slots], slots, fresh(redraw_key)), key, tries + 1

    return jax.lax.while_loop(holes, redraw, (fresh(first_key), key, jnp.zeros((), jnp.int32)))[0]


def take(replay: Replay, slots: Array) -> Transition:
    """The transitions in `slots`: leaves (*slots.shape, ...)."""
    return jax.tree.map(lambda ring: ring[slots], replay.data)
