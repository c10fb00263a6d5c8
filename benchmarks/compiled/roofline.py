"""A model of how long a compiled program takes, from what its kernels move and compute.

Each kernel takes as long as its bytes take through the device's memory, or its
floating-point operations at the device's peak, whichever is longer, and as long as it
takes to start; the kernels run one after the other. No program is that fast: no kernel
reaches the peak, and many do not come close. It is not a measurement.
"""

from collections.abc import Iterable

from compiled.kernels import Kernel
from compiled.targets import Gpu, Tpu


def seconds(found: Iterable[Kernel], target: Gpu | Tpu, dtype: str) -> float:
    """Returns the time of a program by the model.

    Args:
      found: its kernels.
      target: the device.
      dtype: of the computation, by which the device's peak differs.

    Example:
      >>> from targets import TARGETS
      >>> small = Kernel("x", "fusion", 48, 0, "", times=1000)
      >>> large = Kernel("y", "convolution", 48, 0, "", flops=989_000_000_000)
      >>> f"{seconds([small, large], TARGETS['h200'], 'bfloat16'):.4f}"
      '0.0030'
    """
    return sum(
        kernel.times
        * (
            max(
                (kernel.read + kernel.written) / target.memory_bandwidth,
                kernel.flops / target.flops[dtype],
            )
            + (0 if kernel.beside else target.launch_seconds)
        )
        for kernel in found
    )
