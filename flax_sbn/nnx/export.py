"""Trained NNX models without a norm: plain convolutions with a bias."""

from typing import Any, TypeVar, cast

import jax
from flax import nnx

from flax_sbn.folding import fold
from flax_sbn.modules.same_outputs import check_same_outputs
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.linear_norm import LinearNorm, computes_as_flax
from flax_sbn.xla.sharding import names_of_features

M = TypeVar("M", bound=nnx.Module)


def fold_model(model: M, *, example_inputs: tuple[Any, ...] | None = None) -> M:
    r"""Folds the running statistics of a model's layers into their kernels for good.

    Layers that ``nnx.vmap`` stacked along leading axes stay stacked. Sharding metadata
    of the kernels stays, and the biases get that of their features.

    Args:
      model: a trained model; it is left as it is.
      example_inputs: if given, the model, at evaluation, is called with them before and
        after, and the outputs are compared.

    Returns:
      A copy in which every :class:`ConvNorm` and :class:`DenseNorm` has a kernel, a
      bias and no norm: it gives the outputs of the model's evaluation.

    Raises:
      ValueError: if the model has no layer that can be folded, a wrapper such as
        ``flax.nnx.WeightNorm`` changes the kernel of one, layers share a kernel, or the
        outputs change.

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
    layers = _modules(copy, LinearNorm)
    if not layers:
        raise ValueError(
            f"Expected a model with ConvNorm or DenseNorm layers, got {type(model)}. "
            "BatchNorm layers have no convolution to fold into."
        )
    for wrapper in _modules(copy, nnx.WeightNorm, nnx.SpectralNorm):
        if _modules(wrapper, LinearNorm):
            raise ValueError(
                "Expected layers that see their kernels as they are stored, got layers "
                f"in {type(wrapper).__name__}. Store the kernels that it makes, take it"
                " off, and fold then."
            )
    unfolded = [layer for layer in layers if layer.norm is not None]
    if len({id(layer._linear.kernel) for layer in unfolded}) < len(unfolded):
        raise ValueError(
            "Expected a kernel for each norm, got layers that share one. Give each "
            "layer a copy, and fold then."
        )
    for layer in unfolded:
        linear, norm = layer._linear, layer.norm
        if not computes_as_flax(linear):
            raise ValueError(
                "Expected Flax's own layer without a bias before a norm, got "
                f"{type(linear).__name__}. Merge what it adds into its kernel, and a "
                "bias into the norm's mean."
            )
        affine, running = norm._values()
        kernel, bias = fold(linear.kernel[...], running, *affine, epsilon=norm.epsilon)
        linear.bias = _bias(bias, linear.kernel, norm)
        linear.kernel = linear.kernel.replace(kernel)
        linear.use_bias = True
        layer.norm = nnx.data(None)
    if example_inputs is not None:
        assert callable(model)
        assert callable(copy)
        check_same_outputs(model, copy, example_inputs)
    return copy


def _modules(model: nnx.Module, *kinds: type[Any]) -> list[Any]:
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, kinds)]


def _bias(
    bias: jax.Array, kernel: nnx.Param[jax.Array], norm: BatchNorm
) -> nnx.Param[jax.Array]:
    """Returns a parameter divided as the norm's, or as the features of the kernel."""
    for param in (norm.bias, norm.scale):
        if param is not None and param.get_metadata("out_sharding", None) is not None:
            return cast(nnx.Param[jax.Array], param.replace(bias))
    names = kernel.get_metadata("out_sharding", None)
    if names is None:
        return nnx.Param(bias)
    return nnx.Param(bias, out_sharding=names_of_features(names, bias.ndim - 1))
