"""Accelerators that programs can be compiled for ahead of time, and their published numbers.

The properties of a GPU that the compiler needs are from XLA's target configurations
(openxla/xla, xla/backends/gpu/target_config/specs), so only GPUs listed there are supported. Peaks
are those of the matrix units without sparsity, at the default precision of float32 matmuls:
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

#: JAX allocates this fraction of a GPU's memory at its start.
_PREALLOCATED = 0.75


class Accelerator(NamedTuple):
    """A kind of device, or several connected devices of that kind."""

    platform: str  # cuda, tpu or cpu
    topology: str  # in the form that the plugin expects
    arguments: dict[str, Any]  # more arguments of the plugin
    memory: int  # bytes of one device that a program may use
    peak: float  # floating-point operations per second of one device
    bandwidth: float  # bytes per second between a device and its memory
    cache: int  # bytes of the largest cache that all units share
    options: dict[str, str]  # compiler options


def _target_config(name: str, properties: dict[str, float], capability: tuple[int, int]) -> str:
    """Return XLA's description of a GPU, as a text protocol buffer."""
    lines = "\n".join(f"  {key}: {value}" for key, value in properties.items())
    major, minor = capability
    return (
        f"gpu_device_info {{\n{lines}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\n'
        f'device_description_str: "{name}"\n'
    )


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
    """Return the accelerator that consists of one GPU.

    Args:
      name: the device's description.
      peak: floating-point operations per second.
      bandwidth: bytes per second.
      memory: bytes.
      capability: CUDA's compute capability.
      cores, units: number of multiprocessors, and of float32 units in each.
      clock: GHz.
      cache, shared: bytes of the second-level cache, and of a multiprocessor's shared memory.
      threads: maximum number of threads on a multiprocessor.
    """
    properties = {
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
    return Accelerator(
        "cuda",
        "1x1x1",
        {"target_config": _target_config(name, properties, capability), "topology": "1x1x1"},
        int(_PREALLOCATED * memory),
        peak,
        bandwidth,
        cache,
        # Autotuning runs kernels on the device, and there is none.
        {"xla_gpu_autotune_level": "0"},
    )


def _tpu(
    topology: str, *, peak: float, bandwidth: float, memory: float, cache: int, one: bool = False
) -> Accelerator:
    """Return the accelerator that consists of the TPU chips of a topology.

    Args:
      topology: in the form that the plugin expects.
      peak, bandwidth, memory, cache: of each device.
      one: whether the topology is a single chip.
    """
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

#: Accelerators by the name that `--device` takes; the number after a TPU's name counts devices.
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
    # Here JAX counts the two cores of a v4 chip as two devices, each with half of the chip.
    "v4-8": _tpu("v4:2x2x1", peak=137.5e12, bandwidth=614e9, memory=16 * _GIB, cache=16 * 2**20),
    # The processor that this runs on; its peak and bandwidth are unknown.
    "cpu": Accelerator("cpu", "", {}, 0, 0.0, 0.0, 0, {}),
}


def accelerator(name: str) -> Accelerator:
    """Return an accelerator by its name.

    Raises:
      UsageError: the name is unknown.
    """
    if name not in ACCELERATORS:
        raise UsageError(f"--device={name}: choose one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def devices(name: str) -> list[jax.Device]:
    """Return the devices of an accelerator to compile for; they need not be present.

    Raises:
      UsageError: the name is unknown, or the extra with its compiler is not installed.
    """
    wanted = accelerator(name)
    if wanted.platform == "cpu":
        return backend.local_devices()[:1]
    # Otherwise libtpu queries Google's metadata server for the type of this machine.
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
            f"--device={name}: its compiler is not installed ({reason}); install the extra for it, "
            f"pip install -e '.[{extra}]'"
        ) from None
    return list(topology.devices)
