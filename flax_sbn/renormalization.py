"""Statistics of a sample, corrected by the running ones."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flax_sbn.arguments import check_numbers
from flax_sbn.statistics import Statistics

# Makes statistics to normalize with of the measured and the running ones.
Correct = Callable[[Statistics, Statistics | None], Statistics]


def correction(running_weight: float | jax.Array, epsilon: float) -> Correct:
    """Returns :func:`renormalize` with a given share of the running statistics."""
    return functools.partial(
        renormalize, running_weight=running_weight, epsilon=epsilon
    )


def renormalize(
    statistics: Statistics,
    running: Statistics | None,
    *,
    running_weight: float | jax.Array = 1.0,
    r_max: float | jax.Array = 3.0,
    d_max: float | jax.Array = 5.0,
    epsilon: float = 1e-5,
) -> Statistics:
    r"""Moves the statistics of a batch or sample towards the running ones.

    With :math:`\mu_b, v_b` measured, :math:`\mu_r, v_r` running, a share ``w`` and
    :math:`s = \sqrt{v + \epsilon}` throughout, the target is

    .. math::
      \begin{aligned}
      \mu_t &= (1 - w) \mu_b + w \mu_r \\
      v_t &= (1 - w) v_b + w v_r
      \end{aligned}

    and is reached by two corrections that count as constants in the gradient:

    .. math::
      \begin{aligned}
      r &= \mathrm{clip}(s_b / s_t,\ 1 / r_{max},\ r_{max}) \\
      d &= \mathrm{clip}((\mu_b - \mu_t) / s_t,\ -d_{max},\ d_{max}) \\
      s &= s_b / r, \qquad \mu = \mu_b - d s
      \end{aligned}

    so that :math:`(x - \mu) / s = (x - \mu_b) / s_b \cdot r + d`. The value has little
    of the sample's noise; the gradient still goes through what was measured, so that
    neither a shift nor a scaling of ``x`` changes the loss. The limits keep running
    statistics that are stale, or fresh from initialization, from doing harm.

    Args:
      statistics: measured, ``(C,)``; float32 or wider.
      running: running statistics from before this step, ``(C,)``; may be None where
        ``running_weight`` is 0.
      running_weight: the share ``w`` in [0, 1]: 0 changes nothing, 1 is Batch
        Renormalization.
      r_max: limit of the scale's correction, at least 1; an array below counts as 1.
      d_max: limit of the mean's correction, in standard deviations, at least 0; an
        array below counts as 0.
      epsilon: added to the variances.

    Returns:
      Statistics to normalize with, ``(C,)``. The running statistics are to be updated
      with the measured ones.

    Raises:
      TypeError: if ``running_weight``, a limit or ``epsilon`` is no number.
      ValueError: if ``running_weight`` is outside [0, 1], a limit is too low, or
        ``running`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import Statistics, renormalize
      >>> measured = Statistics(mean=jnp.array([2.0]), var=jnp.array([1.0]))
      >>> running = Statistics(mean=jnp.array([0.0]), var=jnp.array([5.0]))
      >>> found = renormalize(measured, running, running_weight=0.75, epsilon=0.0)
      >>> print(found.mean, found.var)
      [0.5] [4.]

    Source: Ioffe, "Batch Renormalization", arXiv 1702.03275, for ``w = 1``; its limits
    grow during training, these are where they end. The share and its use for the noise
    of a sample are ours.
    """
    check_numbers(epsilon=epsilon)
    for name, value, least, most in (
        ("running_weight", running_weight, 0.0, 1.0),
        ("r_max", r_max, 1.0, float("inf")),
        ("d_max", d_max, 0.0, float("inf")),
    ):
        check_numbers(**{name: value})
        if not isinstance(value, jax.Array) and not least <= value <= most:
            raise ValueError(
                f"Expected {name} in [{least:g}, {most:g}], got {name}={value!r}."
            )
    if not isinstance(running_weight, jax.Array) and running_weight == 0:
        return statistics
    if running is None:
        raise ValueError(
            f"Expected running statistics with {running_weight=}, got None. Pass "
            "running=Statistics(mean, var), those from before this step."
        )
    r_max, d_max = jnp.maximum(r_max, 1.0), jnp.maximum(d_max, 0.0)
    measured, kept = lax.stop_gradient((statistics, running))
    mean = measured.mean + running_weight * (kept.mean - measured.mean)
    var = measured.var + running_weight * (kept.var - measured.var)
    std = jnp.sqrt(var + epsilon)
    r = jnp.clip(jnp.sqrt(measured.var + epsilon) / std, 1 / r_max, r_max)
    d = (measured.mean - mean) / std
    d *= jnp.minimum(1.0, d_max / jnp.maximum(jnp.abs(d), 1e-30))  # also if complex
    square = (statistics.var + epsilon) / r**2
    return Statistics(statistics.mean - d * jnp.sqrt(square), square - epsilon)
