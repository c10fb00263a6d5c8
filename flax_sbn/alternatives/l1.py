"""L1-norm batch norm: the mean absolute deviation in place of the standard one."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_sbn.modules.hooks import Hooks
from flax_sbn.moments import Moments, wide
from flax_sbn.normalization import batch_norm
from flax_sbn.statistics import Statistics


def l1_moments(
    x: ArrayLike,
    axes: tuple[int, ...],
    where: jax.Array | None = None,
    one_pass: bool | None = None,
    *,
    epsilon: float = 1e-5,
) -> Moments:
    r"""Measures the spread of every feature by absolute values: a ``Measure``.

    With :math:`m` values :math:`x_i` of a feature and their mean :math:`\mu`:

    .. math::
      \begin{aligned}
      s &= \sqrt{\pi / 2} \cdot \frac{1}{m} \sum_i |x_i - \mu| + \epsilon \\
      v &= s^2 - \epsilon
      \end{aligned}

    Of normally distributed values :math:`s - \epsilon` is the standard deviation. The
    variance is such that :math:`\sqrt{v + \epsilon} = s` is what normalization divides
    by.

    Args:
      x: real values; measured in float32 or wider.
      axes: the axes to reduce, all but the feature axes.
      where: booleans of the shape of ``x``: False leaves a value out.
      one_pass: without effect, as the mean has to be known first.
      epsilon: added to :math:`s`; also that of the normalization. As :math:`v` is
        rounded, :math:`s` counts as at least 0.003 times the root of epsilon.

    Returns:
      Number of values, mean and :math:`v`, each ``(C,)``, float32 or wider. Over
      several parts of a sample, and over devices, they mix as mean and variance.

    Raises:
      TypeError: if ``x`` is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.array([[1.0], [3.0]])
      >>> num, mean, var = sbn.alternatives.l1_moments(x, (0,), epsilon=0.0)
      >>> print(num, mean, var)
      [2.] [2.] [1.5707964]

    Source: Wu et al., "L1-Norm Batch Normalization for Efficient Training of Deep
    Neural Networks", arXiv 1802.09769. How parts and devices mix is ours.
    """
    x = real(x)
    if where is None:
        num = jnp.asarray(math.prod(x.shape[a] for a in axes), x.dtype)
    else:
        # What is masked may be NaN: keep it out of the gradient, too.
        x = jnp.where(where, x, 0)
        num = where.sum(axes, dtype=x.dtype)
    divisor = jnp.maximum(num, 1)
    mean = x.sum(axes) / divisor
    deviation = jnp.abs(x - jnp.expand_dims(mean, axes)).sum(axes, where=where)
    std = math.sqrt(math.pi / 2) * deviation / divisor + epsilon
    return Moments(jnp.broadcast_to(num, mean.shape), mean, variance_of(std, epsilon))


def l1_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes by the mean absolute deviation.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias} \\
      s &= \sqrt{\pi / 2} \cdot \mathrm{mean}\,|x - \mu| + \epsilon
      \end{aligned}

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; real.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      epsilon: added to :math:`s`.
      **options: those of :func:`flax_sbn.batch_norm`, but no ``measure``.

    Returns:
      The normalized array, of the shape of ``x``, and the measured statistics,
      ``(C,)``: :math:`\mu` and :math:`s^2 - \epsilon`, see :func:`l1_moments`. They are
      averaged by :func:`flax_sbn.update_running` with ``std_epsilon=epsilon``, and
      evaluated by :func:`flax_sbn.normalize`.

    Raises:
      TypeError: if ``x`` is complex, and as :func:`flax_sbn.batch_norm`.
      ValueError: see :func:`flax_sbn.batch_norm`.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (128, 16, 16, 8))
      >>> y, statistics = sbn.alternatives.l1_batch_norm(
      ...     x, sampler=sbn.BatchSampling(8), key=jax.random.key(1)
      ... )
      >>> bool(abs(y.mean()) < 0.1 and abs(y.var() - 1) < 0.1)
      True

    Source: Wu et al., "L1-Norm Batch Normalization for Efficient Training of Deep
    Neural Networks", arXiv 1802.09769.
    """
    measure = functools.partial(l1_moments, epsilon=epsilon)
    return batch_norm(x, scale, bias, measure=measure, epsilon=epsilon, **options)


def variance_of(std: jax.Array, epsilon: float) -> jax.Array:
    """Returns the variance whose root, with ``epsilon`` added, is ``std``."""
    # Next to epsilon a much smaller square would be lost to rounding, and the sum of
    # both be zero or negative.
    return jnp.maximum(jnp.square(std), 1e-5 * epsilon) - epsilon


def real(x: ArrayLike) -> jax.Array:
    """Returns values in float32 or wider.

    Raises:
      TypeError: if they are complex.
    """
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"Expected real values, got dtype={x.dtype}. BatchNorm takes complex ones."
        )
    return wide(x)


class L1Hooks(Hooks):
    """Measures the mean absolute deviation."""

    averages_deviations = True

    def _measure(self: Any, *values: Any) -> Moments:
        return l1_moments(*values, epsilon=self.epsilon)
