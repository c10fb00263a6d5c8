"""Lattice Sampling: a few positions of every map, the same in each image and step.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features,
``P`` positions of a map.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_sbn.arguments import positive_ints
from flax_sbn.sampling import check_known
from flax_sbn.windows import EVERYTHING, Part
from flax_sbn.xla.transposes import Form, linear


@dataclasses.dataclass(frozen=True)
class LatticeSampling:
    r"""A few positions of every map, spread so that all lines and columns count alike.

    The positions are the same in all images, on all devices and in every step: nothing
    is drawn, and no key is needed. A map of :math:`L \times L` is measured at ``P``
    positions, no two of which share a line or a column:

    .. math::
      \begin{aligned}
      h_i &= s i + \lfloor s / 2 \rfloor \\
      w_i &= \lfloor (2 k_i + 1) L / 2P \rfloor \\
      k_i &= (a i + \lfloor P / 2 \rfloor) \bmod P
      \end{aligned}

    for ``i`` from 0 to ``P - 1``, with the smallest step ``s`` for which
    :math:`P = \lceil L / s \rceil` is at most ``4 * num_positions``, and ``a`` prime to
    ``P`` such that the positions are far from each other. So a map of up to 32 lines is
    measured once on each line and once on each column, its borders as often as they
    occur: whatever is particular to single lines and columns cancels. Other numbers of
    spatial axes are treated likewise, and a map of few lines is measured several times
    on each.

    Where that would be every position, and where there are no spatial axes, as after a
    dense layer, the whole batch is measured. That is ordinary batch norm, and costs
    little there, so one sampler serves a whole model.

    Attributes:
      num_positions: about the least number of positions of a map, as far as it has that
        many; at most four times as many are measured, one on each line.
      min_values: about the least number of values per feature in the batch, as far as
        it has that many: small batches are measured at more positions of each image.
        Ignored while the batch size is unknown, as in an export for any batch size.

    Raises:
      ValueError: if a number is not a positive int.

    Example:
      >>> import jax
      >>> from flax_sbn import LatticeSampling, batch_norm, num_measured
      >>> [num_measured(LatticeSampling(), (128, n, n)) // 128 for n in (7, 14, 28, 56)]
      [7, 14, 28, 28]
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (128, 32, 32, 16))
      >>> y, statistics = batch_norm(x, sampler=LatticeSampling())
      >>> print(f"{abs(y.mean()):.1f} {y.std():.1f}")
      0.0 1.0

    The sampler is ours, not the paper's.
    """

    num_positions: int = 8
    min_values: int = 128

    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_ints(self, "num_positions", "min_values")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the positions, or everything."""
        images, *extent = shape
        check_known(self, extent)
        wanted = self.num_positions
        if isinstance(images, int):
            wanted = max(wanted, -(-self.min_values // images))
        lattice = _lattice(tuple(extent), wanted, 4 * self.num_positions)
        if len(lattice.positions) == math.prod(extent):
            return (EVERYTHING,)
        return (Part(1.0, (lattice,)),)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Positions of a map, one in each of its cells, the same in every image.

    Attributes:
      cells: number of cells along each spatial axis.
      sides: extent of a cell on each; the last ones may be cut.
      positions: one in each cell, the cells in row-major order.
    """

    cells: tuple[int, ...]
    sides: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]

    def sampled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the extent of what is taken, of measured axes of extent ``shape``."""
        return (shape[0], len(self.positions), *[1] * (len(self.cells) - 1))

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Returns the values at the positions, along the first of the spatial axes."""
        # Of slices JAX would make the sum of as many padded arrays.
        take = functools.partial(self._take, axes)
        put = functools.partial(self._put, axes, x.shape)
        [values] = linear(Form(take, put), [], [x])
        return values

    def _take(self, axes: Sequence[int], x: jax.Array) -> list[jax.Array]:
        blocks = []
        for position in self.positions:
            start, stop = [0] * x.ndim, list(x.shape)
            for axis, at in zip(axes[1:], position, strict=True):
                start[axis], stop[axis] = at, at + 1
            blocks.append(lax.slice(x, start, stop))
        return [lax.concatenate(blocks, axes[1])]

    def _put(
        self, axes: Sequence[int], shape: Sequence[int], values: jax.Array
    ) -> list[jax.Array]:
        spatial, first = axes[1:], axes[1]
        values = jnp.squeeze(values, spatial[1:])
        before, after = values.shape[:first], values.shape[first + 1 :]
        values = values.reshape(*before, *self.cells, *after)
        values = jnp.moveaxis(values, range(first, first + len(spatial)), spatial)
        # Each spatial axis becomes two, which cell and where in it.
        within = [axis + 1 + i for i, axis in enumerate(spatial)]
        values = jnp.expand_dims(values, within)
        spread, whole = list(values.shape), list(shape)
        for axis, inner, side in zip(spatial, within, self.sides, strict=True):
            spread[inner], whole[axis] = side, spread[inner - 1] * side
        values = jnp.broadcast_to(values, spread).reshape(whole)
        values = lax.slice(values, [0] * len(shape), shape)
        here = np.zeros([shape[axis] for axis in spatial], bool)
        here[tuple(np.transpose(self.positions))] = True
        others = [axis for axis in range(len(shape)) if axis not in spatial]
        here = np.expand_dims(here, others)
        return [jnp.where(here, values, jnp.zeros((), values.dtype))]


@functools.cache
def _lattice(extent: tuple[int, ...], wanted: int, lines: int) -> Lattice:
    """Returns about ``wanted`` positions or more, up to one on each of ``lines``."""
    cells, sides = [1] * len(extent), list(extent)
    missing = wanted
    order = sorted(range(len(extent)), key=lambda axis: -extent[axis])
    for axis in order:
        # Several on a line only where a line each is by far too little.
        most = max(lines, wanted) if axis == order[0] else missing
        sides[axis] = -(-extent[axis] // most)
        cells[axis] = -(-extent[axis] // sides[axis])
        missing = max(1, round(missing / cells[axis]))
    longest = cells.index(max(cells)) if cells else 0
    positions = []
    for cell in itertools.product(*map(range, cells)):
        position = []
        turn = 1
        for axis, length in enumerate(extent):
            start = cell[axis] * sides[axis]
            room = min(sides[axis], length - start)
            if axis == longest:
                offset = room // 2
            else:
                turn = turn * _multiplier(cells[longest]) % cells[longest]
                k = (turn * cell[longest] + cells[longest] // 2) % cells[longest]
                offset = (2 * k + 1) * room // (2 * cells[longest])
            position.append(start + offset)
        positions.append(tuple(position))
    return Lattice(tuple(cells), tuple(sides), tuple(positions))


@functools.cache
def _multiplier(n: int) -> int:
    """Returns the ``a`` prime to ``n`` that keeps points ``(i, a i mod n)`` far apart.

    Distances are those on a torus. Among equals it is the largest.
    """

    def distance(a: int) -> int:
        along = ((i, a * i % n) for i in range(1, n))
        return min(min(i, n - i) ** 2 + min(j, n - j) ** 2 for i, j in along)

    coprime = [a for a in range(1, n + 1) if math.gcd(a, n) == 1]
    return max(coprime, key=lambda a: (distance(a), a)) if n > 1 else 1
