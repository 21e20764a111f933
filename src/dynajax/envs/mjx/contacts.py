"""Contacts of capsules as C MuJoCo finds them.

MJX 3.17 differs from C MuJoCo in three of its collision functions, whatever the precision:

- Sphere and capsule, capsule and capsule: it adds 1e-6 to denominators, which moves contact points
  by up to some micrometres and turns their normals.
- Capsule and capsule: where the axes cross, their distance is 0 but for rounding, and MJX takes its
  normal from that rounding. C MuJoCo takes the one perpendicular to both axes, so that the links
  of a folded planar body (a hopper on its side) do not push each other apart.
- Plane and capsule: C MuJoCo turns the friction pyramid along the capsule whatever its slope, MJX
  only where the capsule leans by more than 30 degrees from the normal.

The third made a humanoid's velocities wrong by up to several rad/s after one control step on its
own limbs' edges; with all three put right a control step agrees to rounding. `as_in_c` puts these
functions in MJX's place while a program is traced, and leaves other users of MJX alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from mujoco.mjx import GeomType
from mujoco.mjx._src import collision_driver

from dynajax.types import Array

Geom = tuple[Array, Array, Array]  # position (3,), axes (3, 3), size (3,)
Contact = tuple[Array, Array, Array]  # distance (), position (3,), frame (3, 3)


def _frame(normal: Array, along: Array) -> Array:
    """Rows: the normal, `along` made perpendicular to it, and the third direction."""
    along = along - normal * (normal @ along)
    length = jnp.linalg.norm(along)
    along = jnp.where(length > 0, along / jnp.where(length > 0, length, 1), jnp.eye(3)[0])
    return jnp.stack([normal, along, jnp.cross(normal, along)])


def _balls(
    from_1: Array, apart: Array, radius_1: Array, radius_2: Array, crossing: Array
) -> Contact:
    """Two balls, the first at `from_1`, the second at `apart` from it."""
    distance = jnp.linalg.norm(apart)
    # Coordinates are of the size of a body, so this is their rounding.
    touching = distance < 8 * jnp.finfo(distance.dtype).eps
    across = jnp.linalg.norm(crossing)
    sideways = jnp.where(across > 0, crossing / jnp.where(across > 0, across, 1), jnp.eye(3)[0])
    normal = jnp.where(touching, sideways, apart / jnp.where(touching, 1, distance))
    depth = distance - radius_1 - radius_2
    axis = jnp.where(jnp.abs(normal[1]) < 0.5, jnp.eye(3)[1], jnp.eye(3)[2])
    return depth, from_1 + normal * (radius_1 + depth / 2), _frame(normal, axis)


def _plane_capsule(plane: Geom, capsule: Geom) -> Contact:
    """Two contacts, one for each end."""
    (origin, axes, _), (centre, turned, size) = plane, capsule
    normal, axis = axes[:, 2], turned[:, 2]
    ends = centre + jnp.stack([axis, -axis]) * size[1]
    depth = (ends - origin) @ normal - size[0]
    points = ends - normal * (size[0] + depth[:, None] / 2)
    return depth, points, jnp.broadcast_to(_frame(normal, axis), (2, 3, 3))


def _sphere_capsule(sphere: Geom, capsule: Geom) -> Contact:
    (place, turned_1, size_1), (centre, turned_2, size_2) = sphere, capsule
    axis, half = turned_2[:, 2], size_2[1]
    along = jnp.clip((place - centre) @ axis, -half, half)
    apart = centre - place + along * axis
    return _balls(place, apart, size_1[0], size_2[0], jnp.cross(turned_1[:, 2], axis))


def _capsule_capsule(first: Geom, second: Geom) -> Contact:
    """One contact at the closest points, also of parallel capsules (C MuJoCo 3.17: of axes within
    about 2e-4 rad), where C MuJoCo has two."""
    (centre_1, turned_1, size_1), (centre_2, turned_2, size_2) = first, second
    axis_1, axis_2, half_1, half_2 = turned_1[:, 2], turned_2[:, 2], size_1[1], size_2[1]
    apart = centre_2 - centre_1
    cosine, ahead_1, ahead_2 = axis_1 @ axis_2, apart @ axis_1, -apart @ axis_2
    # The closest points of the lines; of parallel ones any will do, for both are clipped. From the
    # cross product, because 1 - cosine^2 keeps nothing in float32 of an angle of a milliradian.
    crossing = jnp.cross(axis_1, axis_2)
    squared_sine = crossing @ crossing
    parallel = squared_sine < (8 * jnp.finfo(cosine.dtype).eps) ** 2
    at_1 = jnp.cross(apart, axis_2) @ crossing / jnp.where(parallel, 1, squared_sine)
    at_1 = jnp.clip(jnp.where(parallel, 0, at_1), -half_1, half_1)
    at_2 = jnp.clip(ahead_2 + cosine * at_1, -half_2, half_2)
    at_1 = jnp.clip(ahead_1 + cosine * at_2, -half_1, half_1)
    on_1, on_2 = at_1 * axis_1, at_2 * axis_2
    return _balls(centre_1 + on_1, apart + on_2 - on_1, size_1[0], size_2[0], crossing)


def _collider(contact: Callable[[Geom, Geom], Any], count: int) -> Callable[..., Any]:
    """Wraps a function of one pair of geoms as MJX's table of them expects."""

    def collide(model: Any, data: Any, _: Any, pairs: Array) -> Any:
        first, second = (
            (data.geom_xpos[ids], data.geom_xmat[ids], model.geom_size[ids]) for ids in pairs.T
        )
        made = jax.vmap(contact)(first, second)
        return jax.tree.map(jnp.concatenate, made) if count > 1 else made

    collide.ncon = count  # type: ignore[attr-defined]
    return collide


_FUNCTIONS = {
    (GeomType.PLANE, GeomType.CAPSULE): _collider(_plane_capsule, 2),
    (GeomType.SPHERE, GeomType.CAPSULE): _collider(_sphere_capsule, 1),
    (GeomType.CAPSULE, GeomType.CAPSULE): _collider(_capsule_capsule, 1),
}


@contextlib.contextmanager
def as_in_c() -> Iterator[None]:
    """MJX traced inside finds capsules' contacts as C MuJoCo does."""
    table = collision_driver._COLLISION_FUNC
    theirs = {pair: table[pair] for pair in _FUNCTIONS}
    table.update(_FUNCTIONS)
    try:
        yield
    finally:
        table.update(theirs)
