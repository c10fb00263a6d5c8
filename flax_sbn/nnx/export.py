"""Trained nnx models without a norm: plain convolutions with a bias."""

from typing import TypeVar

from flax import nnx

from flax_sbn.folding import fold
from flax_sbn.nnx.conv_norm import ConvNorm
from flax_sbn.nnx.dense_norm import DenseNorm

M = TypeVar("M", bound=nnx.Module)


def fold_model(model: M) -> M:
    r"""Folds the running statistics of a model's layers into their kernels for good.

    Args:
      model: a trained model; it is left as it is.

    Returns:
      A copy in which every :class:`ConvNorm` and :class:`DenseNorm` has a kernel, a
      bias and no norm: it gives the outputs of the model's evaluation.

    Raises:
      ValueError: if the model has no layer that can be folded.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> model = sbn.nnx.ConvNorm(3, 4, (3, 3), rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> exported = sbn.nnx.fold_model(model)
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> exported.norm is None, bool(jnp.allclose(exported(x), model(x)))
      (True, True)

    Source: Jacob et al., "Quantization and Training of Neural Networks", arXiv
    1712.05877.
    """
    copy = nnx.clone(model)
    layers = [
        layer
        for _, layer in nnx.iter_modules(copy)
        if isinstance(layer, ConvNorm | DenseNorm)
    ]
    if not layers:
        raise ValueError(
            f"Expected a model with ConvNorm or DenseNorm layers, got {type(model)}. "
            "BatchNorm layers have no convolution to fold into."
        )
    for layer in layers:
        if layer.norm is None:
            continue
        linear = layer.conv if isinstance(layer, ConvNorm) else layer.dense
        kernel, bias = fold(
            linear.kernel[...],
            layer.norm._running(),
            *layer.norm._affine(),
            epsilon=layer.norm.epsilon,
        )
        linear.kernel = nnx.Param(kernel)
        linear.bias = nnx.Param(bias)
        linear.use_bias = True
        layer.norm = nnx.data(None)
    return copy
