"""Accelerators that programs can be compiled for without having one, and their published figures.

What the compiler must know of a GPU is from XLA's target configurations
(openxla/xla, xla/backends/gpu/target_config/specs); a GPU that is not among them is not here. Peaks
are those of matrix units without sparsity, at the precision that float32 products have by default:
TensorFloat-32 on a GPU (NVIDIA's data sheets of H100, H200, A100, RTX A6000), bfloat16 on a TPU
(cloud.google.com/tpu/docs).
"""

import contextlib
import io
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from dynajax.types import UsageError
from dynajax.xla import backend

#: JAX takes this share of a GPU's memory for itself at its start.
_PREALLOCATED = 0.75


class Accelerator(NamedTuple):
    """A kind of device, or several of it beside each other."""

    platform: str  # cuda, tpu or cpu
    topology: str  # as the plugin wants it
    arguments: dict[str, Any]  # further ones for the plugin
    memory: int  # bytes that a program may have on one device
    peak: float  # floating-point operations a second, of one device
    bandwidth: float  # bytes a second between a device and its memory
    cache: int  # bytes nearest to all of its units
    options: dict[str, str]  # for its compiler


def _gpu(
    name: str,
    *,
    peak: float,
    bandwidth: int,
    memory: int,
    capability: tuple[int, int],
    cores: int,
    units: int,
    clock: float,
    cache: int,
    shared: int,
    threads: int = 2048,
) -> Accelerator:
    """One GPU.

    Args:
      capability: CUDA's compute capability.
      cores, units: multiprocessors, and float32 units of one.
      clock: GHz.
      cache, shared: bytes of the second-level cache, and of shared memory of a multiprocessor.
      threads: that a multiprocessor holds at most.
    """
    figures = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 2**10,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in figures.items())
    major, minor = capability
    target = (
        f"gpu_device_info {{\n{lines}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\n'
        f'device_description_str: "{name}"\n'
    )
    return Accelerator(
        "cuda",
        "1x1x1",
        {"target_config": target, "topology": "1x1x1"},
        int(_PREALLOCATED * memory),
        peak,
        bandwidth,
        cache,
        # Kernels are tried out on the device only, and there is none.
        {"xla_gpu_autotune_level": "0"},
    )


def _tpu(
    topology: str, *, peak: float, bandwidth: float, memory: float, cache: int, one: bool = False
) -> Accelerator:
    """TPU chips in a `topology`; figures of each device, of which a v4 chip is one."""
    arguments = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    return Accelerator("tpu", topology, arguments, int(memory), peak, bandwidth, cache, {})


_GIB = 2**30
_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "cores": 132,
    "units": 128,
    "clock": 1.98,
    "cache": 50 * 2**20,
    "shared": 233_472,
    "peak": 495e12,
}
_A100: dict[str, Any] = {
    "capability": (8, 0),
    "cores": 108,
    "units": 64,
    "clock": 1.41,
    "cache": 40 * 2**20,
    "shared": 167_936,
    "peak": 156e12,
}
_V5E: dict[str, Any] = {
    "peak": 197e12,
    "bandwidth": 819e9,
    "memory": 16 * _GIB,
    "cache": 128 * 2**20,
}
_V6E: dict[str, Any] = {
    "peak": 918e12,
    "bandwidth": 1640e9,
    "memory": 32 * _GIB,
    "cache": 128 * 2**20,
}

#: By the name that `--device` takes; a TPU's number is that of its devices.
ACCELERATORS: dict[str, Accelerator] = {
    "h100": _gpu("H100 SXM", bandwidth=3_352_320_000_000, memory=84_942_979_072, **_HOPPER),
    "h200": _gpu("H200", bandwidth=4_800_000_000_000, memory=151_397_597_184, **_HOPPER),
    "a100": _gpu("A100 SXM 40", bandwidth=1_555_200_000_000, memory=42_331_013_120, **_A100),
    "a100-80": _gpu("A100 SXM 80", bandwidth=2_039_040_000_000, memory=85_100_068_864, **_A100),
    "a6000": _gpu(
        "RTX A6000",
        bandwidth=768_096_000_000,
        memory=51_041_271_808,
        capability=(8, 6),
        cores=84,
        units=128,
        clock=1.8,
        cache=6 * 2**20,
        shared=102_400,
        threads=1536,
        peak=77.4e12,
    ),
    "v5e-1": _tpu("v5e:1x1", one=True, **_V5E),
    "v5e-4": _tpu("v5e:2x2", **_V5E),
    "v5e-8": _tpu("v5e:2x4", **_V5E),
    "v6e-1": _tpu("v6e:1x1", one=True, **_V6E),
    "v6e-8": _tpu("v6e:2x4", **_V6E),
    # JAX sees the two cores of a v4 chip as devices of their own here; their chip is shared.
    "v4-8": _tpu("v4:2x2x1", peak=137.5e12, bandwidth=614e9, memory=16 * _GIB, cache=16 * 2**20),
    # The processor that this runs on, without figures.
    "cpu": Accelerator("cpu", "", {}, 0, 0.0, 0.0, 0, {}),
}


def accelerator(name: str) -> Accelerator:
    """The figures of a device by its name.

    Raises:
      UsageError: it is not known.
    """
    if name not in ACCELERATORS:
        raise UsageError(f"--device={name}: choose one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def devices(name: str) -> list[jax.Device]:
    """Devices to compile for, which need not be there.

    Raises:
      UsageError: the name is not known, or the extra with its compiler is missing.
    """
    wanted = accelerator(name)
    if wanted.platform == "cpu":
        return backend.local_devices()[:1]
    # Or libtpu asks a server of Google's for what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            topology = topologies.get_topology_desc(
                wanted.topology, wanted.platform, **wanted.arguments
            )
    except (RuntimeError, NotImplementedError) as error:
        extra = {"cuda": "cuda", "tpu": "tpu"}[wanted.platform]
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--device={name}: its compiler is not here ({reason}); install the extra for it, "
            f"pip install 'dynajax[{extra}]'"
        ) from None
    return list(topology.devices)
