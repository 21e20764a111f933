"""What lives on which device: a process's rows, or the members of a row that is alone.

Rows never need each other, so a device runs the program of its own rows, its own loops included:
`shard_map`, and not a partitioner, which would let every row-dependent loop ask all devices whether
it is over. Where the devices cannot share the rows equally, copies of the last row fill the last
device. No copy leaves: the logs, checkpoints and results are those of the rows alone.
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

_AXIS = "rows"
#: How arrays lie on the devices: every device has all of it, or its own rows of it.
EVERYWHERE, BY_ROWS = P(), P(_AXIS)
#: The same for a whole state.
STATE = TrainState(cast(Any, EVERYWHERE), cast(Any, BY_ROWS))


class Placement(NamedTuple):
    """Rows on devices."""

    num_learners: int
    mesh: Mesh  # the devices, in one dimension
    learners_per_device: int  # rows on a device, copies included

    @property
    def padded_size(self) -> int:
        """Rows with the copies."""
        return self.mesh.size * self.learners_per_device

    def local_learners(self, tree: Any) -> Any:
        """A device's rows of leaves (rows, ...); for use inside what `spread` maps."""
        if self.mesh.size == 1:
            return tree
        index = jax.lax.axis_index(_AXIS) * self.learners_per_device + jnp.arange(
            self.learners_per_device
        )
        return jax.tree.map(lambda x: x[jnp.minimum(index, self.num_learners - 1)], tree)

    def shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def jit_sharded(
        self,
        function: Callable[..., Any],
        inputs: Any,
        outputs: Any,
        jit: Callable[..., jax.stages.Wrapped] = backend.jit,
        **arguments: Any,
    ) -> jax.stages.Wrapped:
        """Jits a function of one device's rows, as one program for all devices.

        Args:
          inputs, outputs: prefixes of the arguments' and the results' trees, whose leaves say how
            they lie on the devices.
          jit: `jax.jit` for what is only asked for its shapes too, where options are refused.
          arguments: for `jit`.
        """
        # What is the same on all devices is so because every device computes the same.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return jit(
            mapped,
            in_shardings=self.shardings(inputs),
            out_shardings=self.shardings(outputs),
            **arguments,
        )

    def send(self, tree: Any) -> Any:
        """A copy on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, EVERYWHERE))

    def shapes(self, specs: Any, tree: Any) -> Any:
        """A tree's shapes, which know where they lie.

        A program that is lowered for these is not traced again for arrays that lie there, as it is
        after shapes that do not know it.
        """

        def with_sharding(spec: P, part: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
            )

        return jax.tree.map(with_sharding, specs, tree)

    def check_memory(self, needed: int) -> int:
        """Bytes that the rows of a device need, if it has them.

        Raises:
          UsageError: it has not.
        """
        if needed > backend.FILLED * (there := backend.available(self.mesh.size)):
            raise UsageError(
                f"--seeds: {self.learners_per_device} rows on a device take {needed / 2**30:.1f} GiB, and it has "
                f"{there / 2**30:.1f}; take fewer seeds or variants, or lower "
                "--set replay.real and replay.synthetic"
            )
        return needed

    def unpad(self, tree: Any) -> Any:
        """Leaves (places, ...) without the copies."""
        if self.padded_size == self.num_learners:
            return tree
        return jax.tree.map(lambda x: np.asarray(x)[: self.num_learners], tree)


def put(tree: Any, like: Any) -> Any:
    """Numpy arrays as JAX's own, which may be donated.

    Args:
      like: arrays or shapes: the sharding of each, and how many places its rows fill; those that
        are missing become copies of the last.
    """

    def one(value: np.ndarray, like: Any) -> Any:
        if like.ndim and (missing := like.shape[0] - value.shape[0]):
            value = np.concatenate([value, np.repeat(value[-1:], missing, 0)])
        # An uncommitted array must stay one, or the first jitted call would compile again.
        known = like.sharding is not None and getattr(like, "committed", True)
        return jax.device_put(value, like.sharding) if known else value

    # On CPU JAX shares the memory of an aligned numpy array, even with may_alias=False, and such
    # memory must not be donated. What a program returns is JAX's own.
    return _copy(jax.tree.map(one, tree, like))


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def place(rows: int, devices: Sequence[jax.Device]) -> Placement:
    """Spreads rows evenly over devices.

    No more devices are taken than the fullest one leaves work for: six rows on four devices are two
    on each of three.
    """
    learners_per_device = -(-rows // len(devices))
    used = -(-rows // learners_per_device)
    return Placement(rows, Mesh(np.array(devices[:used]), (_AXIS,)), learners_per_device)
