"""The devices to compile for, one or many; you need not have any of them.

A GPU is described by the figures its driver would report; those here are from the
target configurations that OpenXLA publishes. libtpu knows its TPUs by name. What a
device can do at most, for `roofline`, is from its vendor's data sheet.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

# GpuTargetConfigProto as text, with the versions that a device would report.
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  cuda_compute_capability {{ {compute_capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
"""

_GPUS_IN_HOST = 8
# By number of TPUs; a single one is of the smallest slice that every generation has.
_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}

_ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it would ask the driver
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server either
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: the topology is what counts
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several may compile, as none uses a TPU
}


def look_for_no_devices() -> None:
    """Keeps JAX and libtpu to compiling; to be called before JAX is used."""
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


class MissingCompilerError(RuntimeError):
    """The compiler for a target is not installed."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; most fields are those of OpenXLA's GpuDeviceInfoProto.

    Attributes:
      memory_bandwidth: of its HBM, in bytes a second.
      device_memory_size: of its HBM, in bytes.
      flops: peak of its tensor cores by dtype of the computation, operations a second
        without sparsity. XLA computes products of float32 in TF32.
      launch_seconds: from the end of a kernel to the work of the next one in a stream
        or CUDA graph. Our assumption, no vendor's figure.
      batch_size: that fills it.
    """

    memory_bandwidth: int
    device_memory_size: int
    flops: Mapping[str, float]
    launch_seconds: float = 2e-6
    core_count: int = 132
    fpus_per_core: int = 128
    clock_rate_ghz: float = 1.98
    l2_cache_size: int = 52428800
    shared_memory_per_core: int = 233472
    shared_memory_per_block_optin: int = 232448
    compute_capability: str = "major: 9 feature_extension: ACCELERATED_FEATURES"
    batch_size: int = 256

    def devices(self, name: str, count: int = 1) -> list[Any]:
        """Returns GPUs to compile for, eight to a host if they are more.

        Raises:
          MissingCompilerError: if there is no compiler for them.
          ValueError: if so many do not fill their hosts.
        """
        in_host = min(count, _GPUS_IN_HOST)
        if count % in_host:
            raise ValueError(f"Expected full hosts of {in_host} GPUs, got {count}.")
        return _devices(
            name,
            platform="cuda",
            topology_name=name,
            target_config=_GPU_CONFIG.format(**dataclasses.asdict(self)),
            topology=f"1x{count // in_host}x{in_host}",
        )


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A Google TPU, in slices of the sizes of ``_SLICES``.

    Attributes:
      memory_bandwidth: of its HBM, in bytes a second.
      flops: peak of its matrix units by dtype of the computation, operations a second.
        JAX's default precision computes products of float32 in bfloat16.
      launch_seconds: what a kernel takes at least: the 1,825 cycles that XLA estimates
        for the smallest ones, at the 1.5 GHz at which a v5e's four units of 128 x 128
        reach its peak. That of others is assumed to be the same.
      batch_size: that fills it.
    """

    memory_bandwidth: int
    flops: Mapping[str, float]
    launch_seconds: float
    batch_size: int = 128

    def devices(self, name: str, count: int = 1) -> list[Any]:
        """Returns TPUs to compile for.

        Raises:
          MissingCompilerError: if there is no compiler for them.
          ValueError: if there is no slice of so many.
        """
        if count not in _SLICES:
            sizes = ", ".join(map(str, _SLICES))
            raise ValueError(f"Expected a slice of {sizes} TPUs, got {count}.")
        slice_name = f"{name}:{_SLICES[count]}"
        return _devices(name, platform="tpu", topology_name=slice_name)[:count]


def _devices(name: str, **topology: Any) -> list[Any]:
    try:
        return topologies.get_topology_desc(**topology).devices
    except RuntimeError as error:
        raise MissingCompilerError(
            f"No compiler for {name}: {error}\n`make traffic` installs them."
        ) from error


def _same(peak: float) -> dict[str, float]:
    return dict.fromkeys(("bfloat16", "float32"), peak)


# Peaks: NVIDIA's data sheets of the SXM modules; Google's pages on Cloud TPU.
TARGETS: dict[str, Gpu | Tpu] = {
    "h200": Gpu(
        memory_bandwidth=4800000000000,
        device_memory_size=151397597184,
        flops={"bfloat16": 989e12, "float32": 494e12},
    ),
    "h100": Gpu(
        memory_bandwidth=3352320000000,
        device_memory_size=84942979072,
        flops={"bfloat16": 989e12, "float32": 494e12},
    ),
    "a100": Gpu(
        memory_bandwidth=2039040000000,
        device_memory_size=85100068864,
        flops={"bfloat16": 312e12, "float32": 156e12},
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        l2_cache_size=41943040,
        shared_memory_per_core=167936,
        shared_memory_per_block_optin=166912,
        compute_capability="major: 8",
    ),
    "b200": Gpu(
        memory_bandwidth=7672320000000,
        device_memory_size=191514411008,
        flops={"bfloat16": 2250e12, "float32": 1125e12},
        core_count=148,
        clock_rate_ghz=1.965,
        l2_cache_size=132644864,
        compute_capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    ),
    "v5e": Tpu(
        memory_bandwidth=819000000000, flops=_same(197e12), launch_seconds=1.2e-6
    ),
    "v6e": Tpu(
        memory_bandwidth=1638000000000, flops=_same(918e12), launch_seconds=1.2e-6
    ),
}
