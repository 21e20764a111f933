"""The platform that programs are compiled for: settings of JAX and XLA, and memory."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dynajax.types import UsageError, reason

# Compiler options of a CPU, chosen by measurement (docs/dev/performance.md). XLA hands batched matmuls
# to YNNPACK, which runs most of them on one thread; its own matmuls use all of them.
_CPU: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}
# LLVM compiles the functions of a learner, many small kernels, in less time than at its default level,
# 3, and they are as fast.
_FAST_COMPILATION: dict[str, Any] = {"xla_backend_optimization_level": 2}
# Functions that do little arithmetic compile in two thirds of the time without MLIR's fusion emitters.
# Updates and fits would take 1.2 and 1.4 times as long.
_NO_EMITTERS: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}
# Initial states are computed once, so that LLVM's level 0 is the fastest.
_ONCE: dict[str, Any] = {"xla_backend_optimization_level": 0}
# A fit spends much time in Adam, which the full width of AVX-512 speeds up; the results are equal.
_WIDE_VECTORS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}

#: Share of a device's memory that programs may fill.
FILLED = 0.9

# The platform that programs are compiled for, if it is not the local one.
_absent: str | None = None


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Compile programs for another platform than the local one within this context."""
    global _absent
    before, _absent = _absent, platform
    try:
        yield
    finally:
        _absent = before


#: Settings of JAX that would change the numbers or stop the programs: name, the value that is needed,
#: and the reason.
_REQUIRED_SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("jax_enable_x64", False, "dynajax trains in float32"),
    ("jax_default_prng_impl", "threefry2x32", "seeds stand for its random numbers"),
    ("jax_numpy_rank_promotion", "allow", "dynajax broadcasts arrays of different ranks"),
    ("jax_numpy_dtype_promotion", "standard", "dynajax relies on it"),
    ("jax_threefry_partitionable", True, "seeds stand for its random numbers"),
    ("jax_random_seed_offset", 0, "seeds stand for its random numbers"),
    ("jax_enable_custom_prng", False, "dynajax saves random keys as plain arrays"),
    ("jax_legacy_prng_key", "allow", "dynajax saves random keys as plain arrays"),
    *(
        (
            f"jax_transfer_guard{way}",
            None,
            "environments on the host exchange arrays with the device",
        )
        for way in ("", "_host_to_device", "_device_to_host", "_device_to_device")
    ),
    ("jax_debug_nans", False, "a metric without data is NaN"),
    ("jax_disable_jit", False, "without compiled programs training does not end"),
)
#: Values of a transfer guard that refuse nothing.
_PERMISSIVE = ("allow", "log")


def check_settings() -> None:
    """Refuse settings of JAX that dynajax cannot work with.

    Raises:
      UsageError: one of them is set; the line names the variable and the remedy.
    """
    for name, needed, why in _REQUIRED_SETTINGS:
        value = getattr(jax.config, name)
        if value == needed or ("transfer_guard" in name and value in _PERMISSIVE):
            continue
        shown = int(value) if isinstance(value, bool) else value
        remedy = "unset it"
        if needed is not None:
            remedy += f', or call jax.config.update("{name}", {needed!r}) first'
        raise UsageError(f"{name.upper()}={shown}: {why}; {remedy}")


@contextlib.contextmanager
def required_settings() -> Iterator[None]:
    """Set the settings that `check_settings` requires within this context, whatever the process has.

    For programs that a user's own process calls, where another library may need other settings.
    """
    with contextlib.ExitStack() as stack:
        for name, needed, _ in _REQUIRED_SETTINGS:
            # The context manager of a setting has its name without "jax_". One that only changes
            # how keys are made from seeds has none; a loaded policy makes no keys.
            setting = getattr(jax, name.removeprefix("jax_"), None)
            if setting is not None:
                stack.enter_context(setting("allow" if needed is None else needed))
        yield


def local_devices() -> list[jax.Device]:
    """Return JAX's local devices.

    Raises:
      UsageError: JAX finds no such devices, or has settings that dynajax cannot work with.
    """
    check_settings()
    check_devices()
    return jax.local_devices()


def check_devices() -> None:
    """Check that JAX finds the devices of JAX_PLATFORMS.

    Raises:
      UsageError: it finds none.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        settings: Any = jax.config
        wanted = settings.jax_platforms
        raise UsageError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device ({reason(error)}); install the extra "
            "for it, pip install -e '.[cuda]' or '.[tpu]', or unset JAX_PLATFORMS"
        ) from None


class Lowering(NamedTuple):
    """Which of several equivalent formulations gives the faster program on a platform.

    Each choice was measured (docs/dev/performance.md); code reads a field instead of asking for
    the platform.
    """

    #: Sums of a LayerNorm as products with a vector of ones; elsewhere its reductions fuse.
    norm_by_products: bool
    #: Cumulative sums of a small index by `cumsum`, which is three or four kernels on a GPU.
    use_cumsum: bool
    #: One matmul for the first layers of all critics, which a GPU has to transpose for.
    join_critics: bool
    #: Members of a fit, and learners, train one after the other, so that a core's cache holds their
    #: weights.
    fits_in_turn: bool
    #: Learners analyse their replay buffers one after the other, because all raw targets at once
    #: would be most of a fit's memory.
    buffers_in_turn: bool
    #: Transpose a kernel or a product explicitly where XLA is slower the other way round.
    transpose_kernels: bool
    #: Round the operands of bfloat16 products explicitly, because the device computes in float32.
    emulate_bfloat16: bool
    #: Train the members of a single learner on all devices, one core each.
    spread_members: bool


CPU = Lowering(
    norm_by_products=True,
    use_cumsum=True,
    join_critics=True,
    fits_in_turn=True,
    buffers_in_turn=False,
    transpose_kernels=True,
    emulate_bfloat16=True,
    spread_members=True,
)
ACCELERATOR = Lowering(
    norm_by_products=False,
    use_cumsum=False,
    join_critics=False,
    fits_in_turn=False,
    buffers_in_turn=True,
    transpose_kernels=False,
    emulate_bfloat16=False,
    spread_members=False,
)


def target_is_cpu() -> bool:
    """Return whether programs are compiled for a CPU."""
    return (_absent or jax.local_devices()[0].platform) == "cpu"


def lowering() -> Lowering:
    """Return the choices for the platform that programs are compiled for."""
    return CPU if target_is_cpu() else ACCELERATOR


def use_cores() -> None:
    """Make a CPU as many devices as it has cores, unless JAX is in use already.

    A learner, or a member, on its own core waits for no other core, and its data stay in that core's
    cache. Other kinds of devices are not affected.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def options(function: str = "") -> dict[str, Any]:
    """Return compiler options for the platform.

    Args:
      function: a function of a learner that has options of its own, see `runtime.program`.
    """
    if not target_is_cpu():
        return {}
    # A seed's initial weights are products of YNNPACK.
    chosen = {} if function == "init" else _CPU
    if function == "fit" and "avx512f" in processor_features():
        chosen = chosen | _WIDE_VECTORS
    if function not in ("", "fit", "learn", "learn_corrected"):
        chosen = chosen | _NO_EMITTERS
    # A program's level would replace the one of JAX_DISABLE_MOST_OPTIMIZATIONS.
    if function and not jax.config.read("jax_disable_most_optimizations"):
        chosen = chosen | (_ONCE if function == "init" else _FAST_COMPILATION)
    unknown = _unknown_options()
    return {name: value for name, value in chosen.items() if name not in unknown}


@functools.cache
def _unknown_options() -> frozenset[str]:
    """Return the names of the options of a CPU that this XLA does not know."""
    every = _CPU | _FAST_COMPILATION | _WIDE_VECTORS | _NO_EMITTERS
    if _are_known(every):
        return frozenset()
    return frozenset(name for name, value in every.items() if not _are_known({name: value}))


def _are_known(chosen: Mapping[str, Any]) -> bool:
    """Return whether this XLA knows some compiler options."""
    try:
        jax.jit(lambda x: x, compiler_options=dict(chosen)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def processor_features() -> frozenset[str]:
    """Return the names of the processor's instruction sets, none if they are not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(features.partition(":")[2].split())


def jit(
    function: Callable[..., Any],
    compiler_options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> jax.stages.Wrapped:
    """Return `jax.jit` of a function with the platform's compiler options, or those that are given."""
    chosen = options() if compiler_options is None else dict(compiler_options)
    return jax.jit(function, compiler_options=chosen, **arguments)


def memory(programs: Sequence[jax.stages.Lowered]) -> int:
    """Compile programs, and return the bytes that the largest needs on each device.

    A later call with arguments of the same shapes does not compile again.
    """
    return max(needed(program.compile()) for program in programs)


def needed(program: jax.stages.Compiled) -> int:
    """Return the bytes of a program's arguments, results and temporaries on each device.

    The result is 0 if the platform does not tell.
    """
    size: Any = program.memory_analysis()
    if size is None:
        return 0
    results = size.output_size_in_bytes - size.alias_size_in_bytes
    return int(size.argument_size_in_bytes + size.temp_size_in_bytes + results)


def count(tree: Any) -> int:
    """Return how many numbers the arrays, or shapes, of a tree have."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def resident_memory() -> int:
    """Return the bytes of memory that this process uses, without what it shares with others."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def available(devices: int) -> int:
    """Return the bytes of a local device's memory when `devices` are in use; CPUs share the host's."""
    stats = local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory() // devices


#: Where control groups version 2 and 1 are, and the name of the files with their memory limits.
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)
#: The control groups of this process: lines such as "0::/user.slice" or "4:memory:/job".
_OWN_GROUPS = Path("/proc/self/cgroup")


def _memory_limits() -> Iterator[Path]:
    """Yield the files with the memory limits of this process's control groups and their parents."""
    (new, new_file), (old, old_file) = _CONTROL_GROUPS
    yield from (new / new_file, old / old_file)
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = (old, old_file) if controllers else (new, new_file)
            folder = Path(path.strip("/"))
            yield from (root / part / name for part in (folder, *folder.parents))


def host_memory() -> int:
    """Return the bytes of memory that this process may use: the host's, or its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _memory_limits():
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            total = min(total, int(path.read_text()))
    return total
