"""Compute the contacts of capsules as C MuJoCo does.

MJX 3.17 differs from C MuJoCo in three collision functions, at any precision:

- Sphere and capsule, capsule and capsule: MJX adds 1e-6 to denominators, which moves contact points
  by up to a few micrometres and rotates their normals.
- Capsule and capsule: if the axes intersect, their distance is 0 up to rounding, and MJX derives
  the normal from the rounding error. C MuJoCo uses the normal perpendicular to both axes, so that
  the links of a folded planar body (a hopper on its side) do not push each other apart.
- Plane and capsule: C MuJoCo always aligns the friction pyramid with the capsule, MJX only if the
  capsule leans by more than 30 degrees from the normal.

Because of the third difference, the velocities of a humanoid that lies on its limbs were wrong by
up to several rad/s after one control step. With all three corrected, a control step agrees up to
rounding. `c_mujoco_contacts` replaces MJX's functions only while a program is traced, so other
users of MJX are not affected.
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


def _contact_frame(normal: Array, along: Array) -> Array:
    """Return the rows normal, `along` orthogonalized to the normal, and their cross product."""
    along = along - normal * (normal @ along)
    length = jnp.linalg.norm(along)
    along = jnp.where(length > 0, along / jnp.where(length > 0, length, 1), jnp.eye(3)[0])
    return jnp.stack([normal, along, jnp.cross(normal, along)])


def _sphere_sphere(
    center_1: Array, offset: Array, radius_1: Array, radius_2: Array, cross: Array
) -> Contact:
    """Return the contact of two spheres.

    Args:
      center_1: (3,) center of the first sphere.
      offset: (3,) from the first center to the second.
      radius_1: () radius of the first sphere.
      radius_2: () radius of the second sphere.
      cross: (3,) cross product of the axes of the geoms, whose direction is the normal if the
        centers coincide.
    """
    distance = jnp.linalg.norm(offset)
    # Coordinates are of the order of a body's size, so this threshold is their rounding error.
    coincide = distance < 8 * jnp.finfo(distance.dtype).eps
    length = jnp.linalg.norm(cross)
    perpendicular = jnp.where(length > 0, cross / jnp.where(length > 0, length, 1), jnp.eye(3)[0])
    normal = jnp.where(coincide, perpendicular, offset / jnp.where(coincide, 1, distance))
    depth = distance - radius_1 - radius_2
    axis = jnp.where(jnp.abs(normal[1]) < 0.5, jnp.eye(3)[1], jnp.eye(3)[2])
    return depth, center_1 + normal * (radius_1 + depth / 2), _contact_frame(normal, axis)


def _plane_capsule(plane: Geom, capsule: Geom) -> Contact:
    """Return two contacts, one for each end of the capsule."""
    (origin, plane_axes, _), (center, capsule_axes, size) = plane, capsule
    normal, axis = plane_axes[:, 2], capsule_axes[:, 2]
    ends = center + jnp.stack([axis, -axis]) * size[1]
    depth = (ends - origin) @ normal - size[0]
    points = ends - normal * (size[0] + depth[:, None] / 2)
    return depth, points, jnp.broadcast_to(_contact_frame(normal, axis), (2, 3, 3))


def _sphere_capsule(sphere: Geom, capsule: Geom) -> Contact:
    (center_1, axes_1, size_1), (center_2, axes_2, size_2) = sphere, capsule
    axis, half = axes_2[:, 2], size_2[1]
    along = jnp.clip((center_1 - center_2) @ axis, -half, half)
    offset = center_2 - center_1 + along * axis
    return _sphere_sphere(center_1, offset, size_1[0], size_2[0], jnp.cross(axes_1[:, 2], axis))


def _capsule_capsule(first: Geom, second: Geom) -> Contact:
    """Return the contact at the closest points of two capsules.

    For parallel capsules C MuJoCo returns two contacts (3.17: if the axes are within about 2e-4
    rad); this function always returns one.
    """
    (center_1, axes_1, size_1), (center_2, axes_2, size_2) = first, second
    axis_1, axis_2, half_1, half_2 = axes_1[:, 2], axes_2[:, 2], size_1[1], size_2[1]
    offset = center_2 - center_1
    cosine, along_1, along_2 = axis_1 @ axis_2, offset @ axis_1, -offset @ axis_2
    # Find the closest points of the two lines. If they are parallel, any point will do, because
    # both are clipped below. Compute the sine from the cross product, because 1 - cosine^2 loses
    # all digits in float32 for angles of a milliradian.
    cross = jnp.cross(axis_1, axis_2)
    squared_sine = cross @ cross
    parallel = squared_sine < (8 * jnp.finfo(cosine.dtype).eps) ** 2
    at_1 = jnp.cross(offset, axis_2) @ cross / jnp.where(parallel, 1, squared_sine)
    at_1 = jnp.clip(jnp.where(parallel, 0, at_1), -half_1, half_1)
    at_2 = jnp.clip(along_2 + cosine * at_1, -half_2, half_2)
    at_1 = jnp.clip(along_1 + cosine * at_2, -half_1, half_1)
    point_1, point_2 = at_1 * axis_1, at_2 * axis_2
    return _sphere_sphere(
        center_1 + point_1, offset + point_2 - point_1, size_1[0], size_2[0], cross
    )


def _collider(contact: Callable[[Geom, Geom], Any], count: int) -> Callable[..., Any]:
    """Wrap a function of one pair of geoms in the form of MJX's table of collision functions."""

    def collide(model: Any, data: Any, _: Any, pairs: Array) -> Any:
        first, second = (
            (data.geom_xpos[ids], data.geom_xmat[ids], model.geom_size[ids]) for ids in pairs.T
        )
        result = jax.vmap(contact)(first, second)
        return jax.tree.map(jnp.concatenate, result) if count > 1 else result

    collide.ncon = count  # type: ignore[attr-defined]
    return collide


_FUNCTIONS = {
    (GeomType.PLANE, GeomType.CAPSULE): _collider(_plane_capsule, 2),
    (GeomType.SPHERE, GeomType.CAPSULE): _collider(_sphere_capsule, 1),
    (GeomType.CAPSULE, GeomType.CAPSULE): _collider(_capsule_capsule, 1),
}


@contextlib.contextmanager
def c_mujoco_contacts() -> Iterator[None]:
    """While tracing MJX, compute the contacts of capsules as C MuJoCo does."""
    table = collision_driver._COLLISION_FUNC
    original = {pair: table[pair] for pair in _FUNCTIONS}
    table.update(_FUNCTIONS)
    try:
        yield
    finally:
        table.update(original)
