"""Arrays whose type says how they are laid out over devices, or vary between them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike


def is_explicit(type_: Any) -> bool:
    """Whether an array's type says how it is laid out over devices."""
    return AxisType.Explicit in type_.sharding.mesh.axis_types


def laid_out_by_xla(
    function: Callable[..., Any], x: jax.Array, *args: Any, like_x: Any = False
) -> Any:
    """Returns ``function(x, *args)``, in which XLA decides where arrays lie.

    On a mesh with explicit axes, which the type of ``x`` tells, JAX asks for the layout
    of whatever it cannot tell itself, such as slices of a batch. Elsewhere this is a
    plain call. The function may not close over arrays. ``like_x`` says for each result,
    or tree of results, whether it is laid out as ``x`` is; if not, every device has it.
    """
    if not is_explicit(jax.typeof(x)):
        return function(x, *args)
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return jax.sharding.auto_axes(
        function,
        axes=tuple(name for name, kind in axes if kind == AxisType.Explicit),
        out_sharding=jax.tree.map(
            lambda like: sharding if like else everywhere, like_x
        ),
    )(x, *args)


def names_of_features(names: Sequence[Any], stack: int) -> tuple[Any, ...]:
    """Returns a mesh's axes for a bias, given those for ``(*stack, ..., C)``."""
    return (*names[:stack], *names[-1:])


def varying_like(type_: Any, tree: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns arrays that vary between the devices between which arrays of a type do.

    Under ``shard_map`` the gradients of all their uses are then added up on each device
    first, and once over the devices, in ``dtype``; None is the arrays' own.
    """
    there = type_.manual_axis_type.varying

    def varying(array: ArrayLike) -> jax.Array:
        array = jnp.asarray(array)
        axes = tuple(there - jax.typeof(array).manual_axis_type.varying)
        return _vary(array, axes, dtype or array.dtype) if axes else array

    return jax.tree.map(varying, tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _vary(array: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    return jax.lax.pcast(array, axes, to="varying")


@_vary.defjvp
def _vary_jvp(
    axes: tuple[str, ...],
    dtype: DTypeLike,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    # The transpose of the tangent's way is that of the gradient, which is added up
    # where the tangent becomes varying.
    (array,), (tangent,) = primals, tangents
    narrow = jax.lax.pcast(tangent.astype(dtype), axes, to="varying")
    return _vary(array, axes, dtype), narrow.astype(tangent.dtype)
