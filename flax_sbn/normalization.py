"""Normalize everything with given statistics; batch norm, which measures them first.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.arguments import check_numbers
from flax_sbn.moments import Measure, wide
from flax_sbn.renormalization import Correct, correction
from flax_sbn.sampling import Sampler
from flax_sbn.statistics import (
    Axis,
    Measurement,
    Statistics,
    of_features,
    reduction_axes,
)


def normalize(
    x: ArrayLike,
    statistics: Statistics,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes every value with the given statistics.

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{\sqrt{v + \epsilon}} + \mathit{bias}

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``.
      statistics: mean and variance, ``(C,)``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      axis: the feature axis or axes.
      epsilon: added to the variance.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted. The arithmetic is in the dtype of the statistics or wider.

    Returns:
      An array of the shape of ``x``.

    Raises:
      TypeError: if ``epsilon`` is not a number.
      ValueError: if ``axis`` is out of range, or ``scale``, ``bias`` or the statistics
        have another shape than the feature axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import Statistics, normalize
      >>> statistics = Statistics(mean=jnp.array([1.0]), var=jnp.array([4.0]))
      >>> normalize(jnp.array([[1.0], [5.0]]), statistics, epsilon=0.0)
      Array([[0.],
             [2.]], dtype=float32)

    Source: Ioffe & Szegedy, "Batch Normalization", arXiv 1502.03167.
    """
    check_numbers(epsilon=epsilon)
    x = jnp.asarray(x)
    axes = reduction_axes(x.ndim, axis)

    def expand(name: str, value: ArrayLike) -> jax.Array:
        return jnp.expand_dims(of_features(name, value, x.shape, axis), axes)

    y = x - expand("mean", statistics.mean)
    factor = lax.rsqrt(expand("var", statistics.var) + epsilon)
    if scale is not None:
        factor *= expand("scale", scale)
    y *= factor
    if bias is not None:
        y += expand("bias", bias)
    return y.astype(canonicalize_dtype(x, scale, bias, dtype=dtype))


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    running: Statistics | None = None,
    running_weight: float | jax.Array = 0.0,
    measure: Measure | None = None,
    correct: Correct | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes every value with statistics that are measured on a sample.

    With :math:`S` the sampled positions, :math:`m = |S|`, :math:`s = \sqrt{v +
    \epsilon}` and :math:`\hat x = (x - \mu) / s`:

    .. math::
      y = \mathit{scale} \cdot \hat x + \mathit{bias}

    The gradient goes through the statistics, and arrives at the sampled positions. With
    :math:`g = \partial L / \partial y`:

    .. math::
      \frac{\partial L}{\partial x} = \frac{\mathit{scale}}{s} \left( g -
      \frac{[x \in S]}{m} \Big( \sum g + \hat x \sum g \hat x \Big) \right)

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; the first of the other axes
        holds the images. Any real or complex dtype.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      sampler: which positions are measured; None measures all: ordinary BN.
      key: random key, for samplers that draw positions.
      axis: the feature axis or axes.
      mask: booleans that broadcast to ``x``: False leaves a position out of the
        statistics. It is normalized all the same.
      axis_name: see :func:`batch_statistics`.
      axis_index_groups: see :func:`batch_statistics`.
      use_fast_variance: see :func:`batch_statistics`.
      running: see :func:`batch_statistics`.
      running_weight: how far the statistics are moved towards ``running`` before
        normalizing, in [0, 1]; see :func:`renormalize`.
      measure: see :func:`batch_statistics`.
      correct: called with the measured and the running statistics; returns those to
        normalize with. By default :func:`renormalize` with ``running_weight``.
      epsilon: added to the variance.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted.

    Returns:
      The normalized array, of the shape of ``x``, and the measured statistics,
      ``(C,)``.

    Raises:
      TypeError: see :func:`batch_statistics` and :func:`normalize`.
      ValueError: see :func:`batch_statistics`, :func:`normalize` and
        :func:`renormalize`.

    Example:
      >>> import jax
      >>> from flax_sbn import BatchSampling, batch_norm
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (128, 16, 16, 8))
      >>> y, statistics = batch_norm(x, sampler=BatchSampling(8), key=jax.random.key(1))
      >>> bool(abs(y.mean()) < 0.1 and abs(y.var() - 1) < 0.1)
      True

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """
    norm = Norm(
        sampler=sampler,
        key=key,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        running=running,
        running_weight=running_weight,
        measure=measure,
        correct=correct,
        epsilon=epsilon,
        dtype=dtype,
    )
    return norm(jnp.asarray(x), scale, bias, axis)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Norm(Measurement):
    """What a batch norm does: the options of :func:`batch_norm` as one value."""

    running_weight: float | jax.Array = 0.0
    correct: Correct | None = None
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None

    def __call__(
        self,
        x: jax.Array,
        scale: ArrayLike | None,
        bias: ArrayLike | None,
        axis: Axis = -1,
    ) -> tuple[jax.Array, Statistics]:
        """Measures and normalizes; see :func:`batch_norm`."""
        # The gradients of the measured and of all values meet here: in float32 they
        # fuse into one addition, in half precision into none (on a CPU up to 4 x the
        # time).
        values = wide(x)
        statistics = self.measured(values, axis)
        y = normalize(
            values,
            self.target(statistics),
            scale,
            bias,
            axis=axis,
            epsilon=self.epsilon,
            dtype=canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        return y, statistics

    def target(self, statistics: Statistics) -> Statistics:
        """Returns what to normalize with, given what was measured."""
        correct = self.correct or correction(self.running_weight, self.epsilon)
        return correct(statistics, self.running)
