"""Ghost batch norm: groups of images that are normalized separately."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_sbn.normalization import batch_norm
from flax_sbn.statistics import Axis, Statistics, broadcast_mask, reduction_axes
from flax_sbn.xla.sharding import laid_out_by_xla


def ghost_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int,
    axis: Axis = -1,
    key: jax.Array | None = None,
    mask: ArrayLike | None = None,
    running: Statistics | None = None,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    r"""Normalizes equal groups of consecutive images, each with its own statistics.

    With :math:`x_1, \ldots, x_G` the groups:

    .. math::
      \begin{aligned}
      y_g &= \mathrm{batch\_norm}(x_g) \\
      \mu &= \frac{1}{G} \sum_g \mu_g, \qquad v = \frac{1}{G} \sum_g v_g
      \end{aligned}

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      num_groups: the number of groups ``G``; one is :func:`flax_sbn.batch_norm`.
      axis: the feature axis or axes.
      key: random key; each group draws with one of its own.
      mask: booleans that broadcast to ``x``: False is not measured.
      running: running statistics, see ``running_weight`` of
        :func:`flax_sbn.batch_norm`.
      **options: those of :func:`flax_sbn.batch_norm`, for every group.

    Returns:
      The normalized array, of the shape of ``x``, and the averages of the groups'
      statistics, ``(C,)``, for the running ones: evaluation knows no groups.

    Raises:
      ValueError: if the images cannot be divided into the groups, and as
        :func:`flax_sbn.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jax.random.normal(jax.random.key(0), (256, 8, 8, 3))
      >>> y, statistics = sbn.alternatives.ghost_batch_norm(x, num_groups=4)
      >>> bool(jnp.allclose(y[:64].mean((0, 1, 2)), 0, atol=1e-5))
      True

    Source: Hoffer et al., "Train longer, generalize better", arXiv 1705.08741; it
    updates the running statistics with one group after the other, the average of the
    groups is ours.
    """
    x = jnp.asarray(x)
    norm_group: Callable[..., Any] = functools.partial(batch_norm, axis=axis, **options)
    if num_groups == 1:
        return norm_group(x, scale, bias, key=key, mask=mask, running=running)
    axes = reduction_axes(x.ndim, axis)
    if not axes:
        raise ValueError(
            f"Expected an input with images to make groups of, got {num_groups=} and "
            f"an input of shape {x.shape}. Is `axis` the feature axis?"
        )
    batch = axes[0]
    if not 1 <= num_groups <= x.shape[batch] or x.shape[batch] % num_groups:
        raise ValueError(
            f"Expected groups that divide the batch size, got {num_groups=} and batch "
            f"size {x.shape[batch]}. Change either."
        )

    def norm_groups(x: jax.Array, *arrays: Any) -> tuple[jax.Array, Statistics]:
        scale, bias, key, mask, running = arrays

        def norm(x: jax.Array, key: Any, mask: Any) -> tuple[jax.Array, Statistics]:
            return norm_group(x, scale, bias, key=key, mask=mask, running=running)

        shape = (*x.shape[:batch], num_groups, -1, *x.shape[batch + 1 :])
        keys = None if key is None else jax.random.split(key, num_groups)
        masks = None if mask is None else broadcast_mask(mask, x.shape).reshape(shape)
        y, statistics = jax.vmap(norm, (batch, 0, batch), (batch, 0))(
            x.reshape(shape), keys, masks
        )
        return y.reshape(x.shape), jax.tree.map(lambda each: each.mean(0), statistics)

    return laid_out_by_xla(
        norm_groups, x, scale, bias, key, mask, running, like_x=(True, False)
    )
