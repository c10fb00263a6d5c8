"""Batch Renormalization: in training, the output of inference, with BN's gradient."""

import functools
from typing import Any

import jax
from jax.typing import ArrayLike

from flax_sbn.alternatives.schedules import Ramp, value_at
from flax_sbn.modules.hooks import Hooks
from flax_sbn.normalization import batch_norm
from flax_sbn.renormalization import renormalize
from flax_sbn.statistics import Statistics

# The paper's, which trains for some 100,000 steps.
R_MAX = Ramp(5_000, 40_000, 1.0, 3.0)
D_MAX = Ramp(5_000, 25_000, 0.0, 5.0)


def batch_renorm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running: Statistics,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes with the batch's statistics, corrected to the running ones.

    With :math:`\mu_b, s_b` measured and :math:`\mu, s` running, where :math:`s =
    \sqrt{v + \epsilon}`, and two corrections that count as constants in the gradient:

    .. math::
      \begin{aligned}
      r &= \mathrm{clip}(s_b / s,\ 1 / r_{max},\ r_{max}) \\
      d &= \mathrm{clip}((\mu_b - \mu) / s,\ -d_{max},\ d_{max})
      \end{aligned}

      y = \mathit{scale} \cdot \Big( \frac{x - \mu_b}{s_b} \cdot r + d \Big) +
      \mathit{bias}

    Where nothing is clipped that is what inference does, and with ``r_max=1`` and
    ``d_max=0`` it is batch norm.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      running: running statistics from before this step, ``(C,)``.
      r_max: limit of the scale's correction, at least 1.
      d_max: limit of the mean's correction, in standard deviations, at least 0.
      epsilon: added to the variances, once.
      **options: those of :func:`flax_sbn.batch_norm`: ``sampler``, ``key``, ``axis``,
        ``mask``, ``axis_name``, ``dtype`` and others.

    Returns:
      The normalized array, of the shape of ``x``, and the measured statistics,
      ``(C,)``. The running ones follow them with
      ``update_running(running, measured, momentum, std_epsilon=epsilon)``, which
      averages standard deviations.

    Raises:
      TypeError: see :func:`flax_sbn.batch_statistics`.
      ValueError: if a limit is too low, and as :func:`flax_sbn.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
      >>> running = sbn.Statistics(jnp.full(16, 3.0), jnp.full(16, 4.0))
      >>> y, _ = sbn.alternatives.batch_renorm(x, running=running, r_max=3.0, d_max=5.0)
      >>> bool(jnp.allclose(y, sbn.normalize(x, running), atol=1e-5))
      True

    Source: Ioffe, "Batch Renormalization", arXiv 1702.03275. Measuring a sample, and
    folding into a convolution (``conv_norm`` with this ``correct``) are ours.
    """
    correct = functools.partial(renormalize, r_max=r_max, d_max=d_max, epsilon=epsilon)
    return batch_norm(
        x, scale, bias, running=running, correct=correct, epsilon=epsilon, **options
    )


class RenormHooks(Hooks):
    """Corrects within limits that grow with the number of steps."""

    averages_deviations = True

    def _correct(
        self: Any, statistics: Statistics, running: Statistics | None
    ) -> Statistics:
        return renormalize(
            statistics,
            running,
            running_weight=self.running_weight,
            r_max=value_at(self.r_max, self._num_steps()),
            d_max=value_at(self.d_max, self._num_steps()),
            epsilon=self.epsilon,
        )
