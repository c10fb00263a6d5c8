"""Values of plus and minus one, with gradients that pass straight through."""

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from flax_sbn.moments import wide


def binarize(x: ArrayLike) -> jax.Array:
    r"""Returns the sign, plus one for zero, with the gradient of a clip.

    .. math::
      y = \begin{cases} +1 & x \ge 0 \\ -1 & x < 0 \end{cases}, \qquad
      \frac{\partial y}{\partial x} := [\,|x| \le 1\,]

    Args:
      x: any shape, any real dtype.

    Returns:
      An array of the shape and dtype of ``x``, float32 for integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.array([-2.0, -1.0, 0.0, 0.5])
      >>> y, pullback = jax.vjp(sbn.alternatives.binarize, x)
      >>> print(y, *pullback(jnp.ones(4)))
      [-1. -1.  1.  1.] [0. 1. 1. 1.]

    Source: Hubara et al., "Binarized Neural Networks", arXiv 1602.02830.
    """
    x = jnp.asarray(x)
    x = x.astype(canonicalize_dtype(x))
    return _scaled_sign(x, jnp.ones((), x.dtype))


def binarize_kernel(kernel: ArrayLike) -> jax.Array:
    r"""Binarizes weights to plus or minus their mean magnitude for each output feature.

    .. math::
      \begin{aligned}
      \hat W &= s \cdot \mathrm{sign}(W), \qquad s = \mathrm{mean}\,|W| \\
      \frac{\partial \hat W}{\partial W} &:= [\,|W| \le 1\,]
      \end{aligned}

    with :math:`\mathrm{sign}(0) = 1`. The scale :math:`s` counts as a constant, and
    does not multiply the gradient either.

    Args:
      kernel: ``(*window, I, C)``, as in Flax: the last axis is the outputs'.

    Returns:
      An array of the shape and dtype of ``kernel``, float32 for integers; the mean is
      taken in float32 or wider.

    Raises:
      ValueError: if the kernel has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> kernel = jnp.array([[0.5, -2.0], [-1.5, 4.0]])
      >>> sbn.alternatives.binarize_kernel(kernel)
      Array([[ 1., -3.],
             [-1.,  3.]], dtype=float32)

    Source: Rastegari et al., "XNOR-Net", arXiv 1603.05279, for the scale; the gradient
    as Liu et al., "ReActNet", arXiv 2003.03488, train.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2:
        raise ValueError(
            "Expected a kernel with an input and an output axis, got a kernel of shape "
            f"{kernel.shape}. Use binarize for anything else."
        )
    kernel = kernel.astype(canonicalize_dtype(kernel))
    magnitude = jnp.abs(wide(kernel))
    scale = magnitude.mean(range(kernel.ndim - 1)).astype(kernel.dtype)
    return _scaled_sign(kernel, scale)


@jax.custom_jvp
def _scaled_sign(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, scale, -scale)


@_scaled_sign.defjvp
def _scaled_sign_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x, _ = primals
    tangent, _ = tangents
    return _scaled_sign(*primals), jnp.where(jnp.abs(x) <= 1, tangent, 0)
