"""Mixture normalization: each value by the moments of the modes it belongs to."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.moments import wide
from flax_sbn.normalization import normalize
from flax_sbn.statistics import (
    Axis,
    Statistics,
    broadcast_mask,
    feature_shape,
    reduction_axes,
)


class Mixture(NamedTuple):
    """A mixture of normal distributions with diagonal covariances.

    Attributes:
      step: ``()``, int32: how many batches it has seen.
      weight: ``(K,)``, the share of each component.
      mean: ``(K, C)``.
      var: ``(K, C)``.
    """

    step: jax.Array
    weight: jax.Array
    mean: jax.Array
    var: jax.Array


def initial_mixture(num_components: int, features: tuple[int, ...]) -> Mixture:
    """Returns a mixture that has seen nothing; the first batch places its components.

    Args:
      num_components: the number of components ``K``.
      features: extent of the feature axes, ``(C,)``.

    Raises:
      ValueError: if there are no components.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> print(jax.tree.map(jnp.shape, sbn.alternatives.initial_mixture(3, (8,))))
      Mixture(step=(), weight=(3,), mean=(3, 8), var=(3, 8))
    """
    if num_components < 1:
        raise ValueError(
            f"Expected num_components >= 1, got {num_components=}. One component is "
            "batch norm."
        )
    return Mixture(
        jnp.zeros((), jnp.int32),
        jnp.full(num_components, 1 / num_components, jnp.float32),
        jnp.zeros((num_components, *features), jnp.float32),
        jnp.ones((num_components, *features), jnp.float32),
    )


def mixture_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running: Mixture,
    num_steps: int = 2,
    momentum: float | jax.Array = 0.99,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, Mixture]:
    r"""Fits a mixture to the batch, and normalizes each value by its components.

    The points are the feature vectors at every image and position. Some steps of
    expectation maximization, which start from the running mixture, give the posterior
    :math:`\nu_{ik}` of component :math:`k` for point :math:`i`. With
    :math:`n_k = \sum_i \nu_{ik}`:

    .. math::
      \begin{aligned}
      \lambda_k &= \frac{n_k}{\sum_j n_j}, \qquad
      \mu_k = \frac{1}{n_k} \sum_i \nu_{ik} x_i \\
      v_k &= \frac{1}{n_k} \sum_i \nu_{ik} (x_i - \mu_k)^2
      \end{aligned}

      y_i = \mathit{scale} \cdot \sum_k \frac{\nu_{ik}}{\sqrt{\lambda_k}}
      \frac{x_i - \mu_k}{\sqrt{v_k + \epsilon}} + \mathit{bias}

    The gradient goes through :math:`\mu_k` and :math:`v_k`; posteriors and weights
    count as constants. One component is batch norm; where :math:`K` lie far apart, the
    variance of the normalized values is :math:`K`.

    Every variance includes a hundredth of a point of the whole batch's, a weight counts
    as at least :math:`0.1 / K`, and a component without points keeps its mean: nothing
    becomes infinite. The first batch is split into equal parts along its principal
    axis. Later ones start from the running mixture, so that each component stays the
    same one, and averages over steps make sense.

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``. Any real dtype; the
        arithmetic is in float32 or wider.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      running: the running mixture from before this step, see :func:`initial_mixture`.
      num_steps: how often posteriors and moments are computed, at least once.
      momentum: decay rate of the running mixture; the first batch replaces it.
      axis: the feature axis or axes.
      mask: booleans that broadcast to ``(N, *spatial, 1)``: False leaves a point out
        of the mixture. It is normalized all the same.
      axis_name: name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) over whose
        devices one mixture is fitted, with a small all-reduce in each step; the first
        batch also gathers a number for each point.
      epsilon: added to the variances.
      dtype: dtype of the result; by default that of ``x``, ``scale`` and ``bias``
        promoted.

    Returns:
      The normalized array, of the shape of ``x``, and the running mixture after this
      step: unchanged where nothing was measured. See :func:`mixture_normalize` for
      inference.

    Raises:
      ValueError: if ``axis`` is out of range, ``num_steps`` is below one, ``mask`` does
        not broadcast, or ``running`` has other features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
      >>> x = x.at[32:].add(10)  # two modes
      >>> running = sbn.alternatives.initial_mixture(2, (3,))
      >>> y, running = sbn.alternatives.mixture_norm(x, running=running)
      >>> bool(abs(y[:32].mean()) < 0.1), bool(abs(y[32:].mean()) < 0.1)
      (True, True)

    Source: Kalayeh & Shah, "Training Faster by Separating Modes of Variation in
    Batch-normalized Models", arXiv 1806.02892. The formulation is ours: start, safety
    nets and what counts as constant.
    """
    if num_steps < 1:
        raise ValueError(f"Expected num_steps >= 1, got {num_steps=}. Two are usual.")
    x = jnp.asarray(x)
    points = _points(x, running, axis)
    where = None
    if mask is not None:
        axes = reduction_axes(x.ndim, axis)
        shape = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
        where = broadcast_mask(mask, shape).reshape(-1, 1)
    constant, kept = lax.stop_gradient((points, _flat(running)))
    mixture = lax.cond(
        kept.step == 0,
        lambda: _split(constant, kept, where, axis_name, epsilon),
        lambda: kept,
    )
    for _ in range(num_steps):
        mixture = lax.stop_gradient(mixture)._replace(step=kept.step)
        posteriors = _posteriors(constant, mixture, epsilon)
        mixture = _measure(points, posteriors, mixture, where, axis_name)
    y = _normalize(points, posteriors, mixture, epsilon)
    y = _finish(y, x, scale, bias, axis, dtype)
    return y, _update(*lax.stop_gradient((running, mixture)), momentum)


def mixture_normalize(
    x: ArrayLike,
    mixture: Mixture,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes each value by the components of a given mixture: inference.

    .. math::
      y_i = \mathit{scale} \cdot \sum_k \frac{\nu_{ik}}{\sqrt{\lambda_k}}
      \frac{x_i - \mu_k}{\sqrt{v_k + \epsilon}} + \mathit{bias}

    See :func:`mixture_norm` for what it takes; ``mixture`` is the running one.

    Returns:
      An array of the shape of ``x``. The posteriors count as constants in its gradient.

    Raises:
      ValueError: if ``axis`` is out of range, or ``mixture`` has other features.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> mixture = sbn.alternatives.initial_mixture(2, (1,))
      >>> mixture = mixture._replace(mean=jnp.array([[-5.0], [5.0]]))
      >>> y = sbn.alternatives.mixture_normalize(jnp.array([[-5.0], [5.0]]), mixture)
      >>> bool(jnp.allclose(y, 0))
      True

    Source: Kalayeh & Shah, "Training Faster by Separating Modes of Variation in
    Batch-normalized Models", arXiv 1806.02892. The formulation is ours.
    """
    x = jnp.asarray(x)
    points, flat = _points(x, mixture, axis), _flat(mixture)
    posteriors = _posteriors(points, flat, epsilon)
    y = _normalize(points, posteriors, flat, epsilon)
    return _finish(y, x, scale, bias, axis, dtype)


class MixtureHooks:
    """What the layer computes, in Linen as in NNX."""

    def _normalize(
        self: Any,
        x: jax.Array,
        running: Mixture,
        affine: Sequence[jax.Array | None],
        mask: jax.Array | None,
        *,
        evaluate: bool,
    ) -> tuple[jax.Array, Mixture]:
        """Returns the output, and the running mixture after it."""
        options = {"axis": self.axis, "epsilon": self.epsilon, "dtype": self.dtype}
        if evaluate:
            return mixture_normalize(x, running, *affine, **options), running
        return mixture_norm(
            x,
            *affine,
            running=running,
            num_steps=self.num_steps,
            momentum=self.momentum,
            mask=mask,
            axis_name=self.axis_name,
            **options,
        )


# Below, points are (M, C), posteriors (M, K), and means and variances (K, C). Products
# of matrices keep the memory at that of the points; they are taken about the mixture's
# mean, and not in the reduced precision of some devices.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _posteriors(points: jax.Array, mixture: Mixture, epsilon: float) -> jax.Array:
    """Returns the share of each component in each point."""
    x, mean = points - _center(mixture), mixture.mean - _center(mixture)
    precision = 1 / (mixture.var + epsilon)
    constant = jnp.square(mean) * precision - jnp.log(precision)
    logs = _matmul(x, (mean * precision).T) - _matmul(jnp.square(x), precision.T) / 2
    logs += (jnp.log(_weights(mixture)) - constant.sum(1) / 2)[None]
    return lax.stop_gradient(jax.nn.softmax(logs))


def _measure(
    points: jax.Array,
    posteriors: jax.Array,
    start: Mixture,
    where: jax.Array | None,
    axis_name: str | tuple[str, ...] | None,
) -> Mixture:
    """Returns the mixture that the posteriors make of the points."""
    if where is not None:
        # What is masked may be NaN: keep it out of the gradient, too.
        points, posteriors = (jnp.where(where, a, 0) for a in (points, posteriors))
    center = _center(start)
    x, shares = points - center, posteriors.T
    sums = (shares.sum(1), _matmul(shares, x), _matmul(shares, jnp.square(x)))
    num, first, second = _total(sums, axis_name)
    counts, total = num[:, None], num.sum()
    divisor = jnp.where(counts > 0, counts, 1)
    mean = jnp.where(counts > 0, first / divisor, start.mean - center)
    squares = jnp.maximum(0, second - counts * jnp.square(mean))
    # A hundredth of a point of the batch's variance: no component shrinks to a point.
    divisor = jnp.maximum(total, 1)
    first, second = (s.sum(0, keepdims=True) / divisor for s in (first, second))
    whole_var = jnp.maximum(0, second - jnp.square(first))
    var = (squares + 0.01 * whole_var) / (counts + 0.01)
    fitted = Mixture(start.step + 1, num / divisor, mean + center, var)
    return jax.tree.map(lambda f, s: jnp.where(total > 0, f, s), fitted, start)


def _normalize(
    points: jax.Array, posteriors: jax.Array, mixture: Mixture, epsilon: float
) -> jax.Array:
    """Returns the sum over the components."""
    center = lax.stop_gradient(_center(mixture))
    factors = lax.rsqrt(_weights(mixture)[:, None] * (mixture.var + epsilon))
    offsets = _matmul(posteriors, factors * (mixture.mean - center))
    return (points - center) * _matmul(posteriors, factors) - offsets


def _split(
    points: jax.Array,
    initial: Mixture,
    where: jax.Array | None,
    axis_name: str | tuple[str, ...] | None,
    epsilon: float,
) -> Mixture:
    """Returns the mixture of equal parts of the points along their principal axis."""
    if where is None:
        where = jnp.ones((len(points), 1), bool)
    num_components = len(initial.weight)
    alike = jnp.where(where, points.dtype.type(1 / num_components), 0)
    alike = jnp.broadcast_to(alike, (len(points), num_components))
    whole = _measure(points, alike, initial, where, axis_name)
    std = jnp.sqrt(whole.var[:1] + epsilon)
    x = jnp.where(where, (points - whole.mean[:1]) / std, 0)

    # Power iteration, from a direction that no data are likely to be orthogonal to.
    direction = jax.random.normal(jax.random.key(0), x.shape[1:], x.dtype)
    for _ in range(4):
        direction = _total(_matmul(x.T, _matmul(x, direction)), axis_name)
        direction *= lax.rsqrt(jnp.maximum(jnp.square(direction).sum(), 1e-30))
    along = jnp.where(where[:, 0], _matmul(x, direction), jnp.inf)

    order = along if axis_name is None else lax.all_gather(along, axis_name)
    order = jnp.sort(order.ravel())
    num = (order < jnp.inf).sum()
    bounds = order[jnp.arange(1, num_components) * num // num_components]
    part = (along[:, None] >= bounds[None]).sum(1)
    posteriors = jax.nn.one_hot(part, num_components, dtype=x.dtype)
    split = _measure(points, posteriors, whole, where, axis_name)
    return jax.tree.map(lambda s, i: s.astype(i.dtype), split, initial)


def _update(running: Mixture, fitted: Mixture, momentum: float | jax.Array) -> Mixture:
    """Returns the moving average; the first batch replaces what was before."""
    measured = fitted.step > running.step
    kept = jnp.where(running.step == 0, 0.0, momentum)

    def update(old: jax.Array, new: jax.Array) -> jax.Array:
        average = kept * old + (1 - kept) * new.reshape(old.shape)
        return jnp.where(measured, average, old).astype(old.dtype)

    return Mixture(fitted.step, *map(update, running[1:], fitted[1:]))


def _weights(mixture: Mixture) -> jax.Array:
    return jnp.maximum(mixture.weight, 0.1 / len(mixture.weight))


def _center(mixture: Mixture) -> jax.Array:
    weights = _weights(mixture)[:, None]
    return (weights * mixture.mean).sum(0, keepdims=True) / weights.sum()


def _flat(mixture: Mixture) -> Mixture:
    mean, var = (s.reshape(len(mixture.weight), -1) for s in mixture[2:])
    return mixture._replace(mean=mean, var=var)


def _points(x: jax.Array, mixture: Mixture, axis: Axis) -> jax.Array:
    """Returns the input's feature vectors, in float32 or wider."""
    features = feature_shape(x.shape, axis)
    if mixture.mean.shape != (*mixture.weight.shape, *features):
        raise ValueError(
            f"Expected components of shape {features} for an input of shape {x.shape} "
            f"and {axis=}, got means of shape {mixture.mean.shape} of "
            f"{len(mixture.weight)} components. Is `axis` the feature axis?"
        )
    axes = reduction_axes(x.ndim, axis)
    x = jnp.moveaxis(x, axes, range(len(axes)))
    return wide(x).reshape(-1, math.prod(features))


def _finish(
    y: jax.Array,
    x: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    axis: Axis,
    dtype: DTypeLike | None,
) -> jax.Array:
    """Returns the points as an array like ``x``, times scale, plus bias."""
    axes, features = reduction_axes(x.ndim, axis), feature_shape(x.shape, axis)
    y = y.reshape(*(x.shape[a] for a in axes), *features)
    y = jnp.moveaxis(y, range(len(axes)), axes)
    ones = jnp.ones(features, y.dtype)
    return normalize(
        y,
        Statistics(jnp.zeros_like(ones), ones),
        scale,
        bias,
        axis=axis,
        epsilon=0.0,
        dtype=canonicalize_dtype(x, scale, bias, dtype=dtype),
    )


def _total(values: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    return values if axis_name is None else lax.psum(values, axis_name)
