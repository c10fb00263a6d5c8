"""BNET: a small convolution in the place of batch norm's scale and bias."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.linear_layers import make_convolution
from flax_sbn.normalization import batch_norm
from flax_sbn.statistics import Statistics, of_features


def bnet(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Batch norm whose linear part looks at the neighbours of a value, too.

    With :math:`*` a convolution of each feature with a window of its own:

    .. math::
      y = \mathit{kernel} * \frac{x - \mu}{\sqrt{v + \epsilon}} + \mathit{bias}

    Args:
      x: ``(N, *spatial, C)``.
      kernel: ``(*window, 1, C)``; a window of ones is ordinary batch norm's scale.
      bias: ``(C,)``, or None for zero.
      dtype: dtype of the result; by default that of the arguments promoted.
      **options: those of :func:`flax_sbn.batch_norm`, but no ``axis``.

    Returns:
      An array of the shape of ``x``, and the measured statistics, ``(C,)``.

    Raises:
      TypeError: see :func:`flax_sbn.batch_norm`.
      ValueError: see :func:`flax_sbn.batch_norm` and :func:`depthwise_affine`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> kernel, bias = jnp.ones((3, 3, 1, 6)), jnp.zeros(6)
      >>> y, statistics = sbn.alternatives.bnet(
      ...     x, kernel, bias, sampler=sbn.BatchSampling(4), key=jax.random.key(1)
      ... )
      >>> y.shape, statistics.mean.shape
      ((32, 8, 8, 6), (6,))

    Source: Xu et al., "BNET: Batch Normalization With Enhanced Linear Transformation",
    arXiv 2011.14150.
    """
    y, statistics = batch_norm(x, axis=-1, dtype=dtype, **options)
    return depthwise_affine(y, kernel, bias, dtype=dtype), statistics


def depthwise_affine(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Convolves each feature with a window of its own, and adds a bias.

    .. math::
      y_{pc} = \sum_d \mathit{kernel}_{dc}\, x_{p + d, c} + \mathit{bias}_c

    with ``d`` around the window's centre, and zeros outside of ``x``. Of a window of
    even extent the centre is the first of the two middle entries.

    Args:
      x: ``(N, *spatial, C)``, any number of spatial axes.
      kernel: ``(*window, 1, C)``, as in flax.
      bias: ``(C,)``, or None for zero.
      dtype: dtype of computation and result; by default that of the arguments promoted.

    Returns:
      An array of the shape of ``x``.

    Raises:
      ValueError: if the kernel's window has another number of axes than the space, or
        kernel or bias another number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1)
      >>> kernel, bias = jnp.ones((3, 1, 1)), jnp.array([0.5])
      >>> sbn.alternatives.depthwise_affine(x, kernel, bias).ravel()
      Array([3.5, 7.5, 6.5], dtype=float32)

    Source: Xu et al., "BNET: Batch Normalization With Enhanced Linear Transformation",
    arXiv 2011.14150.
    """
    dtype = canonicalize_dtype(x, kernel, bias, dtype=dtype)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    features = x.shape[-1]
    if kernel.ndim != x.ndim or kernel.shape[-2:] != (1, features):
        raise ValueError(
            f"Expected a kernel of {x.ndim - 2} window axes and then (1, {features}) "
            f"for an input of shape {x.shape}, got a kernel of shape {kernel.shape}. "
            "Give kernel_size one number for each spatial axis."
        )
    if bias is not None:
        bias = of_features("bias", jnp.asarray(bias, dtype), x.shape, -1)
    convolution = make_convolution(
        kernel.shape[:-2],
        strides=1,
        padding="SAME",
        input_dilation=1,
        kernel_dilation=1,
        groups=features,
        precision=None,
        function=lax.conv_general_dilated,
    )
    y = convolution(x, kernel)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def identity_kernel(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns a window that is one at its centre and zero elsewhere: an initializer.

    Args:
      key: not used.
      shape: ``(*window, 1, C)``.
      dtype: dtype of the result.

    Returns:
      The kernel with which :func:`depthwise_affine` changes nothing.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> sbn.alternatives.identity_kernel(jax.random.key(0), (3, 1, 1)).ravel()
      Array([0., 1., 0.], dtype=float32)
    """
    centre = tuple((n - 1) // 2 for n in shape[:-2])
    return jnp.zeros(shape, dtype).at[centre].set(1)
