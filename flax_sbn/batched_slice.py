"""Blocks out of every entry of a leading axis, with a cheap transpose.

``jax.vmap`` of a dynamic slice is a gather, and its transpose a scatter into zeros:
slow on every backend. A block that may stick out of its array, with zeros there, is its
own transpose: the gradient is a block of the cotangent, at the negated start. So one
primitive does both, differentiates in either mode and to any order, and what it returns
fuses into the gradient that it is added to. Nor does a window of a padded array need
the padded copy.

TPUs gather single positions slowly, and slice and update in place well: there, see
``tpu_blocks``, and :func:`fork` adds its gradient in place.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from flax_sbn.tpu_blocks import block_shape, sliced, updated

# Blocks that a TPU takes out one by one: compiling takes longer with each.
_FEW = 16


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


def fork(
    x: jax.Array, starts: Sequence[jax.Array], axes: Sequence[int], sizes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Returns ``x`` and its blocks, such that their gradients add up in one go.

    In float32 or wider, and without an array for the blocks' gradient. See
    :func:`batched_slice` for the arguments.
    """
    return tuple(_fork_p.bind(x, *starts, axes=tuple(axes), sizes=tuple(sizes)))


def _gathered(
    x: jax.Array, *starts: jax.Array, axes: tuple[int, ...], sizes: tuple[int, ...]
) -> jax.Array:
    # One gather, whose indices run over all axes up to the last sliced one: XLA would
    # transpose the result otherwise, and then no reduction fuses with it.
    lead = max(axes) + 1
    shape = block_shape(x.shape, axes, sizes)[:lead]
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


def _join(
    x: jax.Array, blocks: jax.Array, *starts: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    """Adds blocks to ``x`` where they were taken: the transpose of :func:`fork`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    back = [-start for start in starts]
    extents = [x.shape[axis] for axis in axes]
    # In half precision XLA would have the blocks' gradient written on a GPU, for the
    # convolution that gives the other one to add.
    total = x.astype(wide) + batched_slice(blocks.astype(wide), back, axes, extents)
    return total.astype(x.dtype)


def _slice_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    x, *starts = primals  # only x has a tangent, or there is none at all
    blocks = _slice_p.bind(x, *starts, **params)
    return blocks, _slice_p.bind(tangents[0], *starts, **params)


def _slice_transpose(
    ct: Any, x: Any, *starts: jax.Array, axes: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Any]:
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), *[None] * len(starts)]
    extents = [x.aval.shape[axis] for axis in axes]
    gradient = batched_slice(ct, [-start for start in starts], axes, extents)
    return [gradient, *[None] * len(starts)]


def _fork_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    x, *starts = primals
    results = _fork_p.bind(x, *starts, **params)
    return results, _fork_p.bind(tangents[0], *starts, **params)


def _fork_transpose(
    cts: Sequence[Any],
    x: Any,
    *starts: jax.Array,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
) -> list[Any]:
    ct, ct_blocks = cts
    if type(ct_blocks) is ad.Zero:
        return [ct, *[None] * len(starts)]
    if type(ct) is ad.Zero:
        return _slice_transpose(ct_blocks, x, *starts, axes=axes, sizes=sizes)
    return [_join_p.bind(ct, ct_blocks, *starts, axes=axes), *[None] * len(starts)]


def _join_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    x, blocks, *starts = primals
    total = _join_p.bind(x, blocks, *starts, **params)
    t, t_blocks = (ad.instantiate_zeros(tangent) for tangent in tangents[:2])
    return total, _join_p.bind(t, t_blocks, *starts, **params)


def _join_transpose(
    ct: Any, x: Any, blocks: Any, *starts: jax.Array, axes: tuple[int, ...]
) -> list[Any]:
    aval = blocks.aval if ad.is_undefined_primal(blocks) else jax.typeof(blocks)
    if type(ct) is ad.Zero:
        return [ct, ad.Zero(aval), *[None] * len(starts)]
    sizes = [aval.shape[axis] for axis in axes]
    results = fork(ct, starts, axes, sizes)
    given = [
        result if ad.is_undefined_primal(primal) else None
        for result, primal in zip(results, (x, blocks), strict=True)
    ]
    return [*given, *[None] * len(starts)]


def _batch(
    primitive: core.Primitive,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    **params: Any,
) -> tuple[Any, Any]:
    """Merges the mapped axis with the leading one."""
    (count,) = {
        a.shape[dim] for a, dim in zip(args, dims, strict=True) if dim is not None
    }
    merged = []
    for a, dim in zip(args, dims, strict=True):
        a = (
            jnp.broadcast_to(a, (count, *a.shape))
            if dim is None
            else jnp.moveaxis(a, dim, 0)
        )
        merged.append(a.reshape(-1, *a.shape[2:]))

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(count, -1, *a.shape[1:])

    results = primitive.bind(*merged, **params)
    if primitive.multiple_results:
        return [split(a) for a in results], [0] * len(results)
    return split(results), 0


def _is_divided(ctx: mlir.LoweringRuleContext) -> bool:
    """Returns whether XLA divides the arrays of a program among devices."""
    context: Any = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):  # of jax.shard_map, which divides by itself
        return context.manual_axes != set(context.mesh.axis_names)
    return context.num_devices > 1


def _primitive(
    name: str, gathered: Any, sliced: Any, jvp: Any, transpose: Any, shapes: Any
) -> core.Primitive:
    primitive = core.Primitive(name)
    primitive.multiple_results = several = name == "batched_fork"
    static = ("axes",) if name == "batched_join" else ("axes", "sizes")
    primitive.def_impl(jax.jit(gathered, static_argnames=static))
    primitive.def_abstract_eval(shapes)
    lower = functools.partial(mlir.lower_fun, multiple_results=several)

    def lower_for_tpu(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        x: Any = ctx.avals_in[0]
        unrolled = x.shape[0] <= _FEW and not _is_divided(ctx)
        return lower(functools.partial(sliced, unrolled=unrolled))(ctx, *args, **params)

    mlir.register_lowering(primitive, lower(gathered))
    mlir.register_lowering(primitive, lower_for_tpu, platform="tpu")
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


_slice_p = _primitive(
    "batched_slice",
    _gathered,
    sliced,
    _slice_jvp,
    _slice_transpose,
    lambda x, *_, axes, sizes: x.update(shape=block_shape(x.shape, axes, sizes)),
)
_fork_p = _primitive(
    "batched_fork",
    lambda x, *starts, **params: (x, _gathered(x, *starts, **params)),
    lambda x, *starts, **params: (x, sliced(x, *starts, **params)),
    _fork_jvp,
    _fork_transpose,
    lambda x, *_, axes, sizes: [x, x.update(shape=block_shape(x.shape, axes, sizes))],
)
_join_p = _primitive(
    "batched_join",
    _join,
    updated,
    _join_jvp,
    _join_transpose,
    lambda x, *_, axes: x.update(),
)
