"""Batch Renormalization."""

from typing import Any

from flax import nnx

from flax_sbn.alternatives.batch_renormalization import D_MAX, R_MAX, RenormHooks
from flax_sbn.alternatives.schedules import Schedule
from flax_sbn.nnx.batch_norm import CountingBatchNorm


class BatchRenorm(RenormHooks, CountingBatchNorm):
    r"""Batch Renormalization: trains with the output of evaluation and BN's gradient.

    .. math::
      y = \mathit{scale} \cdot \Big( \frac{x - \mu_b}{s_b} \cdot r + d \Big) +
      \mathit{bias}

    :class:`BatchNorm` whose statistics are corrected to the running ones; see
    :func:`flax_sbn.alternatives.batch_renorm` for ``r`` and ``d``, and for the rest
    :class:`BatchNorm`. The limits grow with the number of training steps, which is kept
    with the running statistics as ``step``, int32, and is saved and restored with them.
    Running standard deviations are averaged; ``var`` is their square less ``epsilon``,
    so that evaluation, export and :class:`BatchNorm` read it as usual.

    With a ``sampler`` it is Batch Renormalization of sampled statistics, and as
    ``norm_cls`` of :class:`ConvNorm` and :class:`DenseNorm` it folds into the layer
    before it.

    Args:
      num_features: number of features ``C``.
      running_weight: how far the statistics are corrected towards the running ones, in
        [0, 1]; 1 is the paper's.
      r_max: limit of the scale's correction, at least 1: a number or a function of the
        step; by default the paper's, 1 up to step 5,000 and 3 from step 40,000.
      d_max: limit of the mean's correction, at least 0, likewise: 0 up to step 5,000
        and 5 from step 25,000.
      rngs: see :class:`BatchNorm`.
      **options: those of :class:`BatchNorm`.

    Raises:
      TypeError: as :class:`BatchNorm`.
      ValueError: if a number is out of its range, and as :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.BatchRenorm(6, rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (2, 8, 8, 6)))
      >>> y.shape, int(layer.step[...])
      ((2, 8, 8, 6), 1)

    Source: Ioffe, "Batch Renormalization", arXiv 1702.03275. Samples, and the fold, are
    ours.
    """

    def __init__(
        self,
        num_features: int,
        *,
        running_weight: float = 1.0,
        r_max: Schedule = R_MAX,
        d_max: Schedule = D_MAX,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features, running_weight=running_weight, rngs=rngs, **options
        )
        self.r_max, self.d_max = r_max, d_max
