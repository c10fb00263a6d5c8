"""Linear layers: convolutions and products, of the whole input or what a part needs.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``I`` input and
``C`` output features.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from jax import lax

from flax_sbn.lattice import Lattice
from flax_sbn.windows import Part, Start, Windows, padded_slice

Padding = str | int | Sequence[int | tuple[int, int]]
Extents = int | Sequence[int] | None  # an int stands for all axes, None for 1
# Flax's names of borders that are not zero, and those of `jnp.pad`.
_BORDERS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


class Linear(abc.ABC):
    """A map of ``x`` and ``kernel``, whose last axis is that of the output.

    Attributes:
      function: what computes it: JAX's product, which is linear in both, or another.
    """

    function: Callable[..., jax.Array]

    @abc.abstractmethod
    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns ``(N, *spatial, C)``."""

    @abc.abstractmethod
    def below(
        self, x: jax.Array, part: Part, extent: Sequence[int]
    ) -> tuple[jax.Array, Self]:
        """Returns the input below a part of the output, and what to apply to that.

        ``extent`` is that of the output's spatial axes.
        """

    def at(
        self, x: jax.Array, kernel: jax.Array, part: Part, extent: Sequence[int]
    ) -> jax.Array:
        """Returns a part of the output; see :meth:`below`."""
        x, here = self.below(x, part, extent)
        return here(x, kernel)


@dataclasses.dataclass(frozen=True)
class MatrixProduct(Linear):
    """A matrix product, position by position."""

    function: Callable[..., jax.Array]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the product."""
        return self.function(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    def below(
        self, x: jax.Array, part: Part, extent: Sequence[int]
    ) -> tuple[jax.Array, Self]:
        """Returns the input at a part, and this."""
        return part.take(x, range(x.ndim - 1)), self


@dataclasses.dataclass(frozen=True)
class Convolution(Linear):
    """A convolution of given geometry.

    Attributes:
      window: extent of the kernel on each spatial axis, as are the following.
      strides: steps of the window.
      padding: zeros before and after, negative ones crop; or a name that JAX knows, or
        that of a border, for :meth:`bordered`.
      input_dilation: one more than the zeros between the input's positions.
      kernel_dilation: likewise of the kernel.
      groups: number of groups of features.
      precision: see :func:`jax.lax.conv_general_dilated`.
      function: what computes it.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    precision: Any
    function: Callable[..., jax.Array]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the convolution."""
        last = x.ndim - 1
        features_last = (0, last, *range(1, last))
        return self.function(
            x,
            kernel,
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                features_last, (last, last - 1, *range(last - 1)), features_last
            ),
            feature_group_count=self.groups,
            precision=self.precision,
        )

    def bordered(self, x: jax.Array) -> tuple[jax.Array, Self]:
        """Returns the input with a border that is not zero, and what to apply to it."""
        if not isinstance(self.padding, str) or self.padding not in _BORDERS:
            return x, self
        reach = self._reach([1] * len(self.window))
        border = [(0, 0), *(((n - 1) // 2, n // 2) for n in reach), (0, 0)]
        x = jnp.pad(x, border, mode=_BORDERS[self.padding])
        return x, dataclasses.replace(self, padding="VALID")

    def below(
        self, x: jax.Array, part: Part, extent: Sequence[int]
    ) -> tuple[jax.Array, Self]:
        """Returns the input below a part, and the convolution there."""
        here = self
        for selection in part.windows:
            if isinstance(selection, Lattice):
                x, here = here._below_lattice(x, selection)
            elif isinstance(selection, Windows):
                x, here = here._below_windows(x, selection, extent)
            else:
                raise TypeError(
                    "Expected a sampler that chooses Windows, got positions of type "
                    f"{type(selection).__name__}, which do not say what of a "
                    "convolution's input is below them. Use Conv and BatchNorm."
                )
            extent = selection.sampled_shape((x.shape[0], *extent))[1:]
        return x, here

    def _below_lattice(self, x: jax.Array, lattice: Lattice) -> tuple[jax.Array, Self]:
        sizes = tuple(self._reach([1] * len(self.window)))
        starts = np.array(lattice.positions) * self.strides
        starts -= [before for before, _ in self._pads(x)]
        x = self._dilated(x, range(len(sizes)))
        block = (x.shape[0], *sizes, x.shape[-1])
        # Block by block, each of which gives one position.
        blocks = [padded_slice(x, (0, *start, 0), block) for start in starts.tolist()]
        here = dataclasses.replace(
            self,
            strides=sizes,
            padding=((0, 0),) * len(sizes),
            input_dilation=(1,) * len(sizes),
        )
        return lax.concatenate(blocks, 1), here

    def _below_windows(
        self, x: jax.Array, windows: Windows, extent: Sequence[int]
    ) -> tuple[jax.Array, Self]:
        here = self
        cut = [i for i, n in enumerate(extent) if windows.sizes[i + 1] != n]
        starts: list[Start] = [windows.starts[0], *[0] * len(extent)]
        sizes = [windows.sizes[0], *x.shape[1:-1]]
        if cut:
            padding, dilation = self._pads(x), list(self.input_dilation)
            x = self._dilated(x, cut)
            sizes[1:] = x.shape[1:-1]
            reach = self._reach(windows.sizes[1:])
            for i in cut:
                at = windows.starts[i + 1] * self.strides[i]
                starts[i + 1], sizes[i + 1] = at - padding[i][0], reach[i]
                padding[i], dilation[i] = (0, 0), 1
            here = dataclasses.replace(
                self, padding=tuple(padding), input_dilation=tuple(dilation)
            )
        return Windows(windows.runs, tuple(starts), tuple(sizes)).below(x), here

    def _dilated(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Returns the input with the zeros of its dilation on some spatial axes."""
        gaps = [n - 1 if i in axes else 0 for i, n in enumerate(self.input_dilation)]
        if not any(gaps):
            return x
        inner = [(0, 0, gap) for gap in (0, *gaps, 0)]
        return lax.pad(x, jnp.zeros((), x.dtype), inner)

    def _pads(self, x: jax.Array) -> list[tuple[int, int]]:
        """Returns the zeros before and after each spatial axis of the input."""
        if isinstance(self.padding, str):
            reach = self._reach([1] * len(self.window))
            return lax.padtype_to_pads(x.shape[1:-1], reach, self.strides, self.padding)
        return list(self.padding)

    def _reach(self, sizes: Sequence[int]) -> list[int]:
        """Returns the extent of the input that a block of the output sees."""
        return [
            (size - 1) * stride + (window - 1) * dilation + 1
            for size, stride, window, dilation in zip(
                sizes, self.strides, self.window, self.kernel_dilation, strict=True
            )
        ]


def make_convolution(
    window: tuple[int, ...],
    strides: Extents,
    padding: Padding,
    input_dilation: Extents,
    kernel_dilation: Extents,
    groups: int,
    precision: Any,
    function: Callable[..., jax.Array],
) -> Convolution:
    """Reads Flax's options and returns the convolution."""
    rank = len(window)
    strides = _per_axis("strides", strides, rank)
    input_dilation = _per_axis("input_dilation", input_dilation, rank)
    kernel_dilation = _per_axis("kernel_dilation", kernel_dilation, rank)
    pads = canonicalize_padding(padding, rank)
    if pads == "CAUSAL":
        if rank != 1:
            raise ValueError(
                f"Expected one spatial axis for padding='CAUSAL', got {rank} of them."
                " Pad with explicit pairs instead."
            )
        pads = [((window[0] - 1) * kernel_dilation[0], 0)]
    if isinstance(pads, str) and any(n > 1 for n in input_dilation):
        raise ValueError(
            f"Expected explicit padding with {input_dilation=}, got {padding=}. "
            "Give a pair for each spatial axis."
        )
    return Convolution(
        window,
        strides,
        pads if isinstance(pads, str) else tuple(pads),
        input_dilation,
        kernel_dilation,
        groups,
        precision,
        function,
    )


def masked_kernel(kernel: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the kernel's entries that a mask leaves, as Flax's convolutions do."""
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ValueError(
            "Mask needs to have the same shape as weights. "
            f"Shapes are: {mask.shape}, {kernel.shape}"
        )
    return kernel * mask


def _per_axis(name: str, value: Extents, rank: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(
            f"Expected {name} to be an int or {rank} of them, one for each spatial "
            f"axis, got {name}={value!r}."
        )
    return values
