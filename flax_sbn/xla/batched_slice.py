"""Blocks out of every entry of a leading axis, with a cheap transpose.

``jax.vmap`` of a dynamic slice is a gather, and its transpose a scatter into zeros:
slow on every backend. A block that may stick out of its array, with zeros there, is its
own transpose: the gradient is a block of the cotangent, at the negated start. That
fuses into the gradient that it is added to. Nor does a window of a padded array need
the padded copy. On a TPU, which gathers single positions slowly, a fixed sample is
faster: see :mod:`flax_sbn.lattice`.
"""

import math
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flax_sbn.xla.transposes import Form, linear


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
    if jax.default_backend() == "tpu" and len(axes) > 1:
        warnings.warn(
            "Patches at random places are gathered, which a TPU does slowly. "
            "Use LatticeSampling(), which needs no gather and is nearer to batch norm.",
            stacklevel=2,
        )
    extents = [x.shape[axis] for axis in axes]

    def take(*args: jax.Array) -> list[jax.Array]:
        *starts, x = args
        return [_gathered(x, starts, axes, sizes)]

    def put(*args: jax.Array) -> list[jax.Array]:
        *starts, blocks = args
        return [_gathered(blocks, [-start for start in starts], axes, extents)]

    [blocks] = linear(Form(take, put), starts, [x])
    return blocks


def _gathered(
    x: jax.Array, starts: Sequence[jax.Array], axes: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    # One gather, whose indices run over all axes up to the last sliced one: XLA would
    # transpose the result otherwise, and then no reduction fuses with it.
    lead = max(axes) + 1
    extents = dict(zip(axes, sizes, strict=True))
    shape = [extents.get(axis, n) for axis, n in enumerate(x.shape[:lead])]
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
            collapsed_slice_dims=tuple(axes),
            start_index_map=tuple(axes),
            operand_batching_dims=kept,
            start_indices_batching_dims=kept,
        ),
        slice_sizes=(1,) * lead + x.shape[lead:],
        mode="clip",
    )
    inside = jnp.expand_dims(inside, range(inside.ndim, x.ndim))
    return jnp.where(inside, blocks, jnp.zeros((), x.dtype))
