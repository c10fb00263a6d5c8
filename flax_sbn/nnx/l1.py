"""L1-norm batch norm as an nnx layer."""

import jax

from flax_sbn.alternatives.l1 import l1_moments
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.statistics import Moments


class L1BatchNorm(BatchNorm):
    r"""Batch norm by the mean absolute deviation.

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{s} + \mathit{bias}, \qquad
      s = \sqrt{\pi / 2} \cdot \mathrm{mean}\,|x - \mu| + \epsilon

    :class:`BatchNorm` otherwise, with its arguments and names, for real inputs. The
    running average is that of :math:`s`; the statistic ``var`` is its square less
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

    averages_deviations = True

    def _measure(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        where: jax.Array | None,
        one_pass: bool | None,
    ) -> Moments:
        """Returns the moments of measured values."""
        return l1_moments(x, axes, where, one_pass, epsilon=self.epsilon)
