"""Moments of values: how they are measured, without cancelling, and pooled."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
    """Mean and variance, and of how many values per feature, each ``(C,)``."""

    num: jax.Array
    mean: jax.Array
    var: jax.Array


# Makes moments of values ``x``, given the axes to reduce, booleans ``where`` (or None),
# and ``one_pass``: ``use_fast_variance`` for a whole batch, None for a sample.
Measure = Callable[[jax.Array, tuple[int, ...], jax.Array | None, bool | None], Moments]

_Pair = tuple[jax.Array, jax.Array]  # mean and variance


def abs_square(x: jax.Array) -> jax.Array:
    """Returns the squares of absolute values, also of complex ones."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)


def mean_and_var(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None, one_pass: bool | None
) -> Moments:
    """Returns mean and biased variance: what batch norm measures; a ``Measure``."""
    if where is None:
        if one_pass is None:
            mean, var = _sample_moments(x, axes)
        elif one_pass:
            mean, var = _raw_moments(wide(x), axes)
        else:
            mean, var = _two_pass_moments(wide(x), axes)
        count = jnp.full(var.shape, math.prod(x.shape[a] for a in axes), var.dtype)
        return Moments(count, mean, var)

    x = wide(x)
    # What is masked may be NaN: keep it out of the gradient, too.
    x = jnp.where(where, x, 0)
    count = where.sum(axes, dtype=x.real.dtype)
    divisor = jnp.maximum(count, 1)
    mean = x.sum(axes) / divisor
    if one_pass:
        var = jnp.maximum(0, abs_square(x).sum(axes) / divisor - abs_square(mean))
    else:
        squares = abs_square(x - jnp.expand_dims(mean, axes))
        var = squares.sum(axes, where=where) / divisor
    return Moments(count, mean, var)


def _raw_moments(x: jax.Array, axes: tuple[int, ...]) -> _Pair:
    mean = x.mean(axes)
    return mean, jnp.maximum(0, abs_square(x).mean(axes) - abs_square(mean))


def _two_pass_moments(x: jax.Array, axes: tuple[int, ...]) -> _Pair:
    mean = x.mean(axes)
    return mean, abs_square(x - jnp.expand_dims(mean, axes)).mean(axes)


def _shifted_moments(x: jax.Array, axes: tuple[int, ...]) -> _Pair:
    # One pass about one of the values, which cancels as little as two passes do.
    origin = x[tuple(0 if a in axes else slice(None) for a in range(x.ndim))]
    mean, var = _raw_moments(x - jnp.expand_dims(origin, axes), axes)
    return mean + origin, var


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sample_moments(x: jax.Array, axes: tuple[int, ...]) -> _Pair:
    shifted = functools.partial(_shifted_moments, axes=axes)
    if x.dtype != jnp.bfloat16:
        return shifted(wide(x))
    # On a GPU shifted values would be written down. There sums are pairwise, and what
    # cancels is less than bfloat16's own rounding.
    raw = functools.partial(_raw_moments, axes=axes)
    return lax.platform_dependent(wide(x), cuda=raw, rocm=raw, default=shifted)


@_sample_moments.defjvp
def _sample_moments_jvp(
    axes: tuple[int, ...], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[_Pair, _Pair]:
    # In terms of x: the shifted values are not kept for the backward pass.
    (x,), (t,) = primals, map(wide, tangents)
    mean, var = _sample_moments(x, axes)
    product = (wide(x) - jnp.expand_dims(mean, axes)).conj() * t
    return (mean, var), (t.mean(axes), 2 * product.mean(axes).real)


def wide(x: jax.Array) -> jax.Array:
    """Returns values in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pool_moments(first: Moments, second: Moments) -> Moments:
    r"""Returns the moments of the values of both populations together.

    .. math::
      \begin{aligned}
      w &= \frac{n_2}{n_1 + n_2} \\
      \mu &= \mu_1 + w (\mu_2 - \mu_1) \\
      v &= (1 - w) v_1 + w v_2 + w (1 - w) |\mu_2 - \mu_1|^2
      \end{aligned}

    Only the difference of the means is squared, so nothing cancels where they are
    large, however many populations are added one by one.

    Args:
      first: moments of some values; of none with ``num`` 0.
      second: moments of the others.

    Source: Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", 1979.
    """
    num = first.num + second.num
    share = second.num / jnp.maximum(num, 1)
    change = second.mean - first.mean
    within = (1 - share) * first.var + share * second.var
    between = share * (1 - share) * abs_square(change)
    return Moments(num, first.mean + share * change, within + between)


def pool_over_devices(
    moments: list[Moments],
    axis_name: str | tuple[str, ...],
    axis_index_groups: Any,
    origin: jax.Array | float,
) -> list[Moments]:
    """Pools moments over devices, all of them in one all-reduce.

    The variance between the devices' means is taken about a common origin near them,
    because :math:`E|m|^2 - |E m|^2` cancels where the mean is large. The origin, such
    as a running mean, is a constant and gets no gradient.
    """
    origin = lax.stop_gradient(origin)
    terms = []
    for count, mean, var in moments:
        mean = mean - origin
        terms += [count, count * mean, count * var, count * abs_square(mean)]
    sums = lax.psum(jnp.stack(terms), axis_name, axis_index_groups=axis_index_groups)

    pooled = []
    for i in range(0, len(terms), len(Moments._fields) + 1):
        count, var, square = (sums[j].real for j in (i, i + 2, i + 3))
        divisor = jnp.maximum(count, 1)
        mean = sums[i + 1] / divisor
        between = jnp.maximum(0, square / divisor - abs_square(mean))
        pooled.append(Moments(count, mean + origin, var / divisor + between))
    return pooled
