"""Range batch norm as a Linen layer."""

from flax_sbn.alternatives.range_norm import RangeHooks
from flax_sbn.linen.batch_norm import BatchNorm


class RangeBatchNorm(RangeHooks, BatchNorm):
    r"""Batch norm by the range of the values.

    With the largest and smallest of ``n`` values, averaged over ``num_chunks`` chunks:

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias} \\
      s &= \frac{0.35}{2} \cdot \frac{1 + \sqrt{\pi \ln 4}}{\sqrt{2 \ln n}}
      \left( \mathrm{mean} \max x - \mathrm{mean} \min x \right) + \epsilon
      \end{aligned}

    All else is as in :class:`BatchNorm`, with its fields and names, for real inputs.
    The running average is that of :math:`s`; the statistic ``var`` is its square less
    ``epsilon``, and negative where a feature hardly varies. See
    :func:`flax_sbn.alternatives.range_moments`.

    Attributes:
      num_chunks: the number of chunks.

    Raises:
      TypeError: if the input is complex, and as :class:`BatchNorm`.
      ValueError: if only one value per feature is measured, and as :class:`BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.RangeBatchNorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape, jax.tree.map(jnp.shape, updates)
      ((32, 8, 8, 6), {'batch_stats': {'mean': (6,), 'var': (6,)}})

    Source: Banner et al., "Scalable Methods for 8-bit Training of Neural Networks",
    arXiv 1805.11046.
    """

    num_chunks: int = 16
