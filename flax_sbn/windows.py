"""Blocks of positions, and how to take them out of an array.

Samplers answer in these terms; statistics, and whatever else needs the measured values,
read them through :meth:`Part.take`. Letters in shapes: ``N`` images, ``H W`` spatial
axes (any number of them), ``C`` features.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_sbn.xla.batched_slice import batched_slice

Start = int | jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Equal blocks of positions, one in each of ``runs`` equal runs of images.

    Attributes:
      runs: number of equal, contiguous runs that the images are split into.
      starts: first position of the block on each axis, ``(N, *spatial)``, images
        counted from the beginning of the run: an int, a scalar array, or one entry a
        run. Only with one entry a run may a block stick out of the array: zeros are
        read there.
      sizes: extent of every block on each axis.
    """

    runs: int
    starts: tuple[Start, ...]
    sizes: tuple[int, ...]

    def sampled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the extent of all blocks together, one after the other."""
        return (self.runs * self.sizes[0], *self.sizes[1:])

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Returns the blocks, one after the other along the images.

        Args:
          x: an array whose axes ``axes`` (ascending, images first) are those of the
            windows.
          axes: the measured axes of ``x``.

        Returns:
          An array with the rank and axis order of ``x``.
        """
        batch = axes[0]
        before, after = x.shape[:batch], x.shape[batch + 1 :]
        x = x.reshape(*before, self.runs, x.shape[batch] // self.runs, *after)
        # Axis `batch` now counts runs, and each measured axis has moved up by one.
        starts: list[Start] = [0] * x.ndim
        sizes = list(x.shape)
        scattered: list[tuple[int, jax.Array, int]] = []
        for axis, start, size in zip(axes, self.starts, self.sizes, strict=True):
            if isinstance(start, jax.Array) and start.ndim:
                scattered.append((axis + 1, start, size))
            else:
                starts[axis + 1], sizes[axis + 1] = start, size

        blocks = _slice(x, starts, sizes)
        if scattered:
            along, each, extents = zip(*scattered, strict=True)
            blocks = jnp.moveaxis(blocks, batch, 0)  # axes after it stay
            blocks = batched_slice(blocks, each, along, extents)
            blocks = jnp.moveaxis(blocks, 0, batch)
        return blocks.reshape(
            *before, self.runs * self.sizes[0], *blocks.shape[batch + 2 :]
        )

    def below(self, x: jax.Array) -> jax.Array:
        """Returns what :meth:`take` would, where any block may stick out.

        Args:
          x: an array whose first axes are those of the windows. Zeros are read outside.
        """
        runs = x.reshape(self.runs, -1, *x.shape[1:])
        starts, sizes = (0, *self.starts), (self.runs, *self.sizes)
        fixed = [start for start in starts if isinstance(start, int)]
        if len(fixed) == len(starts):
            rest = runs.shape[len(sizes) :]
            blocks = padded_slice(runs, fixed + [0] * len(rest), sizes + rest)
        else:
            axes = [
                axis
                for axis, (start, size) in enumerate(zip(starts, sizes, strict=True))
                if not isinstance(start, int) or start or size != runs.shape[axis]
            ]
            each = [jnp.asarray(starts[axis], jnp.int32) for axis in axes]
            each = [jnp.broadcast_to(start, self.runs) for start in each]
            blocks = batched_slice(runs, each, axes, [sizes[axis] for axis in axes])
        return blocks.reshape(-1, *blocks.shape[2:])


def padded_slice(
    x: jax.Array, starts: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """Returns a block of known place, zero where it sticks out of the array."""
    # Negative padding crops, too, but takes a TPU 1 % more of a step, XLA estimates.
    first, last, border = [], [], []
    for start, size, n in zip(starts, sizes, x.shape, strict=True):
        first.append(min(max(start, 0), n))
        last.append(min(max(start + size, 0), n))
        before = min(max(-start, 0), size)
        border.append((before, size - before - (last[-1] - first[-1]), 0))
    return lax.pad(lax.slice(x, first, last), jnp.zeros((), x.dtype), border)


def _slice(x: jax.Array, starts: Sequence[Start], sizes: Sequence[int]) -> jax.Array:
    fixed = [start for start in starts if isinstance(start, int)]
    if len(fixed) < len(starts):
        return lax.dynamic_slice(x, [jnp.asarray(s, jnp.int32) for s in starts], sizes)
    return lax.slice(x, fixed, [a + n for a, n in zip(fixed, sizes, strict=True)])


class Selection(Protocol):
    """Positions, as one of which :class:`Part` applies several in turn."""

    def sampled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the extent of what is taken, of measured axes of extent ``shape``."""

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Returns the values, in the rank and axis order of ``x``."""


class Part(NamedTuple):
    """Positions that are measured together.

    Attributes:
      weight: weight of this part's moments in the statistics; those of all parts add up
        to one.
      windows: applied one after the other; none at all means every position.
    """

    weight: float
    windows: tuple[Selection, ...]

    def num_values(self, shape: tuple[int, ...]) -> int:
        """Returns how many values per feature are measured, of extent ``shape``."""
        for windows in self.windows:
            shape = windows.sampled_shape(shape)
        return math.prod(shape)

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Returns the measured values of ``x``, in its rank and axis order."""
        for windows in self.windows:
            x = windows.take(x, axes)
        return x


EVERYTHING = Part(weight=1.0, windows=())


def random_tiles(
    key: jax.Array,
    lengths: Sequence[int],
    sizes: Sequence[int],
    count: int | None = None,
) -> list[Start]:
    r"""Draws one tile of each axis, or several that are spread over them.

    ``L`` positions are covered by :math:`\lceil L / n \rceil` tiles of ``n``, the last
    one moved inwards where ``n`` does not divide ``L``. Where it does, every position
    is measured equally often and the sampled mean is unbiased. (A start drawn among all
    ``L - n + 1`` would look at the first position ``n`` times less often than at the
    centre, which matters at the zero-padded borders of a feature map.)

    Several tiles are each as random as one, but no two are the same before all have
    been drawn, and each is far from those just before it: a lattice over the tiles,
    from a random place.

    Args:
      key: random key.
      lengths: extent of each axis.
      sizes: extent of the tile on each axis.
      count: number of tiles; None for one.

    Returns:
      A start for each axis: an int32 scalar, or an array ``(count,)``; 0 for a whole
      axis.
    """
    tiles = [-(-length // size) for length, size in zip(lengths, sizes, strict=True)]
    total = math.prod(tiles)
    if total == 1:
        return [0] * len(tiles)
    # Of a number that turns out to be one in an exported program, the share wraps
    # around to zero, and the only tile is chosen all the same.
    share = np.uint32(2**32 - 1) // _number(total, np.uint32) + np.uint32(1)
    place = _random_bits(key) // share
    if count is not None:
        steps = _range(count) % total * _lattice_step(tiles) % total
        place = (place + steps.astype(np.uint32)) % np.uint32(total)
    place = lax.optimization_barrier(place)  # not computed again by all that read it
    starts: list[Start] = []
    for length, size, along in zip(lengths, sizes, tiles, strict=True):
        total //= along
        index = place // _number(total, np.uint32) % _number(along, np.uint32)
        start = index.astype(jnp.int32) * size
        last = _number(length - size, np.int32)
        starts.append(jnp.minimum(start, last) if along != 1 else 0)
    return starts


def _number(n: int, dtype: Any) -> Any:
    """Returns for arithmetic an extent, which an exported program may leave open."""
    return dtype(n) if isinstance(n, int) else jnp.asarray(n).astype(dtype)


def _range(n: int) -> Any:
    """Returns the numbers below an extent, which likewise may be left open."""
    return np.arange(n) if isinstance(n, int) else jnp.arange(n, dtype=jnp.uint32)


def _lattice_step(tiles: Sequence[int]) -> int:
    r"""Returns the distance between tiles drawn in turn, in the order of the tiles.

    On the ``j``-th of ``d`` axes it is near the share :math:`\varphi^{-j}` of the
    tiles, with :math:`\varphi^{d + 1} = \varphi + 1`: on one axis the golden section.
    Prime to the number of tiles, it reaches all of them.

    Source: Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences", 2018.
    """
    axes = sum(along > 1 for along in tiles)
    ratio = 1.5
    for _ in range(64):  # a contraction
        ratio = (1 + ratio) ** (1 / (axes + 1))
    step, share = 0, 1.0
    for along in tiles:
        share /= ratio if along > 1 else 1.0
        step = step * along + int(along * share)
    return next(n for n in itertools.count(step) if math.gcd(n, math.prod(tiles)) == 1)


@jax.jit  # the loop is traced once, not in every layer
def _random_bits(key: jax.Array) -> jax.Array:
    """Returns random bits, uint32, by a small hash of the key.

    It is MurmurHash3's finalizer, once for each word of the key. Threefry would be ten
    times as many instructions, which are compiled anew for every layer.
    """
    words = jax.random.key_data(key)

    def mix(i: int | jax.Array, bits: jax.Array) -> jax.Array:
        bits ^= words[i]
        bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    def hashed(bits: jax.Array, unroll: bool) -> jax.Array:
        return lax.fori_loop(0, words.shape[-1], mix, bits, unroll=unroll)

    # On a CPU only a loop keeps the hash out of the large kernels that read the starts.
    return lax.platform_dependent(
        words[-1],
        cpu=functools.partial(hashed, unroll=False),
        default=functools.partial(hashed, unroll=True),
    )
