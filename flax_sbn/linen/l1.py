"""L1-norm batch norm as a Linen layer."""

from flax_sbn.alternatives.l1 import L1Hooks
from flax_sbn.linen.batch_norm import BatchNorm


class L1BatchNorm(L1Hooks, BatchNorm):
    r"""Batch norm by the mean absolute deviation.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias} \\
      s &= \sqrt{\pi / 2} \cdot \mathrm{mean}\,|x - \mu| + \epsilon
      \end{aligned}

    All else is as in :class:`BatchNorm`, with its fields and names, for real inputs.
    The running average is that of :math:`s`; the statistic ``var`` is its square less
    ``epsilon``, and negative where a feature hardly varies. See
    :func:`flax_sbn.alternatives.l1_moments`.

    Raises:
      TypeError: if the input is complex, and as :class:`BatchNorm`.
      ValueError: see :class:`BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.L1BatchNorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape, jax.tree.map(jnp.shape, updates)
      ((32, 8, 8, 6), {'batch_stats': {'mean': (6,), 'var': (6,)}})

    Source: Wu et al., "L1-Norm Batch Normalization for Efficient Training of Deep
    Neural Networks", arXiv 1802.09769.
    """
