"""Trained linen variables without a norm: plain convolutions with a bias."""

from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from flax_sbn.folding import fold
from flax_sbn.linen.conv_norm import ConvNorm
from flax_sbn.linen.dense_norm import DenseNorm
from flax_sbn.statistics import Statistics


def fold_variables(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    r"""Folds the running statistics of a model's layers into their kernels for good.

    Every :class:`ConvNorm` and :class:`DenseNorm` is left with a kernel and a bias,
    under ``conv`` or ``dense``, and without a norm. The same model evaluates the result
    to the same outputs; so does any other with plain layers of these names.

    Args:
      model: a linen model.
      variables: its trained variables, ``{"params": ..., "batch_stats": ...}``.
      *args: what the model is called with at evaluation; only shapes matter.
      **kwargs: likewise.

    Returns:
      Variables of the same nesting; those of other layers are unchanged.

    Raises:
      ValueError: if the model evaluates no layer that can be folded.

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
    layers: dict[tuple[str, ...], ConvNorm | DenseNorm] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, ConvNorm | DenseNorm):
            layers[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v: model.apply(v, *args, **kwargs), variables)

    if not layers:
        raise ValueError(
            f"Expected a model with ConvNorm or DenseNorm layers, got {model}. "
            "BatchNorm layers have no convolution to fold into."
        )
    flat = traverse_util.flatten_dict(nn.meta.unbox(variables))
    for path, layer in layers.items():
        name = "conv" if isinstance(layer, ConvNorm) else "dense"
        params, norm = ("params", *path), (*path, "norm")
        if ("batch_stats", *norm, "mean") not in flat:
            continue  # it is folded already
        kernel, bias = fold(
            flat[*params, name, "kernel"],
            Statistics(
                flat.pop(("batch_stats", *norm, "mean")),
                flat.pop(("batch_stats", *norm, "var")),
            ),
            flat.pop(("params", *norm, "scale"), None),
            flat.pop(("params", *norm, "bias"), None),
            epsilon=layer.epsilon,
        )
        flat[*params, name, "kernel"], flat[*params, name, "bias"] = kernel, bias
    return traverse_util.unflatten_dict(flat)
