"""Batch Renormalization."""

from flax_sbn.alternatives.batch_renormalization import D_MAX, R_MAX, RenormHooks
from flax_sbn.alternatives.schedules import Schedule
from flax_sbn.linen.batch_norm import CountingBatchNorm


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

    Attributes:
      running_weight: how far the statistics are corrected towards the running ones, in
        [0, 1]; 1 is the paper's.
      r_max: limit of the scale's correction, at least 1: a number or a function of the
        step; by default the paper's, 1 up to step 5,000 and 3 from step 40,000.
      d_max: limit of the mean's correction, at least 0, likewise: 0 up to step 5,000
        and 5 from step 25,000.

    Raises:
      TypeError: as :class:`BatchNorm`.
      ValueError: if a number is out of its range, and as :class:`BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.BatchRenorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> jax.tree.map(jnp.shape, updates), int(updates["batch_stats"]["step"])
      ({'batch_stats': {'mean': (6,), 'step': (), 'var': (6,)}}, 1)

    Source: Ioffe, "Batch Renormalization", arXiv 1702.03275. Samples, and the fold, are
    ours.
    """

    running_weight: float = 1.0
    r_max: Schedule = R_MAX
    d_max: Schedule = D_MAX
