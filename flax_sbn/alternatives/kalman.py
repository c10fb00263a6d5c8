"""Kalman normalization: statistics that one layer predicts for the next.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``I`` input and
``C`` output features.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_sbn.activation import Activation
from flax_sbn.normalization import batch_norm
from flax_sbn.renormalization import Correct, correction
from flax_sbn.statistics import (
    Axis,
    Statistics,
    batch_statistics,
    mix_statistics,
    reduction_axes,
)
from flax_sbn.virtual import virtual_samples


def kalman_prior(
    key: jax.Array,
    statistics: Statistics,
    linear: Callable[[jax.Array], jax.Array],
    shape: Sequence[int],
    *,
    activation: Activation | None = jax.nn.relu,
    axis: Axis = -1,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Any = None,
) -> Statistics:
    r"""Predicts the statistics of a layer's output from those of the layer before.

    .. math::
      \begin{aligned}
      z &= \mathrm{activation}(\mu + \sqrt{v}\, \xi),
      \quad \xi \sim \mathcal{N}(0, 1) \\
      \mu_p, v_p &= \mathrm{moments}(\mathrm{linear}(z))
      \end{aligned}

    The gradient goes through the statistics and into the layer's parameters.

    Args:
      key: random key.
      statistics: of the layer before, ``(I,)``.
      linear: the layer, a function of ``(N, *spatial, I)``.
      shape: ``(N, *spatial, I)`` of the synthetic images ``z``. With spatial axes one
        image will do; without, ``N`` is the number of values.
      activation: what lies between the layer before and this one; None for nothing.
      axis: the feature axis or axes of the output.
      axis_name: devices that pool their predictions; see
        :func:`flax_sbn.batch_statistics`.
      axis_index_groups: see there.

    Returns:
      Statistics of the output, ``(C,)``, float32 or wider.

    Raises:
      ValueError: if the statistics are not those of ``I`` features, or there are fewer
        than two synthetic values per feature of the output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> before = sbn.Statistics(jnp.zeros(3), jnp.ones(3))
      >>> prior = sbn.alternatives.kalman_prior(
      ...     jax.random.key(0), before, lambda z: -2 * z, (1, 64, 64, 3)
      ... )
      >>> bool(jnp.allclose(prior.mean, -2 / jnp.sqrt(2 * jnp.pi), rtol=0.05))
      True

    Source: Wang et al., "Batch Kalman Normalization", arXiv 1802.03133; the rectified
    Gaussian image is that of the authors' code. Several images, and other activations,
    are ours.
    """
    shape = tuple(shape)
    mean, var = statistics
    if mean.shape != shape[-1:] or var.shape != shape[-1:]:
        raise ValueError(
            f"Expected statistics of shape {shape[-1:]} for synthetic images of "
            f"{shape=}, got mean of shape {mean.shape} and var of shape {var.shape}. "
            "Pass those of the layer before; where a sum changes the width, those of "
            "add_statistics; or None, to start anew."
        )
    # The square root has no gradient at zero, where a feature is constant.
    positive = var > 0
    std = jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)
    z = virtual_samples(key, shape[0], shape[1:], mean, std, mean.dtype)
    y = linear(z if activation is None else activation(z))
    values = math.prod(y.shape[a] for a in reduction_axes(y.ndim, axis))
    if values < 2:
        raise ValueError(
            f"Expected at least 2 synthetic values per feature, got {values} from "
            f"{shape=}. Draw more images: num_virtual=64 for a dense layer."
        )
    return batch_statistics(
        y, axis=axis, axis_name=axis_name, axis_index_groups=axis_index_groups
    )


def kalman_update(
    measured: Statistics,
    prior: Statistics,
    prior_weight: float | jax.Array = 0.9,
    *,
    max_ratio: float | jax.Array = 100.0,
) -> Statistics:
    r"""Mixes predicted and measured statistics, where the prediction is sensible.

    With ``p`` the weight of the prior, :math:`\mu, v` measured and :math:`\mu_p, v_p`
    predicted:

    .. math::
      \begin{aligned}
      \mu' &= p \mu_p + (1 - p) \mu \\
      v' &= p v_p + (1 - p) v + p (1 - p) (\mu - \mu_p)^2
      \end{aligned}

    where the mean of :math:`v_p / v` over all features is less than ``max_ratio``;
    otherwise :math:`\mu' = \mu, v' = v`.

    Args:
      measured: statistics of the batch or a sample of it, ``(C,)``.
      prior: predicted ones, ``(C,)``.
      prior_weight: share ``p`` of the prior, in [0, 1].
      max_ratio: limit of the variances' ratio. A feature that is constant in the batch
        but not in the prediction exceeds it.

    Returns:
      Statistics of shape ``(C,)``.

    Raises:
      ValueError: if ``prior_weight`` is outside [0, 1], or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> measured = sbn.Statistics(jnp.array([-1.0]), jnp.array([2.0]))
      >>> prior = sbn.Statistics(jnp.array([3.0]), jnp.array([4.0]))
      >>> sbn.alternatives.kalman_update(measured, prior, 0.5)
      Statistics(mean=Array([1.], dtype=float32), var=Array([7.], dtype=float32))

    Source: Wang et al., "Batch Kalman Normalization", arXiv 1802.03133; the limit is
    that of the authors' code.
    """
    if not isinstance(prior_weight, jax.Array) and not 0 <= prior_weight <= 1:
        raise ValueError(f"Expected prior_weight in [0, 1], got {prior_weight=}.")
    if prior.mean.shape != measured.mean.shape:
        raise ValueError(
            f"Expected a prior of shape {measured.mean.shape}, as measured, got prior "
            f"of shape {prior.mean.shape}. Predict it with the layer that is measured."
        )
    least = jnp.finfo(measured.var.dtype).tiny  # 0 / 0 is a feature that agrees
    ratio = jnp.mean(prior.var / jnp.maximum(measured.var, least))
    weight = jnp.where(ratio < max_ratio, prior_weight, 0.0)
    return mix_statistics([prior, measured], [weight, 1 - weight])


def kalman_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    prior: Statistics | None,
    prior_weight: float | jax.Array = 0.9,
    running_weight: float | jax.Array = 0.0,
    correct: Correct | None = None,
    epsilon: float = 1e-5,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes with measured statistics that are mixed with predicted ones.

    With :math:`\mu', v'` those of :func:`kalman_update`:

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu'}{\sqrt{v' + \epsilon}} + \mathit{bias}

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; any floating dtype.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      prior: predicted statistics, ``(C,)``, of :func:`kalman_prior`; None for none,
        which is :func:`flax_sbn.batch_norm`.
      prior_weight: share of the prior, in [0, 1]: the paper's is 0.9 for micro-batches,
        0.05 for large ones.
      running_weight: how far the mixed statistics are moved towards the running ones
        before they normalize; see :func:`flax_sbn.renormalize`.
      correct: what does so; see :func:`flax_sbn.batch_norm`.
      epsilon: added to the variance.
      **options: the others of :func:`flax_sbn.batch_norm`.

    Returns:
      The normalized array, of the shape of ``x``, and the mixed statistics, ``(C,)``:
      for the running ones, and for the layer after.

    Raises:
      TypeError: see :func:`flax_sbn.batch_norm`.
      ValueError: see there, and :func:`kalman_update`.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x = jax.random.normal(keys[0], (2, 8, 8, 3))
      >>> first, second = jax.random.normal(keys[1], (2, 3, 3))
      >>> y, statistics = sbn.alternatives.kalman_norm(x @ first, prior=None)
      >>> prior = sbn.alternatives.kalman_prior(
      ...     keys[2], statistics, lambda z: z @ second, (1, 8, 8, 3)
      ... )
      >>> y, statistics = sbn.alternatives.kalman_norm(
      ...     jax.nn.relu(y) @ second, prior=prior
      ... )
      >>> y.shape, statistics.mean.shape
      ((2, 8, 8, 3), (3,))

    Source: Wang et al., "Batch Kalman Normalization", arXiv 1802.03133. A sample in
    place of the whole micro-batch is ours.
    """
    correct = correct or correction(running_weight, epsilon)

    def mixed(measured: Statistics) -> Statistics:
        if prior is None:
            return measured
        return kalman_update(measured, prior, prior_weight)

    y, measured = batch_norm(
        x,
        scale,
        bias,
        correct=lambda measured, running: correct(mixed(measured), running),
        epsilon=epsilon,
        **options,
    )
    return y, mixed(measured)


def add_statistics(a: Statistics, b: Statistics) -> Statistics:
    r"""Returns the statistics of a sum of two independent arrays: a residual add.

    .. math::
      \begin{aligned}
      \mu &= \mu_a + \mu_b \\
      v &= v_a + v_b
      \end{aligned}

    Args:
      a: ``(A,)``.
      b: ``(B,)``. The narrower of both is filled up with zeros behind its last feature,
        as is a shortcut without parameters.

    Returns:
      Statistics of shape ``(max(A, B),)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> narrow = sbn.Statistics(jnp.array([1.0]), jnp.array([2.0]))
      >>> wide = sbn.Statistics(jnp.array([0.5, 0.0]), jnp.array([1.0, 4.0]))
      >>> print(*sbn.alternatives.add_statistics(narrow, wide))
      [1.5 0. ] [3. 4.]

    Source: the code of Wang et al., "Batch Kalman Normalization", arXiv 1802.03133; it
    fills up on both sides.
    """
    width = max(a.mean.size, b.mean.size)

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.pad(a, (0, width - a.size)) + jnp.pad(b, (0, width - b.size))

    return Statistics(add(a.mean, b.mean), add(a.var, b.var))


class KalmanHooks:
    """What the layer does in training, in Linen as in NNX."""

    def _train(
        self: Any,
        x: jax.Array,
        y: jax.Array,
        statistics: Statistics | None,
        *step: Any,
    ) -> tuple[jax.Array, Statistics]:
        """Normalizes the linear layer's output ``y``; ``step`` is for the norm."""
        norm = self.norm
        if norm.ghost_groups != 1:
            raise ValueError(
                f"Expected norm.ghost_groups=1, got {norm.ghost_groups}. Map the "
                "network over the groups, each with statistics of its own."
            )
        prior = None
        if statistics is not None:
            prior = kalman_prior(
                self._key(),
                statistics,
                self.linear,
                (self.num_virtual, *x.shape[1:]),
                activation=self.input_activation,
                axis_name=norm.axis_name,
                axis_index_groups=norm.axis_index_groups,
            )
        mixed = functools.partial(
            kalman_norm, y, prior=prior, prior_weight=self.prior_weight
        )
        return norm._step(mixed, *step)
