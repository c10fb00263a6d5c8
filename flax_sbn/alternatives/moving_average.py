"""Moving-average batch norm: averages over past steps, in the backward pass as well."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.moments import wide
from flax_sbn.normalization import normalize
from flax_sbn.renormalization import renormalize
from flax_sbn.statistics import (
    Axis,
    Statistics,
    of_features,
    reduction_axes,
    update_running,
)
from flax_sbn.xla.sharding import varying_like


class MovingAverages(NamedTuple):
    """What moving-average batch norm remembers of past steps.

    Attributes:
      step: ``()``, int32: the number of steps so far.
      chi: ``(window, C)``, the mean squares of the last steps, the newest last.
      var: ``(C,)``, the running mean square, for evaluation.
    """

    step: jax.Array
    chi: jax.Array
    var: jax.Array

    def statistics(self) -> Statistics:
        """Returns what evaluation normalizes with: mean zero, and ``var``."""
        return Statistics(jnp.zeros_like(self.var), self.var)


def moving_averages(features: tuple[int, ...], window: int = 16) -> MovingAverages:
    """Returns the averages before the first step; ``psi`` starts as zeros like ``chi``.

    Args:
      features: extent of the feature axes, ``(C,)``.
      window: how many steps are averaged over.

    Raises:
      ValueError: if the window is empty.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> print(jax.tree.map(jnp.shape, sbn.alternatives.moving_averages((8,))))
      MovingAverages(step=(), chi=(16, 8), var=(8,))
    """
    if window < 1:
        raise ValueError(
            f"Expected window >= 1, got {window=}. A window of one averages nothing."
        )
    return MovingAverages(
        jnp.zeros((), jnp.int32),
        jnp.zeros((window, *features), jnp.float32),
        jnp.ones(features, jnp.float32),
    )


def moving_average_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    psi: ArrayLike,
    running: MovingAverages,
    axis: Axis = -1,
    axis_name: str | tuple[str, ...] | None = None,
    momentum: float = 0.98,
    warmup: int = 100,
    renorm_warmup: int = 1000,
    r_max: float = 5.0,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, MovingAverages]:
    r"""Normalizes by averages over the last steps, in both directions.

    With :math:`m` the window and the sums over the last :math:`m` steps:

    .. math::
      \begin{aligned}
      \chi &= \frac{1}{m} \sum_t \mathrm{mean}(x_t^2), \qquad
      z = \frac{x}{\sqrt{\chi + \epsilon}} \\
      r &= \mathrm{clip}\Big( \sqrt{\frac{\chi + \epsilon}{\mathit{var} + \epsilon}},\
      \frac{1}{r_{max}},\ r_{max} \Big)
      \end{aligned}

      y = \mathit{scale} \cdot r z + \mathit{bias}

    No mean is subtracted: see :func:`center_kernel`. In the backward pass, with
    :math:`g = \mathit{scale} \cdot r \cdot \partial L / \partial y`:

    .. math::
      \begin{aligned}
      \psi &= \frac{1}{m} \sum_t \mathrm{mean}(g_t z_t) \\
      \frac{\partial L}{\partial x} &= \frac{g - z \psi}{\sqrt{\chi + \epsilon}}
      \end{aligned}

    Until ``warmup``, and until the window is full, :math:`\chi` and :math:`\psi` are
    the step's own: with a mean of zero, batch norm. Until ``renorm_warmup``
    :math:`r = 1`.

    ``psi`` holds the last steps' :math:`\mathrm{mean}(g z)`. Only the backward pass
    knows the next, so it comes as the gradient with respect to ``psi``: **replace**
    ``psi`` by that gradient after each step, and keep it from the optimizer, from
    clipping and from loss scaling. Several calls with one ``psi`` (micro-batches under
    :func:`jax.vmap`, say) add up their gradients: divide by their number. Micro-batches
    one after the other each replace it.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      psi: ``(window, C)``, the newest last; zeros at first.
      running: those from before this step, see :func:`moving_averages`.
      axis: the feature axis or axes.
      axis_name: name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) whose devices
        average :math:`\mathrm{mean}(x^2)` and :math:`\mathrm{mean}(g z)`.
      momentum: decay rate of ``var``, which follows :math:`\chi`.
      warmup: steps before averages over the window are used.
      renorm_warmup: steps before :math:`r` is.
      r_max: limit of :math:`r`, at least 1.
      epsilon: added to the mean squares.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted. Averages are float32 or wider.

    Returns:
      The normalized array, of the shape of ``x``, and the averages after this step.
      Evaluation is ``normalize(x, running.statistics(), scale, bias)``.

    Raises:
      ValueError: if ``axis`` is out of range, ``r_max`` too low, or ``psi`` or
        ``running`` has another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> running = sbn.alternatives.moving_averages((3,))
      >>> psi = jnp.zeros_like(running.chi)
      >>> def loss(x, psi):
      ...     y, updated = sbn.alternatives.moving_average_batch_norm(
      ...         x, psi=psi, running=running
      ...     )
      ...     return jnp.sin(y).mean(), updated
      >>> (dx, psi), running = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, psi)
      >>> dx.shape, bool((psi[-1] != 0).all()), int(running.step)
      ((2, 8, 8, 3), True, 1)

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838; warm-up and :math:`r` as in the authors'
    code. ``psi`` by way of its gradient, and ``axis_name``, are ours.
    """
    x = jnp.asarray(x)
    axes = reduction_axes(x.ndim, axis)
    window = running.chi.shape[0]
    for name, given in (("running.chi", running.chi), ("psi", psi)):
        of_features(name, given, x.shape, axis, window)
    if not r_max >= 1:
        raise ValueError(f"Expected r_max >= 1, got {r_max=}. One leaves y as it is.")
    square = lax.stop_gradient(jnp.square(wide(x)).mean(axes))
    if axis_name is not None:
        square = lax.pmean(square, axis_name)
    full = running.step >= max(window, warmup)
    chi, last = _average(running.chi, square, full)

    statistics = Statistics(jnp.zeros_like(chi), chi)
    target = renormalize(
        statistics,
        running.statistics(),
        r_max=jnp.where(running.step >= renorm_warmup, r_max, 1.0),
        epsilon=epsilon,
    )
    psi = varying_like(jax.typeof(square), psi)
    y = normalize(
        _with_averaged_gradient(x, psi, chi, full, epsilon, axes, axis_name),
        target,
        scale,
        bias,
        axis=axis,
        epsilon=epsilon,
        dtype=canonicalize_dtype(x, scale, bias, dtype=dtype),
    )
    updated = update_running(running.statistics(), statistics, momentum)
    return y, MovingAverages(running.step + 1, last, updated.var)


class MovingAverageHooks:
    """What the layer computes, in Linen as in NNX."""

    def _normalize(
        self: Any,
        x: jax.Array,
        running: MovingAverages,
        psi: Any,
        affine: Sequence[jax.Array | None],
        *,
        evaluate: bool,
    ) -> tuple[jax.Array, MovingAverages]:
        """Returns the output, and the averages after it; evaluation needs no psi."""
        options = {"axis": self.axis, "epsilon": self.epsilon, "dtype": self.dtype}
        if evaluate:
            return normalize(x, running.statistics(), *affine, **options), running
        return moving_average_batch_norm(
            x,
            *affine,
            psi=psi,
            running=running,
            axis_name=self.axis_name,
            momentum=self.momentum,
            warmup=self.warmup,
            renorm_warmup=self.renorm_warmup,
            r_max=self.r_max,
            **options,
        )


def center_kernel(kernel: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    r"""Subtracts the mean of each output feature's weights.

    .. math::
      \hat W = W - \mathrm{mean}(W)

    What is made with them has a mean near zero, whatever the mean of their inputs: for
    norms that subtract none.

    Args:
      kernel: ``(*window, I, C)``, as in Flax: the last axis is the outputs'.
      mask: of the kernel's shape: weights that are False or zero stay zero and do not
        count in the mean.

    Returns:
      An array of shape and dtype of ``kernel``. The arithmetic is in float32 or wider.

    Raises:
      ValueError: if only one weight leads to each output, or ``mask`` has another
        shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> kernel = jax.random.uniform(jax.random.key(0), (3, 3, 16, 8))
      >>> centered = sbn.alternatives.center_kernel(kernel)
      >>> bool(jnp.allclose(centered.mean((0, 1, 2)), 0, atol=1e-6))
      True

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838. The mask is ours.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2 or kernel.size == kernel.shape[-1]:
        raise ValueError(
            "Expected a kernel with two or more weights for each output, got a kernel "
            f"of shape {kernel.shape}: less its mean it is zero. Use a plain layer "
            "here."
        )
    axes = tuple(range(kernel.ndim - 1))
    kept = jnp.ones(kernel.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if kept.shape != kernel.shape:
        raise ValueError(
            f"Expected mask of shape {kernel.shape}, that of the kernel, got mask of "
            f"shape {kept.shape}."
        )
    values = wide(kernel)
    fan_in = kept.sum(axes, dtype=values.dtype, keepdims=True)
    mean = values.sum(axes, where=kept, keepdims=True) / jnp.maximum(fan_in, 1)
    return jnp.where(kept, values - mean, 0).astype(kernel.dtype)


def _average(
    recent: jax.Array, new: jax.Array, full: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the average over the window, or ``new`` before, and the new window."""
    recent = jnp.concatenate([recent[1:], new[None].astype(recent.dtype)])
    return jnp.where(full, recent.mean(0), new), recent


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _with_averaged_gradient(
    x: jax.Array,
    psi: jax.Array,
    chi: jax.Array,
    full: jax.Array,
    epsilon: float,
    axes: tuple[int, ...],
    axis_name: str | tuple[str, ...] | None,
) -> jax.Array:
    """Returns ``x`` itself, wide; the gradient loses its averaged part along ``x``."""
    return wide(x)


def _forward(
    x: jax.Array, psi: jax.Array, chi: jax.Array, full: jax.Array, *_: object
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return wide(x), (x, psi, chi, full)


def _backward(
    epsilon: float,
    axes: tuple[int, ...],
    axis_name: str | tuple[str, ...] | None,
    kept: tuple[jax.Array, ...],
    cotangent: jax.Array,
) -> tuple[jax.Array | None, ...]:
    x, psi, chi, full = kept
    # The cotangent is g / sqrt(chi + epsilon), and x is z times that root.
    product = (cotangent * wide(x)).mean(axes)
    if axis_name is not None:
        product = lax.pmean(product, axis_name)
    average, last = _average(psi, product, full)
    slope = jnp.expand_dims(average / (chi + epsilon), axes)
    return (cotangent - wide(x) * slope).astype(x.dtype), last, None, None


_with_averaged_gradient.defvjp(_forward, _backward)
