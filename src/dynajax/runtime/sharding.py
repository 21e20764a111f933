"""Placement of learners on devices, or of the ensemble members of a single learner.

Learners do not exchange data, so each device runs the program of its own learners, loops included.
This uses `shard_map`: a partitioner would add a collective to every loop whose length depends on a
learner's data. If the learners do not divide evenly among the devices, the last device is padded
with copies of the last learner. Logs, checkpoints and results never contain the copies.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dynajax.types import TrainState, UsageError
from dynajax.xla import backend

_AXIS = "learners"
#: Arrays that are replicated on all devices, and arrays that are split along the learners.
EVERYWHERE, BY_LEARNERS = P(), P(_AXIS)
#: The same for a whole state.
STATE = TrainState(cast(Any, EVERYWHERE), cast(Any, BY_LEARNERS))


class Placement(NamedTuple):
    """Learners on devices."""

    num_learners: int  # without padding
    mesh: Mesh  # the devices, in one dimension
    learners_per_device: int  # padding included

    @property
    def padded_size(self) -> int:
        """Return the number of learners, padding included."""
        return self.mesh.size * self.learners_per_device

    def local_learners(self, tree: Any) -> Any:
        """Return the device's part of leaves (num_learners, ...), inside a sharded function."""
        if self.mesh.size == 1:
            return tree
        index = jax.lax.axis_index(_AXIS) * self.learners_per_device + jnp.arange(
            self.learners_per_device
        )
        return jax.tree.map(lambda x: x[jnp.minimum(index, self.num_learners - 1)], tree)

    def unpad(self, tree: Any) -> Any:
        """Return leaves (padded_size, ...) without the padding, as numpy arrays if there is any."""
        if self.padded_size == self.num_learners:
            return tree
        return jax.tree.map(
            lambda x: (x if _is_typed_key(x) else np.asarray(x))[: self.num_learners], tree
        )

    def shardings(self, specs: Any) -> Any:
        """Return the shardings of a tree of partition specs."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def jit_sharded(
        self,
        function: Callable[..., Any],
        inputs: Any,
        outputs: Any,
        **arguments: Any,
    ) -> jax.stages.Wrapped:
        """Jit a function of one device's learners as one program for all devices.

        Args:
          function: takes and returns the learners of one device.
          inputs, outputs: partition specs, as prefixes of the trees of arguments and results.
          arguments: passed to `backend.jit`.
        """
        # Replicated results are equal on all devices because each device computes them.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return backend.jit(
            mapped,
            in_shardings=self.shardings(inputs),
            out_shardings=self.shardings(outputs),
            **arguments,
        )

    def send(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, EVERYWHERE))

    def shapes(self, specs: Any, tree: Any) -> Any:
        """Return the shapes of a tree, with shardings.

        A program that was lowered for shapes without shardings is traced again when it is called
        with sharded arrays.
        """

        def with_sharding(spec: P, part: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
            )

        return jax.tree.map(with_sharding, specs, tree)

    def check_memory(self, needed: int, environments: int = 0) -> int:
        """Return the number of bytes that are needed on a device, if the device has them.

        Args:
          needed: bytes of the learners of a device.
          environments: bytes that environments need on the host, whose memory CPU devices share.

        Raises:
          UsageError: the device has less memory.
        """
        beside = environments // self.mesh.size if backend.target_is_cpu() else 0
        if needed + beside > backend.FILLED * (available := backend.available(self.mesh.size)):
            counted, remedy = "", ""
            if beside:
                counted = f" and their environments {beside / 2**30:.1f}"
                remedy = ", or --set eval.episodes"
            raise UsageError(
                f"--seeds: {self.learners_per_device} learners on one device need "
                f"{needed / 2**30:.1f} GiB{counted}, but it has {available / 2**30:.1f}; use fewer "
                f"seeds or variants, or lower --set replay.real and replay.synthetic{remedy}"
            )
        return needed


def _is_typed_key(leaf: Any) -> bool:
    """Return whether an array, or the shape of one, has PRNG keys as `jax.random.key` makes them."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def to_host(leaf: Any) -> np.ndarray:
    """Return an array as a numpy array, and of typed PRNG keys their data; see `from_host`."""
    return np.asarray(jax.random.key_data(leaf) if _is_typed_key(leaf) else leaf)


def host_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of `to_host` for an array, or for the shape of one."""
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(jax.random.key_data, shape) if _is_typed_key(leaf) else shape


def from_host(value: np.ndarray, like: Any) -> Any:
    """Return the result of `to_host` with the type that `like` has."""
    if not _is_typed_key(like):
        return value
    implementation = jax.random.key_impl(jnp.zeros((), like.dtype))
    return jax.random.wrap_key_data(jnp.asarray(value), impl=implementation)


def put(tree: Any, like: Any) -> Any:
    """Convert numpy arrays to JAX arrays that may be donated.

    Args:
      tree: numpy arrays, see `to_host`.
      like: arrays or shapes, with the sharding and the padded size of each; missing learners become
        copies of the last one.
    """

    def convert(value: np.ndarray, like: Any) -> Any:
        if like.ndim and (missing := like.shape[0] - value.shape[0]):
            value = np.concatenate([value, np.repeat(value[-1:], missing, 0)])
        value = from_host(value, like)
        # An uncommitted array must stay uncommitted, or the first jitted call compiles again.
        committed = like.sharding is not None and getattr(like, "committed", True)
        return jax.device_put(value, like.sharding) if committed else value

    # On a CPU JAX shares the memory of an aligned numpy array, even with may_alias=False, and such
    # memory must not be donated. The results of a jitted program own their memory.
    return _copy(jax.tree.map(convert, tree, like))


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def place(num_learners: int, devices: Sequence[jax.Device]) -> Placement:
    """Distribute learners evenly over devices.

    Devices that would only hold padding are not used: six learners on four devices are placed as
    two on each of three devices.
    """
    learners_per_device = -(-num_learners // len(devices))
    used = -(-num_learners // learners_per_device)
    return Placement(num_learners, Mesh(np.array(devices[:used]), (_AXIS,)), learners_per_device)
