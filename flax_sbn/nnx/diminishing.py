"""Diminishing batch norm, as an NNX layer."""

from typing import Any

from flax import nnx

from flax_sbn.alternatives.diminishing import DiminishingHooks, one_over_steps
from flax_sbn.alternatives.schedules import Schedule
from flax_sbn.nnx.batch_norm import CountingBatchNorm


class DiminishingBatchNorm(DiminishingHooks, CountingBatchNorm):
    r"""Batch norm with a moving average whose steps grow smaller, in training as well.

    .. math::
      \begin{aligned}
      \mu_t &= a_t \mu_b + (1 - a_t) \mu_{t-1} \\
      s_t &= a_t s_b + (1 - a_t) s_{t-1} \\
      y &= \mathit{scale} \cdot \frac{x - \mu_t}{s_t} + \mathit{bias}
      \end{aligned}

    :class:`BatchNorm` that normalizes with its running statistics after they have been
    updated; see :func:`flax_sbn.alternatives.diminishing_batch_norm`, and for the rest
    :class:`BatchNorm`. ``var`` is the square of :math:`s_t` less ``epsilon``, so that
    evaluation, export and :class:`BatchNorm` read it as usual. The number of training
    steps is kept with it as ``step``, int32, and is saved and restored with it.
    ``weight`` takes the place of ``momentum`` and ``running_weight``, which have no
    effect.

    With a ``sampler`` it mixes sampled statistics, and as ``norm_cls`` of
    :class:`ConvNorm` and :class:`DenseNorm` it folds into the layer before it.

    Args:
      num_features: number of features ``C``.
      weight: the weight :math:`a_t` of a step's statistics: a number in [0, 1] or a
        function of the step, whose values are clipped; 1 is :class:`BatchNorm`.
      rngs: see :class:`BatchNorm`.
      **options: those of :class:`BatchNorm`.

    Raises:
      TypeError: as :class:`BatchNorm`.
      ValueError: if a number is out of range, and as :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.DiminishingBatchNorm(6, rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (8, 8, 8, 6)))
      >>> y.shape, int(layer.step[...])
      ((8, 8, 8, 6), 1)

    Source: Ma & Klabjan, "Diminishing Batch Normalization", arXiv 1705.08011. The
    formulation, and the default weight, are ours.
    """

    def __init__(
        self,
        num_features: int,
        *,
        weight: Schedule = one_over_steps,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.weight = weight
