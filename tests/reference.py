"""Sampled batch normalization from its equations, in NumPy float64 or complex128.

Features are last. Where something is measured is told by booleans of the input's shape.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Moments = tuple[Array, Array]


def wide(x: Array) -> Array:
    """Returns ``x`` in float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def over(x: Array) -> tuple[int, ...]:
    """Returns the axes that are reduced: all but the last."""
    return tuple(range(x.ndim - 1))


def moments(x: Array, where: Array) -> Moments:
    """Mean and biased variance of each feature over the positions in ``where``."""
    x, num = np.where(where, wide(x), 0), where.sum(over(x))
    mean = x.sum(over(x)) / num
    return mean, np.where(where, abs(x - mean) ** 2, 0).sum(over(x)) / num


def mix(populations: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Moments of a population that is drawn from several with the given shares."""
    mean: Any = sum(w * m for w, (m, _) in zip(weights, populations, strict=True))
    square: Any = sum(
        w * (v + abs(m) ** 2) for w, (m, v) in zip(weights, populations, strict=True)
    )
    return mean, square - abs(mean) ** 2


def normalize(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float = 1e-5
) -> Array:
    """Every value, with the given moments."""
    return wide(scale) * (wide(x) - mean) / np.sqrt(var + epsilon) + wide(bias)


def population(x: Array, shares: Array) -> Moments:
    """Moments of a population of which each position is a given share.

    Mean 0 and variance 1 where it is empty.
    """
    x, empty = wide(x), shares.sum(over(x)) == 0
    mean = (shares * x).sum(over(x))
    return mean, (shares * abs(x - mean) ** 2).sum(over(x)) + empty


def backward(
    x: Array,
    cotangent: Array,
    shares: Array,
    scale: Array,
    epsilon: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """Gradients of x, scale and bias.

    ``shares`` says how much of the population each position is: ``1 / m`` at the ``m``
    measured positions and zero elsewhere, or a mixture of such.
    """
    x, g = wide(x), wide(cotangent)
    mean, var = population(x, shares)
    std = np.sqrt(var + epsilon)
    normal = (x - mean) / std
    dbias, dscale = g.sum(over(x)), (g * normal).sum(over(x))
    return wide(scale) / std * (g - shares * (dbias + normal * dscale)), dscale, dbias


def renormalized(
    x: Array,
    measured: Moments,
    old: Moments,
    weight: float,
    r_max: float,
    d_max: float,
    epsilon: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """Batch Renormalization's output, and its two corrections ``r`` and ``d``.

    The running moments are ``old``; ``weight`` is how far the batch's move to them.
    """
    (mean, var), (old_mean, old_var) = measured, map(wide, old)
    std = np.sqrt(var + epsilon)
    target = np.sqrt((1 - weight) * var + weight * old_var + epsilon)
    r = np.clip(std / target, 1 / r_max, r_max)
    d = np.clip(weight * (mean - old_mean) / target, -d_max, d_max)
    return (wide(x) - mean) / std * r + d, r, d


def running(old: Array, new: Array, momentum: float) -> Array:
    """Exponential moving average after one more step."""
    return momentum * wide(old) + (1 - momentum) * wide(new)


def shares(wheres: Sequence[Array], weights: Sequence[float]) -> Array:
    """How much of a mixed population each position is, given where each part lies.

    A part that is empty leaves its weight to the others; all zero where all are empty.
    """
    axes = over(wheres[0])
    nums: list[Any] = [where.sum(axes) for where in wheres]
    total: Any = sum(w * (n > 0) for w, n in zip(weights, nums, strict=True))
    parts: Any = sum(
        where * w / np.maximum(n, 1)
        for where, w, n in zip(wheres, weights, nums, strict=True)
    )
    return parts / np.where(total > 0, total, 1)


def taps(
    size: int,
    window: int,
    stride: int,
    pads: tuple[int, int],
    input_dilation: int,
    kernel_dilation: int,
) -> Array:
    """What one axis of a convolution reads: 1 at ``[output, entry of kernel, input]``.

    Zeros of the padding and the dilation are read nowhere.
    """
    full = (size - 1) * input_dilation + 1
    reach = (window - 1) * kernel_dilation + 1
    starts = stride * np.arange((full + sum(pads) - reach) // stride + 1) - pads[0]
    places = starts[:, None] + kernel_dilation * np.arange(window)
    return (places[..., None] == input_dilation * np.arange(size)).astype(np.float64)


def contract(wanted: str, taps: Sequence[Array], **given: Array) -> Array:
    """A convolution's output ``y``, or its gradient by ``x`` or ``kernel``.

    Args:
      wanted: which of the three.
      taps: those of each spatial axis.
      **given: the two others, features last; ``kernel`` is that of a single group.
    """
    rank = len(taps)
    above, window, below = (list(range(i * rank, (i + 1) * rank)) for i in range(3))
    images, inputs, outputs = range(3 * rank, 3 * rank + 3)
    axes = {
        "x": [images, *below, inputs],
        "kernel": [*window, inputs, outputs],
        "y": [images, *above, outputs],
    }
    operands: list[Any] = []
    for tap, *axes_of_tap in zip(taps, above, window, below, strict=True):
        operands += [tap, axes_of_tap]
    for name, array in given.items():
        operands += [wide(array), axes[name]]
    return np.einsum(*operands, axes[wanted], optimize=True)
