"""Samplers that the library does not have, to compare its own with.

Both measure the same number of positions of every map, features last.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from flax_sbn.windows import EVERYTHING, Part


@dataclasses.dataclass(frozen=True)
class Grid:
    """A regular grid of ``side x side`` positions, the same in every image.

    Attributes:
      side: positions along each spatial axis.
    """

    side: int

    needs_key: ClassVar[bool] = False

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the middles of as many equal parts of each axis."""
        if max(shape[1:]) <= self.side:
            return (EVERYTHING,)
        lines = tuple(
            tuple((2 * i + 1) * length // (2 * self.side) for i in range(self.side))
            for length in shape[1:]
        )
        return (Part(1.0, (_Lines(lines),)),)


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Random positions, others in every image.

    Attributes:
      count: positions of each image, drawn independently.
    """

    count: int

    needs_key: ClassVar[bool] = True

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Draws positions for each image."""
        size = math.prod(shape[1:])
        if size <= self.count:
            return (EVERYTHING,)
        assert key is not None
        places = jax.random.randint(key, (shape[0], self.count), 0, size)
        return (Part(1.0, (_Places(places),)),)


@dataclasses.dataclass(frozen=True)
class _Lines:
    """All crossings of some lines of each spatial axis."""

    lines: tuple[tuple[int, ...], ...]

    def sampled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *map(len, self.lines))

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        for axis, lines in zip(axes[1:], self.lines, strict=True):
            x = jnp.take(x, jnp.array(lines), axis)
        return x


@dataclasses.dataclass(frozen=True)
class _Places:
    """Positions of each image, ``(N, P)``, numbered along its lines."""

    places: jax.Array

    def sampled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], self.places.shape[1], *[1] * (len(shape) - 2))

    def take(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        rows, *spatial, features = x.shape
        flat = x.reshape(rows, math.prod(spatial), features)
        values = jnp.take_along_axis(flat, self.places[..., None], 1)
        return values.reshape(*self.sampled_shape(x.shape[:-1]), features)
