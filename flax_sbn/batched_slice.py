"""Blocks out of every entry of a leading axis, with a cheap transpose.

``jax.vmap`` of a dynamic slice is a gather, and its transpose a scatter into zeros:
slow on every backend. A block that may stick out of its array, with zeros there, is its
own transpose: the gradient is a block of the cotangent, at the negated start. So one
primitive does both, differentiates in either mode and to any order, and what it returns
fuses into the gradient that it is added to. Nor does a window of a padded array need
the padded copy.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def batched_slice(
    x: jax.Array, starts: Sequence[jax.Array], axes: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """Returns one block of each entry of ``x``, zero where it sticks out.

    Args:
      x: ``(G, ...)``.
      starts: first position of each block on each of ``axes``, ``(G,)``, int32; may be
        negative.
      axes: the axes that are sliced, ascending, none of them the first.
      sizes: extent of a block on each of ``axes``.

    Returns:
      ``x`` with extents ``sizes`` on ``axes``.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(1.0, 9.0).reshape(2, 4)
      >>> batched_slice(x, [jnp.array([0, 3])], [1], [2])
      Array([[1., 2.],
             [8., 0.]], dtype=float32)
    """
    return _slice_p.bind(x, *starts, axes=tuple(axes), sizes=tuple(sizes))


def _slice(
    x: jax.Array, *starts: jax.Array, axes: tuple[int, ...], sizes: tuple[int, ...]
) -> jax.Array:
    # One gather, whose indices run over all axes up to the last sliced one: XLA would
    # transpose the result otherwise, and then no reduction fuses with it.
    lead = max(axes) + 1
    shape = _shape(x.shape, axes, sizes)[:lead]
    index = [
        jnp.expand_dims(start, range(1, lead))
        + lax.broadcasted_iota(jnp.int32, (1, *shape[1:]), axis)
        for start, axis in zip(starts, axes, strict=True)
    ]
    inside = jnp.ones((), bool)
    if math.prod(sizes) > math.prod(x.shape[axis] for axis in axes):
        # The zeros of a large block come from a border around the small array.
        border = [(int(a in axes),) * 2 + (0,) for a in range(x.ndim)]
        index = [
            jnp.clip(i, -1, x.shape[axis]) + 1
            for i, axis in zip(index, axes, strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), border)
    else:
        for i, axis in zip(index, axes, strict=True):
            inside &= (i >= 0) & (i < x.shape[axis])
    kept = tuple(a for a in range(lead) if a not in axes)
    blocks = lax.gather(
        x,
        jnp.stack(index, axis=-1),
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(lead, x.ndim)),
            collapsed_slice_dims=axes,
            start_index_map=axes,
            operand_batching_dims=kept,
            start_indices_batching_dims=kept,
        ),
        slice_sizes=(1,) * lead + x.shape[lead:],
        mode="clip",
    )
    inside = jnp.expand_dims(inside, range(inside.ndim, x.ndim))
    return jnp.where(inside, blocks, jnp.zeros((), x.dtype))


def _shape(
    shape: tuple[int, ...], axes: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns ``shape`` with ``sizes`` on ``axes``."""
    extents = dict(zip(axes, sizes, strict=True))
    return tuple(extents.get(axis, n) for axis, n in enumerate(shape))


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    x, *starts = primals  # only x has a tangent, or there is none at all
    blocks = _slice_p.bind(x, *starts, **params)
    return blocks, _slice_p.bind(tangents[0], *starts, **params)


def _transpose(
    ct: Any, x: Any, *starts: jax.Array, axes: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Any]:
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *[None] * len(starts)]
    extents = [x.aval.shape[axis] for axis in axes]
    gradient = batched_slice(ct, [-start for start in starts], axes, extents)
    return [gradient, *[None] * len(starts)]


def _batch(
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
) -> tuple[jax.Array, int]:
    """Merges the mapped axis with the leading one."""
    (count,) = {
        a.shape[dim] for a, dim in zip(args, dims, strict=True) if dim is not None
    }
    x, *starts = (
        jnp.broadcast_to(a, (count, *a.shape))
        if dim is None
        else jnp.moveaxis(a, dim, 0)
        for a, dim in zip(args, dims, strict=True)
    )
    merged = batched_slice(
        x.reshape(-1, *x.shape[2:]),
        [start.reshape(-1) for start in starts],
        axes,
        sizes,
    )
    return merged.reshape(*x.shape[:2], *merged.shape[1:]), 0


_slice_p = core.Primitive("batched_slice")
_slice_p.def_impl(jax.jit(_slice, static_argnames=("axes", "sizes")))
_slice_p.def_abstract_eval(
    lambda x, *_, axes, sizes: x.update(shape=_shape(x.shape, axes, sizes))
)
mlir.register_lowering(_slice_p, mlir.lower_fun(_slice, multiple_results=False))
ad.primitive_jvps[_slice_p] = _jvp
ad.primitive_transposes[_slice_p] = _transpose
batching.primitive_batchers[_slice_p] = _batch
