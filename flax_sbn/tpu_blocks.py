"""How TPUs take out blocks, and add them: by slices, and by updates in place.

A few are an operation each. Many would be a long program, and slices of single entries
cannot be divided among devices without every device having all entries: those are one
gather and one scatter, of whole blocks, which a TPU runs as loops of slices. See
``batched_slice`` for the arguments.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def sliced(
    x: jax.Array,
    *starts: jax.Array,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
    unrolled: bool,
) -> jax.Array:
    """One slice for each block; or, where blocks are larger, one update."""
    shape = block_shape(x.shape, axes, sizes)
    if math.prod(shape) > math.prod(x.shape):
        zeros = jnp.zeros(shape, x.dtype)
        back = [-start for start in starts]
        return updated(zeros, x, *back, axes=axes, unrolled=unrolled)
    at, extents, offsets = _inside(x.shape, shape, starts, axes)
    window = functools.partial(_window, sizes=shape[1:], axes=axes)
    if unrolled:
        joined = _joined(x)
        blocks = [
            window(
                lax.dynamic_slice(joined, _joined_start(x, at, entry), extents),
                *(offset[entry] for offset in offsets),
            )
            for entry in range(len(x))
        ]
        return jnp.concatenate(blocks).reshape(shape)
    parts = _slices(*_squeezed(x, at, extents))
    return jax.vmap(window)(parts.reshape(len(x), *extents), *offsets)


def updated(
    x: jax.Array,
    blocks: jax.Array,
    *starts: jax.Array,
    axes: tuple[int, ...],
    unrolled: bool,
) -> jax.Array:
    """Adds blocks to ``x`` where they were taken, in place if the compiler can."""
    at, extents, offsets = _inside(x.shape, blocks.shape, starts, axes)
    back = [-offset for offset in offsets]
    window = functools.partial(_window, sizes=extents, axes=axes)
    if unrolled:
        result = _joined(x)
        for entry in range(len(x)):
            start = _joined_start(x, at, entry)
            block = window(blocks[entry], *(offset[entry] for offset in back))
            total = _sum(lax.dynamic_slice(result, start, extents), block)
            result = lax.dynamic_update_slice(result, total, start)
        return result.reshape(x.shape)
    squeezed, at, extents = _squeezed(x, at, extents)
    old = _slices(squeezed, at, extents)
    total = _sum(old, jax.vmap(window)(blocks, *back).reshape(old.shape))
    return jax.vmap(lambda x, total, *at: lax.dynamic_update_slice(x, total, at))(
        squeezed, total, *at
    ).reshape(x.shape)


def block_shape(
    shape: tuple[int, ...], axes: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns ``shape`` with ``sizes`` on ``axes``."""
    extents = dict(zip(axes, sizes, strict=True))
    return tuple(extents.get(axis, n) for axis, n in enumerate(shape))


def _inside(
    shape: tuple[int, ...],
    block: tuple[int, ...],
    starts: Sequence[jax.Array],
    axes: tuple[int, ...],
) -> tuple[list[jax.Array], list[int], list[jax.Array]]:
    """Returns the part of each entry that holds what its block shows of it.

    Its starts and extents on all axes but the first, and where the block starts in it.
    """
    extents = [min(size, n) for size, n in zip(block[1:], shape[1:], strict=True)]
    first = [jnp.zeros(shape[0], jnp.int32)] * len(extents)
    offsets = list(first)
    for axis, start in zip(axes, starts, strict=True):
        last = shape[axis] - extents[axis - 1]
        first[axis - 1] = jnp.clip(start, 0, last)
        offsets[axis - 1] = start - first[axis - 1]
    return first, extents, offsets


def _window(
    block: jax.Array,
    *offsets: jax.Array,
    sizes: Sequence[int],
    axes: tuple[int, ...],
) -> jax.Array:
    """Returns the window of a block at ``offsets``, zero where it sticks out."""
    border = [size if axis in axes else 0 for axis, size in enumerate(sizes, start=1)]
    padded = lax.pad(
        block, jnp.zeros((), block.dtype), [(size, size, 0) for size in border]
    )
    # Farther out than its size there are zeros, too.
    at = [
        jnp.clip(offset + size, 0, n + size)
        for offset, size, n in zip(offsets, border, block.shape, strict=True)
    ]
    return lax.dynamic_slice(padded, at, sizes)


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + y.astype(wide)).astype(x.dtype)


def _slices(
    x: jax.Array, starts: Sequence[jax.Array], sizes: Sequence[int]
) -> jax.Array:
    """Returns one slice of each entry, by one gather."""
    return jax.vmap(lambda x, *at: lax.dynamic_slice(x, at, sizes))(x, *starts)


def _joined(x: jax.Array) -> jax.Array:
    """Makes the two leading axes one: of this there are slices, without a copy."""
    return x.reshape(-1, *x.shape[2:])


def _joined_start(
    x: jax.Array, starts: Sequence[jax.Array], entry: int
) -> list[jax.Array]:
    """Returns where the slice of an entry starts then."""
    first, *others = (start[entry] for start in starts)
    return [first + entry * x.shape[1], *others]


def _squeezed(
    x: jax.Array, starts: Sequence[jax.Array], sizes: Sequence[int]
) -> tuple[jax.Array, list[jax.Array], list[int]]:
    """Leaves out axes of one, but for the first, and the slices' starts and sizes there.

    They would be part of the layout that a TPU gathers in, which it would copy the
    array for.
    """
    kept = [axis for axis in range(1, x.ndim) if x.shape[axis] > 1]
    return (
        x.reshape(len(x), *(x.shape[axis] for axis in kept)),
        [starts[axis - 1] for axis in kept],
        [sizes[axis - 1] for axis in kept],
    )
