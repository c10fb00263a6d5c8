"""The devices to compile for, one or many, none of which has to be there.

A GPU is described by the figures its driver would report; those here are from the
target configurations that OpenXLA publishes. libtpu knows its TPUs by name.
"""

import dataclasses
import os
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
    """An NVIDIA GPU; the fields are those of OpenXLA's GpuDeviceInfoProto."""

    memory_bandwidth: int
    device_memory_size: int
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
    """A Google TPU, in slices of the sizes of ``_SLICES``."""

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


TARGETS: dict[str, Gpu | Tpu] = {
    "h200": Gpu(memory_bandwidth=4800000000000, device_memory_size=151397597184),
    "h100": Gpu(memory_bandwidth=3352320000000, device_memory_size=84942979072),
    "a100": Gpu(
        memory_bandwidth=2039040000000,
        device_memory_size=85100068864,
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
        core_count=148,
        clock_rate_ghz=1.965,
        l2_cache_size=132644864,
        compute_capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    ),
    "v5e": Tpu(),
    "v6e": Tpu(),
}
