"""The forward pass of an NNX module that also measures its layers' inputs."""

from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from flax_sbn.optim.preconditioning import input_statistics, pool_inputs


def call_with_inputs(
    model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Any, dict[Any, Any]]:
    """Calls ``model``, and measures what goes into each layer.

    Layers are :class:`flax.nnx.Linear` and :class:`flax.nnx.Conv`, wherever in the
    model. Their subclasses, which may compute something else, grouped convolutions, and
    layers of several models at once, made with ``nnx.vmap``, are left out. A layer that
    is called more than once gives the statistics of all its inputs. ``nnx.jit`` and
    ``nnx.remat`` inside of the model are fine.

    NNX cannot intercept calls. So the layers get another class, and a variable, for as
    long as the call takes. The model must be mutable, as for batch norm: not captured
    from outside the ``jit`` or ``grad`` that traces the call.

    The statistics carry no gradient. Each device of a ``shard_map`` measures its own
    images.

    Args:
      model: what is called.
      *args: what it is called with.
      **kwargs: likewise.

    Returns:
      What ``model`` returns, and a tree with
      :class:`flax_sbn.optim.InputStatistics` at the paths of the layers' kernels in
      the model's state, for :func:`flax_sbn.optim.batch_norm_preconditioning`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> rngs = nnx.Rngs(0)
      >>> first, last = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
      >>> model = nnx.Sequential(first, nnx.relu, last)
      >>> y, inputs = sbn.nnx.call_with_inputs(model, jnp.ones((8, 3)))
      >>> y.shape, inputs["layers"][2]["kernel"].mean.shape
      ((8, 2), (5,))
    """
    layers: dict[Any, Any] = {
        path: module for path, module in nnx.iter_modules(model) if _is_measured(module)
    }
    changed: list[tuple[Any, type]] = []
    try:
        for layer in layers.values():
            layer.measured = _Measured(None)
            changed.append((layer, type(layer)))
            set_class(layer, _MEASURING[type(layer)])
        result = model(*args, **kwargs)
        measured = {path: m.measured.get_value() for path, m in layers.items()}
    finally:
        for layer, before in changed:
            set_class(layer, before)
            del layer.measured
    return result, unflatten_dict(
        {(*path, "kernel"): s for path, s in measured.items() if s is not None}
    )


class _Measured(nnx.Variable[Any]):
    """Statistics of a layer's input, None before its first call."""


class _Measuring(nnx.Module):
    def __call__(self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        before = self.measured.get_value()
        self.measured.set_value(pool_inputs(before, input_statistics(inputs)))
        return super().__call__(inputs, *args, **kwargs)


class _Linear(_Measuring, nnx.Linear):
    pass


class _Conv(_Measuring, nnx.Conv):
    pass


_MEASURING: dict[type, type] = {nnx.Linear: _Linear, nnx.Conv: _Conv}


def _is_measured(module: Any) -> bool:
    # Groups, and stacked models, have kernels of another shape.
    return type(module) in _MEASURING and module.kernel.shape == (
        *getattr(module, "kernel_size", ()),
        module.in_features,
        module.out_features,
    )


def set_class(layer: Any, to: type) -> None:
    """Changes the class of a layer past NNX, which would make it an attribute."""
    object.__setattr__(layer, "__class__", to)
