"""Trained Linen variables without a norm: plain convolutions with a bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from flax_sbn.folding import fold
from flax_sbn.linen.as_stored import changed_variables, mark
from flax_sbn.linen.linear_norm import LinearNorm
from flax_sbn.modules.same_outputs import check_same_outputs
from flax_sbn.statistics import Statistics
from flax_sbn.xla.sharding import names_of_features

Path = tuple[str, ...]


def fold_variables(
    model: nn.Module,
    variables: Any,
    *args: Any,
    example_inputs: tuple[Any, ...] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    r"""Folds the running statistics of a model's layers into their kernels for good.

    Every :class:`ConvNorm` and :class:`DenseNorm` is left with a kernel and a bias,
    under ``conv`` or ``dense``, and without a norm. The same model evaluates the result
    to the same outputs; so does any other with plain layers of these names. Layers that
    ``nn.scan`` or ``nn.vmap`` stack along leading axes stay stacked. Boxes with
    sharding metadata, such as ``nn.Partitioned``, stay, and the biases get boxes for
    their features.

    Args:
      model: a Linen model.
      variables: its trained variables, ``{"params": ..., "batch_stats": ...}``.
      *args: what the model is called with at evaluation; only shapes matter.
      example_inputs: if given, in place of ``args``, the model is evaluated with them
        before and after, and the outputs are compared.
      **kwargs: as ``args``.

    Returns:
      Variables of the same nesting; those of other layers are unchanged.

    Raises:
      ValueError: if the model evaluates no layer that can be folded, a wrapper such as
        ``flax.linen.WeightNorm`` changes the variables of one, or the outputs change.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> model = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True)
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> exported = sbn.linen.fold_variables(model, variables, x)
      >>> jax.tree.map(jnp.shape, exported)
      {'params': {'conv': {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
      >>> bool(jnp.allclose(model.apply(exported, x), model.apply(variables, x)))
      True

    Source: Jacob et al., "Quantization and Training of Neural Networks", arXiv
    1712.05877.
    """
    if example_inputs is not None:
        args = example_inputs
    boxed = traverse_util.flatten_dict(variables)
    layers = _layers(model, variables, args, kwargs)
    for path, (layer, kernel_shape) in layers.items():
        norm = ("batch_stats", *path, "norm")
        if (*norm, "mean") not in boxed:
            continue  # it is folded already
        statistics = Statistics(boxed[*norm, "mean"], boxed[*norm, "var"])
        # And whatever else the norm keeps, such as its number of steps.
        boxed = {of: value for of, value in boxed.items() if of[: len(norm)] != norm}
        affine = [
            boxed.pop(("params", *path, "norm", name), None)
            for name in ("scale", "bias")
        ]
        linear = ("params", *path, layer.linear_name)
        kernel = boxed[*linear, "kernel"]
        stack = _stack(path, jnp.shape(nn.meta.unbox(kernel)), kernel_shape)
        boxed[*linear, "kernel"], boxed[*linear, "bias"] = _folded(
            kernel, statistics, *affine, stack=stack, epsilon=layer.epsilon
        )
    folded = traverse_util.unflatten_dict(boxed)
    if example_inputs is not None:
        before = functools.partial(model.apply, variables, **kwargs)
        after = functools.partial(model.apply, folded, **kwargs)
        check_same_outputs(before, after, example_inputs)
    return folded


def _layers(
    model: nn.Module, variables: Any, args: Any, kwargs: Any
) -> dict[Path, tuple[LinearNorm, tuple[int, ...]]]:
    """Returns the layers that fold, by their paths, and the shapes of their kernels."""
    layers = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, called = context.module, context.method_name == "__call__"
        if called and isinstance(layer, LinearNorm):
            linear = layer.variables["params"][layer.linear_name]
            layers[layer.path] = layer, nn.meta.unbox(linear["kernel"]).shape
            mark(layer)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        changed = changed_variables(
            lambda variables: model.apply(variables, *args, **kwargs), variables
        )
    if not layers:
        raise ValueError(
            f"Expected a model with ConvNorm or DenseNorm layers, got {model}. "
            "BatchNorm layers have no convolution to fold into."
        )
    if changed:
        raise ValueError(
            "Expected layers that see their variables as they are stored, got others "
            f"for {', '.join('/'.join(path) for path in changed)}: a wrapper such as "
            "nn.WeightNorm makes them. Store what it makes, take it off, and fold then."
        )
    return layers


def _stack(
    path: Path, stored: tuple[int, ...], seen: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns the leading axes of a kernel along which layers are stacked."""
    stack = stored[: len(stored) - len(seen)]
    if (*stack, *seen) != stored:
        raise ValueError(
            f"Expected layers stacked along leading axes, got kernels of shape {stored}"
            f" for layers {'/'.join(path)} with kernels of shape {seen}. Move the axes "
            "of variable_axes to the front, and the variables'."
        )
    return stack


def _folded(
    kernel: Any,
    statistics: Statistics,
    scale: Any,
    bias: Any,
    *,
    stack: tuple[int, ...],
    epsilon: float,
) -> tuple[Any, Any]:
    """Returns kernel and bias in boxes like those of the given ones."""
    boxes = kernel, scale, bias
    kernel, statistics, scale, bias = nn.meta.unbox((kernel, statistics, scale, bias))
    if statistics.mean.shape[:-1] not in ((), stack):
        raise ValueError(
            "Expected kernels and statistics stacked along the same leading axes, got "
            f"statistics of shape {statistics.mean.shape} for a kernel of shape "
            f"{kernel.shape}. Move the axes of variable_axes to the front in both."
        )
    # Layers may share their statistics, but not their biases.
    each = [jnp.broadcast_to(s, (*stack, s.shape[-1])) for s in statistics]
    kernel, bias = fold(kernel, Statistics(*each), scale, bias, epsilon=epsilon)
    kernel = nn.meta.replace_boxed(boxes[0], kernel)
    return kernel, _boxed_bias(boxes, bias, len(stack))


def _boxed_bias(boxes: tuple[Any, Any, Any], bias: jax.Array, stack: int) -> Any:
    """Returns a bias in a box like the norm's, or for the features of the kernel's."""
    kernel, *affine = boxes
    for box in reversed(affine):
        if isinstance(box, nn.meta.AxisMetadata):
            return box.replace_boxed(bias)
    if not isinstance(kernel, nn.Partitioned):
        return bias
    return kernel.replace(value=bias, names=names_of_features(kernel.names, stack))
