"""Range batch norm as an NNX layer."""

from typing import Any

from flax import nnx

from flax_sbn.alternatives.range_norm import RangeHooks
from flax_sbn.nnx.batch_norm import BatchNorm


class RangeBatchNorm(RangeHooks, BatchNorm):
    r"""Batch norm by the range of the values.

    With the largest and smallest of ``n`` values, averaged over ``num_chunks`` chunks:

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias} \\
      s &= \frac{0.35}{2} \cdot \frac{1 + \sqrt{\pi \ln 4}}{\sqrt{2 \ln n}}
      \left( \mathrm{mean} \max x - \mathrm{mean} \min x \right) + \epsilon
      \end{aligned}

    All else is as in :class:`BatchNorm`, with its arguments and names, for real inputs.
    The running average is that of :math:`s`; the statistic ``var`` is its square less
    ``epsilon``, and negative where a feature hardly varies. See
    :func:`flax_sbn.alternatives.range_moments`.

    Args:
      num_features: number of features ``C``.
      num_chunks: the number of chunks.
      rngs: see :class:`BatchNorm`.
      **options: those of :class:`BatchNorm`.

    Raises:
      TypeError: see :class:`BatchNorm`.
      ValueError: if only one value per feature is measured, and as :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.RangeBatchNorm(6, rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (32, 8, 8, 6)))
      >>> y.shape, bool((layer.var[...] != 1).all())
      ((32, 8, 8, 6), True)

    Source: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks",
    arXiv 1805.11046.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_chunks: int = 16,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.num_chunks = num_chunks
