"""A linear layer whose output is sampled, and the norm that folds into it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_sbn.linear_layers import Linear
from flax_sbn.moments import wide
from flax_sbn.normalization import Norm
from flax_sbn.statistics import Statistics
from flax_sbn.windows import Part
from flax_sbn.xla.half_precision import add_shift, offset, round_to
from flax_sbn.xla.sharding import laid_out_by_xla, varying_like


def fold_kernel(
    kernel: jax.Array,
    statistics: Statistics,
    scale: Any = None,
    bias: Any = None,
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns kernel and bias with the norm in them: see :func:`flax_sbn.fold`."""
    factor = lax.rsqrt(statistics.var + epsilon)
    if scale is not None:
        factor = factor * scale
    shift = -statistics.mean * factor
    return scaled(kernel, factor), shift if bias is None else shift + bias


def scaled(kernel: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the kernel with its output features scaled."""
    # Spelled out, so that its gradient sums over all other axes at once: a sum that
    # leaves out those of extent one takes XLA thirty times as long on a CPU.
    return kernel * jnp.broadcast_to(factor, kernel.shape)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer and the norm behind it.

    Attributes:
      linear: maps ``(N, *spatial, I)`` to ``(N, *spatial, C)``.
      shape: of the output.
      epsilon: added to the variance.
      half: whether the computation is in half precision.
      masked: whether some of the output is not measured.
    """

    linear: Linear
    shape: tuple[int, ...]
    epsilon: float
    half: bool
    masked: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """Those of the output that are measured."""
        return tuple(range(len(self.shape) - 1))

    def read(
        self, parts: Sequence[Part], x: jax.Array, kernel: jax.Array
    ) -> list[jax.Array]:
        """Returns the linear layer's output at the positions of each part."""
        extent = self.shape[1:-1]
        return [self.linear.at(x, kernel, part, extent) for part in parts]

    def mean_below(self, parts: Sequence[Part], x: jax.Array) -> jax.Array | None:
        """Returns the input's mean below the positions, if rounding needs it."""
        if not self.half or self.masked:
            return None
        x = lax.stop_gradient(x)
        means = []
        for part in parts:
            below, _ = self.linear.below(x, part, self.shape[1:-1])
            axes = tuple(range(below.ndim - 1))
            means.append(part.weight * below.mean(axes, dtype=jnp.float32))
        return functools.reduce(jnp.add, means)

    def plain(
        self, norm: Norm, x: jax.Array, kernel: jax.Array, scale: Any, bias: Any
    ) -> tuple[jax.Array, Statistics]:
        """Applies the layer, then the norm; returns what :meth:`fold` does."""
        return norm(self.linear(x, round_to(kernel, x.dtype)), scale, bias)

    def fold(
        self, norm: Norm, x: jax.Array, kernel: jax.Array, scale: Any, bias: Any
    ) -> tuple[jax.Array, Statistics]:
        """Measures a sample of the output, folds and applies.

        Returns the output before residual and activation, and the measured statistics.
        """

        def sampled(
            x: jax.Array, kernel: jax.Array, arrays: Any
        ) -> tuple[Statistics, jax.Array | None]:
            given = dataclasses.replace(norm, **arrays)
            parts = given.parts(self.shape[:-1])
            values = self.read(parts, x.astype(kernel.dtype), kernel)
            found = given.statistics(parts, values, self.axes)
            return found, self.mean_below(parts, x)

        # From the wide input, so that gradients are added before they are rounded.
        broad, narrow = wide(x), round_to(kernel, x.dtype)
        statistics, mean = laid_out_by_xla(sampled, broad, narrow, norm.arrays)
        towards = varying_like(jax.typeof(x), norm.target(statistics))
        x = broad.astype(x.dtype)
        return self.apply(x, kernel, towards, mean, scale, bias), statistics

    def apply(
        self,
        x: jax.Array,
        kernel: jax.Array,
        target: Statistics,
        mean: jax.Array | None,
        scale: Any,
        bias: Any,
    ) -> jax.Array:
        """Returns the output, normalized, before residual and activation.

        ``mean`` is that of the input where ``target`` was measured. It corrects the
        rounding of the folded kernel; None leaves that out.
        """
        epsilon = self.epsilon
        folded, shift = fold_kernel(kernel, target, scale, bias, epsilon=epsilon)
        applied = round_to(folded, x.dtype)
        if mean is not None:
            narrow = round_to(kernel, x.dtype)
            rounded, _ = fold_kernel(narrow, target, scale, bias, epsilon=epsilon)
            shift -= offset(mean, applied, rounded)
        return self.shifted(self.linear(x, applied), shift)

    def shifted(self, y: jax.Array, shift: jax.Array) -> jax.Array:
        """Adds to each feature, in float32 or wider."""
        if self.half:
            return add_shift(y, shift)
        # Not broadcast as a whole: that would lie on every device.
        return y + jnp.expand_dims(shift, range(y.ndim - 1))
