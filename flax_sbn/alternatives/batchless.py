"""Batchless normalization: mean and scale are parameters, learned by a likelihood.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.moments import wide
from flax_sbn.normalization import normalize
from flax_sbn.statistics import (
    Axis,
    Statistics,
    batch_statistics,
    of_features,
    reduction_axes,
)


def batchless_norm(
    x: ArrayLike,
    mean: ArrayLike,
    log_scale: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes with a mean and a scale that :func:`batchless_nll` learns.

    With :math:`\rho` the logarithm of the scale:

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{\sqrt{e^{2 \rho} + \epsilon}} +
      \mathit{bias}

    No gradient goes to :math:`\mu` and :math:`\rho`. Images do not meet: training and
    inference are the same, a batch may be a single image, and the gradients of
    micro-batches of equal size average to that of the whole batch.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype.
      mean: the parameter :math:`\mu`, ``(C,)``.
      log_scale: the parameter :math:`\rho`, ``(C,)``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      axis: the feature axis or axes.
      epsilon: added to the variance; the same for :func:`batchless_nll`.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted. The arithmetic is in float32 or wider.

    Returns:
      An array of the shape of ``x``.

    Raises:
      ValueError: if ``axis`` is out of range, ``epsilon`` is negative, or a parameter
        has another shape than the feature axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> mean, log_scale = jnp.array([1.0]), jnp.log(jnp.array([2.0]))
      >>> y = sbn.alternatives.batchless_norm(jnp.array([[5.0]]), mean, log_scale)
      >>> bool(abs(y - 2).max() < 1e-4)
      True

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729, for
    ``epsilon=0``. The ``epsilon`` is ours.
    """
    x = jnp.asarray(x)
    mean, log_scale = lax.stop_gradient(
        _parameters(x, mean, log_scale, axis=axis, epsilon=epsilon)
    )
    return normalize(
        x,
        Statistics(mean, jnp.exp(2 * log_scale)),
        scale,
        bias,
        axis=axis,
        epsilon=epsilon,
        dtype=dtype,
    )


def batchless_nll(
    x: ArrayLike,
    mean: ArrayLike,
    log_scale: ArrayLike,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Returns the Gaussian negative log-likelihood that mean and scale are learned by.

    The mean over images and positions, summed over features, without its constant:

    .. math::
      \begin{aligned}
      \mathit{nll} &= \sum_c \frac{1}{|M_c|} \sum_{i \in M_c} \frac{1}{2} \left(
          \frac{(x_{ic} - \mu_c)^2}{v_c} + \log v_c \right) \\
      v_c &= e^{2 \rho_c} + \epsilon
      \end{aligned}

    with :math:`M_c` all positions, or those that the mask leaves. No gradient goes to
    ``x``. The minimum is at :math:`\mu = E[x]` and :math:`v = \mathrm{Var}[x]`. Added
    to the loss of a task, it changes the gradients of ``mean`` and ``log_scale`` only.

    A feature that never varies has :math:`v \to \epsilon`; without an ``epsilon`` its
    likelihood would grow for ever, until :math:`e^{-\rho}` overflows.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype.
      mean: the parameter :math:`\mu`, ``(C,)``.
      log_scale: the parameter :math:`\rho`, ``(C,)``.
      axis: the feature axis or axes.
      epsilon: added to the variance; the same for :func:`batchless_norm`.
      mask: booleans that broadcast to ``x``: False leaves a position out. A feature of
        which nothing is left has no gradient.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: if ``axis`` is out of range, ``epsilon`` is negative, a parameter has
        another shape than the feature axes, or ``mask`` does not broadcast.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (256, 4))
      >>> mean, log_scale = sbn.alternatives.batchless_init(x)
      >>> exact = sbn.alternatives.batchless_nll(x, mean, log_scale)
      >>> bool(exact < sbn.alternatives.batchless_nll(x, mean + 0.1, log_scale))
      True

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729, for
    ``epsilon=0``. The ``epsilon`` is ours. The paper also subtracts a gauge term; the
    authors' code takes :math:`\rho + 1/2` without its gradient, which shifts the value
    of the loss and nothing else, and averages over features. Neither is done here.
    """
    x = jnp.asarray(x)
    mean, log_scale = _parameters(x, mean, log_scale, axis=axis, epsilon=epsilon)
    log_var = jnp.logaddexp(2 * log_scale, math.log(epsilon) if epsilon else -math.inf)

    # About the current mean: exact in one pass, and shared with the normalization.
    origin = lax.stop_gradient(mean)
    axes = reduction_axes(x.ndim, axis)
    moments = batch_statistics(
        lax.stop_gradient(x) - jnp.expand_dims(origin, axes),
        axis=axis,
        mask=mask,
        running=Statistics(jnp.zeros_like(mean), jnp.exp(log_var)),
    )
    square = moments.var + jnp.square(moments.mean + origin - mean)
    return 0.5 * jnp.sum(square * jnp.exp(-log_var) + log_var)


def batchless_init(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Returns the mean and the logarithm of the scale of a batch, to start from.

    :math:`\mu = E[x]` and :math:`\rho = \frac{1}{2} \log \mathrm{Var}[x]`, so that
    :func:`batchless_norm` starts as batch normalization. A feature whose variance is at
    most ``epsilon`` says nothing about its scale (a single image, an array of zeros, a
    ReLU that is off): it starts with :math:`\rho = 0`.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype.
      axis: the feature axis or axes.
      epsilon: the largest variance that counts as none.
      mask: booleans that broadcast to ``x``: False leaves a position out. A feature of
        which nothing is left starts with zeros.

    Returns:
      ``mean`` and ``log_scale``, ``(C,)``, float32 or wider.

    Raises:
      ValueError: if ``axis`` is out of range or ``mask`` does not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> sbn.alternatives.batchless_init(jnp.array([[1.0, 7.0], [3.0, 7.0]]))
      (Array([2., 7.], dtype=float32), Array([0., 0.], dtype=float32))

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729. What is done
    without a variance is ours.
    """
    mean, var = batch_statistics(x, axis=axis, mask=mask, use_fast_variance=False)
    return mean, 0.5 * jnp.log(jnp.where(var > epsilon, var, 1.0))


def _parameters(
    x: jax.Array, mean: ArrayLike, log_scale: ArrayLike, *, axis: Axis, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Returns both parameters in float32 or wider, of the right shape."""
    if epsilon < 0:
        raise ValueError(f"Expected epsilon >= 0, got {epsilon=}. Try 1e-5.")
    mean = of_features("mean", mean, x.shape, axis)
    log_scale = of_features("log_scale", log_scale, x.shape, axis)
    return wide(mean), wide(log_scale)
