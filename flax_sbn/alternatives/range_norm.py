"""Range batch norm: the range of a feature's values in place of their deviation."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_sbn.alternatives.l1 import real, variance_of
from flax_sbn.modules.hooks import Hooks
from flax_sbn.moments import Moments
from flax_sbn.normalization import batch_norm
from flax_sbn.statistics import Statistics


def range_moments(
    x: ArrayLike,
    axes: tuple[int, ...],
    where: jax.Array | None = None,
    one_pass: bool | None = None,
    *,
    num_chunks: int = 16,
    epsilon: float = 1e-5,
) -> Moments:
    r"""Measures the spread of every feature by its largest and smallest values.

    The values of a feature, images first, are split into 16 chunks of :math:`n`
    consecutive ones; with the means over the chunks and :math:`\mu` the mean of all:

    .. math::
      \begin{aligned}
      s &= \frac{0.35}{2} \cdot \frac{1 + \sqrt{\pi \ln 4}}{\sqrt{2 \ln n}}
      \left( \mathrm{mean} \max_i x_i - \mathrm{mean} \min_i x_i \right) + \epsilon \\
      v &= s^2 - \epsilon
      \end{aligned}

    The variance is such that :math:`\sqrt{v + \epsilon} = s` is what normalization
    divides by. Of normally distributed values :math:`s` is less than the standard
    deviation: 0.52 of it for n = 2, 0.75 for 8, 0.85 for 32, 0.90 for 128, 0.94 for
    1024 and 0.97 for 16384.

    Where the number of values is no multiple of ``num_chunks``, the remainder counts in
    the mean only; there are fewer chunks where they would be of less than two values.
    With a mask :math:`n` is the number of values left in a chunk, and each range has
    its own factor; chunks of less than two are left out, and a feature without any
    other counts as not measured. It is a ``Measure``.

    Args:
      x: real values; measured in float32 or wider.
      axes: the axes to reduce, all but the feature axes.
      where: booleans of the shape of ``x``: False leaves a value out.
      one_pass: without effect: mean and range are one pass.
      num_chunks: the number of chunks.
      epsilon: added to :math:`s`; also that of the normalization. As :math:`v` is
        rounded, :math:`s` counts as at least 0.003 times the root of epsilon.

    Returns:
      Number of values, mean and :math:`v`, each ``(C,)``, float32 or wider. Over
      several parts of a sample, and over devices, they mix as mean and variance.

    Raises:
      TypeError: if ``x`` is complex.
      ValueError: if there is only one value per feature, or no chunk.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.arange(4.0).reshape(4, 1)
      >>> num, mean, var = sbn.alternatives.range_moments(x, (0,), num_chunks=2)
      >>> num, mean, bool(var > 0)
      (Array([4.], dtype=float32), Array([1.5], dtype=float32), True)

    Source: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks",
    arXiv 1805.11046. Remainder, masks, :math:`\epsilon`, and how parts and devices mix
    are ours.
    """
    x = real(x)
    size = math.prod(x.shape[a] for a in axes)
    if size < 2 or num_chunks < 1:
        raise ValueError(
            "Expected two or more values per feature and num_chunks >= 1, got "
            f"{size} values and {num_chunks=}. The range of one value is zero: give "
            "more images, or a larger sample."
        )
    chunks = min(num_chunks, size // 2)

    def chunked(values: jax.Array) -> jax.Array:
        values = jnp.moveaxis(values, axes, range(len(axes)))
        features = values.shape[len(axes) :]
        values = values.reshape(size, *features)[: size - size % chunks]
        return values.reshape(chunks, size // chunks, *features)

    if where is None:
        low = high = chunked(x)
        mean = x.mean(axes)
        num = jnp.full(mean.shape, size, x.dtype)
        counts = jnp.full((chunks, *mean.shape), size // chunks, x.dtype)
    else:
        # What is masked may be NaN: keep it out of the gradient, too.
        num = where.sum(axes, dtype=x.dtype)
        mean = jnp.where(where, x, 0).sum(axes) / jnp.maximum(num, 1)
        low, high = (chunked(jnp.where(where, x, fill)) for fill in (jnp.inf, -jnp.inf))
        counts = chunked(where).sum(1, dtype=x.dtype)

    spans = counts >= 2
    factor = 0.35 / 2 * (1 + math.sqrt(math.pi * math.log(4)))
    factors = factor / jnp.sqrt(2 * jnp.log(jnp.maximum(counts, 2)))
    ranges = jnp.where(spans, factors * (high.max(1) - low.min(1)), 0)
    std = ranges.sum(0) / jnp.maximum(spans.sum(0, dtype=x.dtype), 1) + epsilon
    return Moments(jnp.where(spans.any(0), num, 0), mean, variance_of(std, epsilon))


def range_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_chunks: int = 16,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes by the range of the values.

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias}

    with :math:`\mu` and :math:`s` as in :func:`range_moments`.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; real.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      num_chunks: the number of chunks whose ranges are averaged.
      epsilon: added to :math:`s`.
      **options: those of :func:`flax_sbn.batch_norm`, but no ``measure``.

    Returns:
      The normalized array, of the shape of ``x``, and the measured statistics,
      ``(C,)``: :math:`\mu` and :math:`s^2 - \epsilon`. They are averaged by
      :func:`flax_sbn.update_running` with ``std_epsilon=epsilon``, and evaluated by
      :func:`flax_sbn.normalize`.

    Raises:
      TypeError: if ``x`` is complex, and as :func:`flax_sbn.batch_norm`.
      ValueError: see :func:`range_moments` and :func:`flax_sbn.batch_norm`.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (128, 16, 16, 8))
      >>> y, statistics = sbn.alternatives.range_batch_norm(x)
      >>> bool(abs(y.mean()) < 0.1 and abs(y.std() - 1) < 0.1)
      True

    Source: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks",
    arXiv 1805.11046.
    """
    measure = functools.partial(range_moments, num_chunks=num_chunks, epsilon=epsilon)
    return batch_norm(x, scale, bias, measure=measure, epsilon=epsilon, **options)


class RangeHooks(Hooks):
    """Measures the range."""

    averages_deviations = True

    def _measure(self: Any, *values: Any) -> Moments:
        return range_moments(*values, num_chunks=self.num_chunks, epsilon=self.epsilon)
