"""Filter response normalization, and the thresholded linear unit that goes with it.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features.
"""

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.moments import wide
from flax_sbn.statistics import Axis, of_features, reduction_axes

# Gradients hold its power of -3/2, which float32 can hold.
_SMALLEST = 1e-24


def filter_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    epsilon: ArrayLike = 1e-6,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides every feature map by its root mean square, each image by itself.

    .. math::
      \begin{aligned}
      \nu^2_{nc} &= \frac{1}{H W} \sum_{hw} x_{nhwc}^2 \\
      y &= \mathit{scale} \cdot \frac{x}{\sqrt{\nu^2 + |\epsilon|}} + \mathit{bias}
      \end{aligned}

    Nothing is subtracted, no image sees another, and there is nothing to remember: it
    is the same in training and evaluation, and for one image as for many. The
    activation that follows is meant to be :func:`tlu`, because the values may be far
    from zero.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; the first of the other axes
        holds the images. Any real dtype; measured in float32 or wider.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      axis: the feature axis or axes.
      epsilon: its absolute value is added to the mean square; a scalar or ``(C,)``,
        constant or learned. Where a map is a single value, as in an input without
        spatial axes, a small one leaves little but the sign of ``x``: learn it there,
        from 1e-4.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted.

    Returns:
      An array of the shape of ``x``. Maps whose mean square plus epsilon is less than
      1e-24 become ``bias`` and get no gradient.

    Raises:
      ValueError: if ``axis`` is out of range, or ``scale``, ``bias`` or ``epsilon`` has
        another shape than the feature axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = 5 * jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> y = sbn.alternatives.filter_response_norm(x)
      >>> bool(jnp.allclose((y**2).mean((1, 2)), 1.0, atol=1e-4))
      True

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    What happens below 1e-24 is ours.
    """
    x = jnp.asarray(x)
    axes = reduction_axes(x.ndim, axis)
    values = wide(x)
    square = lax.square(values).mean(axes[1:], keepdims=True)
    if jnp.ndim(epsilon):
        epsilon = _expand("epsilon", epsilon, x, axis)
    square += jnp.abs(epsilon)
    # A learned epsilon may reach zero.
    vanishing = square < _SMALLEST
    factor = jnp.where(vanishing, 0, lax.rsqrt(jnp.where(vanishing, 1, square)))
    if scale is not None:
        factor *= _expand("scale", scale, x, axis)
    y = values * factor
    if bias is not None:
        y += _expand("bias", bias, x, axis)
    return y.astype(canonicalize_dtype(x, scale, bias, dtype=dtype))


def tlu(
    x: ArrayLike,
    threshold: ArrayLike,
    *,
    axis: Axis = -1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Thresholded linear unit: a ReLU that is cut off at a learned place.

    .. math::
      y = \max(x, \tau)

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype.
      threshold: :math:`\tau`, ``(C,)``; zeros make it a ReLU.
      axis: the feature axis or axes.
      dtype: dtype of the result; by default that of ``x`` and ``threshold`` promoted.

    Returns:
      An array of the shape of ``x``.

    Raises:
      ValueError: if ``axis`` is out of range, or ``threshold`` has another shape than
        the feature axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.array([[-2.0, -2.0], [3.0, 3.0]])
      >>> sbn.alternatives.tlu(x, jnp.array([0.0, -1.0]))
      Array([[ 0., -1.],
             [ 3.,  3.]], dtype=float32)

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    """
    x = jnp.asarray(x)
    y = jnp.maximum(x, _expand("threshold", threshold, x, axis))
    return y.astype(canonicalize_dtype(x, threshold, dtype=dtype))


def _expand(name: str, value: ArrayLike, x: jax.Array, axis: Axis) -> jax.Array:
    axes = reduction_axes(x.ndim, axis)
    return jnp.expand_dims(of_features(name, value, x.shape, axis), axes)
