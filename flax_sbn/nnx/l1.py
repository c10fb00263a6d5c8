"""L1-norm batch norm as an NNX layer."""

from flax_sbn.alternatives.l1 import L1Hooks
from flax_sbn.nnx.batch_norm import BatchNorm


class L1BatchNorm(L1Hooks, BatchNorm):
    r"""Batch norm by the mean absolute deviation.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias} \\
      s &= \sqrt{\pi / 2} \cdot \mathrm{mean}\,|x - \mu| + \epsilon
      \end{aligned}

    All else is as in :class:`BatchNorm`, with its arguments and names, for real inputs.
    The running average is that of :math:`s`; the statistic ``var`` is its square less
    ``epsilon``, and negative where a feature hardly varies. See
    :func:`flax_sbn.alternatives.l1_moments`.

    Raises:
      TypeError: see :class:`BatchNorm`.
      ValueError: see :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.L1BatchNorm(6, rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (32, 8, 8, 6)))
      >>> y.shape, bool((layer.var[...] != 1).all())
      ((32, 8, 8, 6), True)

    Source: Wu et al., "L1-Norm Batch Normalization for Efficient Training of Deep
    Neural Networks", arXiv 1802.09769.
    """
