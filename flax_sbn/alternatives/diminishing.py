"""Diminishing batch norm: normalizes with a moving average whose steps grow smaller."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_sbn.alternatives.schedules import value_at
from flax_sbn.modules.hooks import Hooks
from flax_sbn.normalization import batch_norm
from flax_sbn.statistics import Statistics


def diminishing_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running: Statistics,
    weight: float | jax.Array,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes with a mixture of the batch's statistics and those of all before.

    With :math:`\mu_b, s_b` measured, where :math:`s = \sqrt{v + \epsilon}`, and a
    weight :math:`a_t` that falls from 1 during training:

    .. math::
      \begin{aligned}
      \mu_t &= a_t \mu_b + (1 - a_t) \mu_{t-1} \\
      s_t &= a_t s_b + (1 - a_t) s_{t-1}
      \end{aligned}

      y = \mathit{scale} \cdot \frac{x - \mu_t}{s_t} + \mathit{bias}

    The gradient goes through :math:`a_t \mu_b` and :math:`a_t s_b`; what is remembered
    is constant. A weight of 1 is batch norm. Inference uses the last mixture.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      running: the mixture of the step before, ``(C,)``.
      weight: the weight :math:`a_t` of this step's statistics, in [0, 1]; an array is
        clipped.
      epsilon: added to the variances.
      **options: those of :func:`flax_sbn.batch_norm`: ``sampler``, ``key``, ``axis``,
        ``mask``, ``axis_name``, ``dtype`` and others.

    Returns:
      The normalized array, of the shape of ``x``, and this step's mixture, ``(C,)``,
      without a gradient: the next ``running``.

    Raises:
      TypeError: see :func:`flax_sbn.batch_statistics`.
      ValueError: if ``weight`` is out of range, and as :func:`flax_sbn.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 8, 8, 16))
      >>> running = sbn.Statistics(jnp.zeros(16), jnp.ones(16))
      >>> y, running = sbn.alternatives.diminishing_batch_norm(
      ...     x, running=running, weight=1.0
      ... )
      >>> bool(jnp.allclose(y, sbn.normalize(x, running), atol=1e-5))
      True

    Source: Ma & Klabjan, "Diminishing Batch Normalization", arXiv 1705.08011. The
    formulation is ours.
    """
    correct = functools.partial(diminished, weight=weight, epsilon=epsilon)
    y, measured = batch_norm(
        x, scale, bias, running=running, correct=correct, epsilon=epsilon, **options
    )
    return y, update_diminished(running, measured, weight=weight, epsilon=epsilon)


def diminished(
    statistics: Statistics,
    running: Statistics | None,
    *,
    weight: float | jax.Array,
    epsilon: float = 1e-5,
) -> Statistics:
    r"""Mixes measured means and standard deviations with remembered ones.

    A ``correct`` of :func:`flax_sbn.batch_norm` and :func:`flax_sbn.conv_norm`; see
    :func:`diminishing_batch_norm`.

    Args:
      statistics: measured, ``(C,)``; float32 or wider.
      running: the mixture of the step before, ``(C,)``.
      weight: that of ``statistics``, in [0, 1]; an array is clipped.
      epsilon: added to the variances.

    Returns:
      Statistics of shape ``(C,)``.

    Raises:
      ValueError: if ``weight`` is out of range, or ``running`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> measured = sbn.Statistics(jnp.array([2.0]), jnp.array([1.0]))
      >>> running = sbn.Statistics(jnp.array([0.0]), jnp.array([9.0]))
      >>> mixed = sbn.alternatives.diminished(
      ...     measured, running, weight=0.5, epsilon=0.0
      ... )
      >>> print(mixed.mean, mixed.var)
      [1.] [4.]
    """
    if isinstance(weight, jax.Array):
        weight = jnp.clip(weight, 0.0, 1.0)
    elif not 0 <= weight <= 1:
        raise ValueError(
            f"Expected weight in [0, 1], got {weight=!r}. It is the share of this "
            "step's statistics: 1 is batch norm."
        )
    if running is None:
        raise ValueError(
            "Expected the statistics of the step before, got running=None. Pass "
            "running=Statistics(mean, var); with weight=1 any will do."
        )
    kept = lax.stop_gradient(running)
    new, old = (jnp.sqrt(s.var + epsilon) for s in (statistics, kept))
    # Each with its weight: a step of the difference cancels where the old is large.
    std = weight * new + (1 - weight) * old
    mean = weight * statistics.mean + (1 - weight) * kept.mean
    return Statistics(mean, jnp.square(std) - epsilon)


def update_diminished(
    running: Statistics,
    statistics: Statistics,
    *,
    weight: float | jax.Array,
    epsilon: float = 1e-5,
) -> Statistics:
    """Returns the mixture to remember: without a gradient, in the dtype of the last.

    See :func:`diminished` for what it takes and raises. Complex for complex inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> measured = sbn.Statistics(jnp.array([2.0]), jnp.array([1.0]))
      >>> running = sbn.Statistics(jnp.array([0.0]), jnp.array([9.0]))
      >>> mixed = sbn.alternatives.update_diminished(running, measured, weight=0.5)
      >>> bool(jnp.allclose(mixed.var, 4))
      True
    """
    mixed = diminished(statistics, running, weight=weight, epsilon=epsilon)
    mean, var = lax.stop_gradient(mixed)
    if not jnp.iscomplexobj(mean):
        mean = mean.astype(running.mean.dtype)
    return Statistics(mean, var.astype(running.var.dtype))


def one_over_steps(step: jax.Array, floor: float = 0.25) -> jax.Array:
    r"""Returns the default weight, :math:`a_t = \max(1 / (t + 1),\ \mathit{floor})`.

    The gradient through the statistics falls with the weight, and the statistics fall
    behind the parameters: with a small weight a deep network may diverge. The floor is
    ours.

    Args:
      step: number of training steps so far.
      floor: the least weight; that of a moving average over ``1 / floor`` steps.

    Example:
      >>> import flax_sbn as sbn
      >>> [float(sbn.alternatives.one_over_steps(step)) for step in (0, 1, 99)]
      [1.0, 0.5, 0.25]
    """
    return jnp.maximum(1 / (step + 1), floor)


class DiminishingHooks(Hooks):
    """Corrects and updates alike, with a weight that depends on the number of steps."""

    def _correct(
        self: Any, statistics: Statistics, running: Statistics | None
    ) -> Statistics:
        weight = value_at(self.weight, self._num_steps())
        return diminished(statistics, running, weight=weight, epsilon=self.epsilon)

    def _update(self: Any, running: Statistics, statistics: Statistics) -> Statistics:
        weight = value_at(self.weight, self._num_steps())
        return update_diminished(
            running, statistics, weight=weight, epsilon=self.epsilon
        )
