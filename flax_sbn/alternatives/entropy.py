"""SHADE: a loss that keeps little of the input's entropy in a unit's activation.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_sbn.statistics import (
    Axis,
    batch_statistics,
    broadcast_mask,
    of_features,
    reduction_axes,
)


def shade(
    x: ArrayLike,
    means: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Returns how far activations are from the means of their two states.

    Each unit has a hidden bit ``z``, whose probability its activation tells:

    .. math::
      \begin{aligned}
      p(z = 1 \mid x) &= \sigma(x) \\
      p(z = 0 \mid x) &= \sigma(-x)
      \end{aligned}

    The loss is the variance of the activation within a state, which bounds the
    entropy :math:`H(x \mid z)`: what the activation says beyond its bit. It is the mean
    over images and positions, summed over features, and so depends on neither the batch
    size nor the extent of a feature map:

    .. math::
      \Omega = \sum_c \frac{1}{|M_c|} \sum_{i \in M_c} \sum_{z \in \{0, 1\}}
          p(z \mid x_{ic}) (x_{ic} - \mu_{zc})^2

    with :math:`M_c` all positions, or those that the mask leaves. The gradient goes to
    ``x``, through the probabilities too, and not to the means.

    Args:
      x: activations before their nonlinearity, ``(N, *spatial, C)``, or with features
        at ``axis``. Any real dtype; computed in float32 or wider.
      means: those of either state, ``(2, C)``, ``z = 0`` first; see
        :func:`shade_update`.
      axis: the feature axis or axes.
      mask: booleans that broadcast to ``x``: False leaves a position out.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: if ``axis`` is out of range, ``means`` does not have the shape of the
        feature axes, twice, or ``mask`` does not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> means = sbn.alternatives.shade_init((1,))
      >>> far, near = jnp.array([[9.0], [-9.0]]), jnp.array([[1.0], [-1.0]])
      >>> bool(sbn.alternatives.shade(near, means) < sbn.alternatives.shade(far, means))
      True

    Source: Blot et al., "SHADE: Information-Based Regularization for Deep Learning",
    arXiv 1804.10988. The formulation is ours.
    """
    x, means, mask, axes = _aligned(x, means, axis, mask)
    if mask is not None:
        x = jnp.where(mask, x, 0)  # what is masked may be NaN, in the gradient, too
    low, high = (jnp.expand_dims(mean, axes) for mean in lax.stop_gradient(means))
    spread = jax.nn.sigmoid(-x) * (x - low) ** 2 + jax.nn.sigmoid(x) * (x - high) ** 2
    return batch_statistics(spread, axis=axis, mask=mask).mean.sum()


def shade_update(
    means: ArrayLike,
    x: ArrayLike,
    *,
    momentum: float = 0.8,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Returns the moving averages of the means of both states, without gradient.

    .. math::
      \mu_z \leftarrow \mathit{momentum} \cdot \mu_z + (1 - \mathit{momentum})
          \frac{\sum_i p(z \mid x_i) x_i}{\sum_i p(z \mid x_i)}

    The weights are a softmax of log-probabilities, so that a state that no activation
    is likely to be in has a mean, too.

    Args:
      means: the averages so far, ``(2, C)``, ``z = 0`` first.
      x: as for :func:`shade`.
      momentum: decay rate of the average: the weight of the old value.
      axis: the feature axis or axes.
      mask: booleans that broadcast to ``x``: False leaves a position out. Features of
        which nothing is left keep their means.

    Returns:
      An array of the shape and dtype of ``means``.

    Raises:
      ValueError: as for :func:`shade`.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> means = sbn.alternatives.shade_init((3,))
      >>> means = sbn.alternatives.shade_update(means, jnp.ones((8, 3)))
      >>> bool(jnp.allclose(means[0], -0.6)), bool(jnp.allclose(means[1], 1.0))
      (True, True)

    Source: Blot et al., "SHADE: Information-Based Regularization for Deep Learning",
    arXiv 1804.10988. The formulation is ours.
    """
    x, wide, mask, axes = _aligned(x, means, axis, mask)
    x, wide = lax.stop_gradient((x, wide))

    def measure(sign: int, mean: jax.Array) -> jax.Array:
        weights = jax.nn.softmax(jax.nn.log_sigmoid(sign * x), axes, where=mask)
        measured = jnp.sum(weights * x, axes, where=mask)
        return measured if mask is None else jnp.where(mask.any(axes), measured, mean)

    measured = jnp.stack([measure(-1, wide[0]), measure(1, wide[1])])
    updated = wide + (1 - momentum) * (measured - wide)
    return updated.astype(jnp.asarray(means).dtype)


def shade_init(features: Sequence[int]) -> jax.Array:
    """Returns the means to start from: -1 for ``z = 0``, 1 for ``z = 1``.

    Args:
      features: extent of the feature axes.

    Returns:
      An array of shape ``(2, *features)``, float32.

    Example:
      >>> import flax_sbn as sbn
      >>> sbn.alternatives.shade_init((2,))
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
    """
    ones = jnp.ones(features, jnp.float32)
    return jnp.stack([-ones, ones])


def _aligned(
    x: ArrayLike, means: ArrayLike, axis: Axis, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, tuple[int, ...]]:
    """Returns ``x`` and the means in float32 or wider, the mask, the axes to reduce."""
    x = jnp.asarray(x)
    means = of_features("means", means, x.shape, axis, 2)
    axes = reduction_axes(x.ndim, axis)
    wide = jnp.result_type(x.dtype, means.dtype, jnp.float32)
    if mask is not None:
        mask = broadcast_mask(mask, x.shape)
    return x.astype(wide), means.astype(wide), mask, axes
