"""``lax.dynamic_slice`` of every entry of a leading axis, with a cheap transpose.

``jax.vmap`` of a dynamic slice is a gather, and its transpose a scatter into zeros:
slow on every backend. Here the transpose is a gather, too, in which each position of
the large array looks up the block that may cover it, so that it fuses with the gradient
that it is added to. Both directions are primitives, each the other's transpose, and so
differentiate in either mode and to any order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def batched_slice(x: jax.Array, starts: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Returns one block of each entry of ``x``.

    Args:
      x: ``(G, *dims)``.
      starts: ``(G, len(dims))``, int32: first position of each block, such that the
        block lies inside.
      sizes: extent of a block on each of ``dims``.

    Returns:
      ``(G, *sizes)``.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(8.0).reshape(2, 4)
      >>> batched_slice(x, jnp.array([[0], [2]]), (2,))
      Array([[0., 1.],
             [6., 7.]], dtype=float32)
    """
    return _slice_p.bind(x, starts, sizes=tuple(sizes))


def _slice(x: jax.Array, starts: jax.Array, *, sizes: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda a, start: lax.dynamic_slice(a, start, sizes))(x, starts)


def _place(z: jax.Array, starts: jax.Array, *, sizes: tuple[int, ...]) -> jax.Array:
    """Puts blocks ``(G, *block)`` where they were taken from; zero everywhere else."""
    covered = jnp.ones((), bool)
    for axis, (block, size) in enumerate(zip(z.shape[1:], sizes, strict=True)):
        if block < size:
            index = jnp.arange(size) - starts[:, axis, None]
            z = jax.vmap(functools.partial(jnp.take, axis=axis, mode="clip"))(z, index)
            others = [a for a in range(1, z.ndim) if a != axis + 1]
            covered &= jnp.expand_dims((index >= 0) & (index < block), others)
    return jnp.where(covered, z, 0)


def _primitive(name: str, function: Any) -> core.Primitive:
    primitive = core.Primitive(name)
    primitive.def_impl(jax.jit(function, static_argnames="sizes"))
    primitive.def_abstract_eval(
        lambda x, starts, *, sizes: x.update(shape=(x.shape[0], *sizes))
    )
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.defjvp(
        primitive,
        lambda t, x, starts, *, sizes: primitive.bind(t, starts, sizes=sizes),
        None,
    )
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


def _batch(
    primitive: core.Primitive,
    args: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    sizes: tuple[int, ...],
) -> tuple[jax.Array, int]:
    """Merges the mapped axis with the leading one."""
    (count,) = {
        a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None
    }
    x, starts = (
        jnp.broadcast_to(a, (count, *a.shape))
        if axis is None
        else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    )
    merged = primitive.bind(
        x.reshape(-1, *x.shape[2:]), starts.reshape(-1, *starts.shape[2:]), sizes=sizes
    )
    return merged.reshape(*x.shape[:2], *sizes), 0


def _transpose(
    other: core.Primitive, ct: Any, x: Any, starts: jax.Array, *, sizes: tuple[int, ...]
) -> tuple[Any, None]:
    if type(ct) is ad.Zero:
        return ad.Zero(x.aval), None
    return other.bind(ct, starts, sizes=x.aval.shape[1:]), None


_slice_p = _primitive("batched_slice", _slice)
_place_p = _primitive("batched_place", _place)
ad.primitive_transposes[_slice_p] = functools.partial(_transpose, _place_p)
ad.primitive_transposes[_place_p] = functools.partial(_transpose, _slice_p)
