r"""A layer whose output is sampled, and the norm folded; and its derivative.

Plain differentiation adds the sample's gradient to the input's. Where the positions are
fixed, :func:`fixed_fold` adds it to the output's instead, ahead of the one convolution
that makes the input's gradient of it. With ``S`` the positions, ``m, v`` the moments
there, :math:`r = 1 / \sqrt{v + \epsilon}` and ``a = scale * r``, the output and its
tangent are

.. math::
  y = a (x * w) + b, \qquad
  \dot y = \dot x * (a w) + x * (a \dot w + \dot a w) + \dot b

and the tangent of the sample comes in only as

.. math::
  \dot q = a \dot z_S = (\dot x * (a w))_S + a (x * \dot w)_S

because the moments of a feature are linear in its tangent. The first term is read off
the tangent of the output. So, transposed, the gradient of ``q`` is added to that of the
output at ``S``, and there is neither a second convolution nor a division by ``a``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from flax_sbn.statistics import Statistics, wide
from flax_sbn.windows import Part
from flax_sbn.xla.half_precision import add_shift, offset, round_to
from flax_sbn.xla.sharding import is_explicit
from flax_sbn.xla.transposes import Form, linear

# Makes measured statistics, and those to normalize with, of the values of each part
# and further arrays; of each feature by its own values.
Target = Callable[..., tuple[Statistics, Statistics]]


class Linear(Protocol):
    """A map of ``x`` that is linear in ``kernel``, whose last axis is its output's."""

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns ``(N, *spatial, C)``."""

    def below(
        self, x: jax.Array, part: Part, extent: Sequence[int]
    ) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
        """Returns the input below a part of the output, and what to apply to that."""


def fold_kernel(
    kernel: jax.Array,
    statistics: Statistics,
    scale: Any = None,
    bias: Any = None,
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns kernel and bias with the norm in them: see :func:`flax_sbn.fold`."""
    factor = lax.rsqrt(statistics.var + epsilon)
    if scale is not None:
        factor = factor * scale
    shift = -statistics.mean * factor
    return scaled(kernel, factor), shift if bias is None else shift + bias


def scaled(kernel: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the kernel with its output features scaled."""
    # Spelled out, so that its gradient sums over all other axes at once: a sum that
    # leaves out those of extent one takes XLA thirty times as long on a CPU.
    return kernel * jnp.broadcast_to(factor, kernel.shape)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer and the norm behind it.

    Attributes:
      linear: maps ``(N, *spatial, I)`` to ``(N, *spatial, C)``.
      extent: of the output's spatial axes.
      epsilon: added to the variance.
      half: whether the computation is in half precision.
    """

    linear: Linear
    extent: tuple[int, ...]
    epsilon: float
    half: bool

    def read(
        self, parts: Sequence[Part], x: jax.Array, kernel: jax.Array
    ) -> list[jax.Array]:
        """Returns the linear layer's output at the positions of each part."""
        values = []
        for part in parts:
            below, here = self.linear.below(x, part, self.extent)
            values.append(here(below, kernel))
        return values

    def mean_below(self, parts: Sequence[Part], x: jax.Array) -> jax.Array | None:
        """Returns the input's mean below the positions, if rounding needs it."""
        if not self.half:
            return None
        x = lax.stop_gradient(x)
        means = []
        for part in parts:
            below, _ = self.linear.below(x, part, self.extent)
            axes = tuple(range(below.ndim - 1))
            means.append(part.weight * below.mean(axes, dtype=jnp.float32))
        return functools.reduce(jnp.add, means)

    def apply(
        self,
        x: jax.Array,
        kernel: jax.Array,
        target: Statistics,
        mean: jax.Array | None,
        scale: Any,
        bias: Any,
    ) -> jax.Array:
        """Returns the output, normalized, before residual and activation.

        Args:
          x: ``(N, *spatial, I)``.
          kernel: ``(..., C)``.
          target: statistics to normalize with, ``(C,)``.
          mean: of the input where they were measured, by which the folded kernel's
            rounding is corrected; None if it is not.
          scale: ``(C,)`` or None.
          bias: ``(C,)`` or None.
        """
        folded, shift = fold_kernel(kernel, target, scale, bias, epsilon=self.epsilon)
        applied = round_to(folded, x.dtype)
        if mean is not None:
            narrow = round_to(kernel, x.dtype)
            rounded, _ = fold_kernel(narrow, target, scale, bias, epsilon=self.epsilon)
            shift -= offset(mean, applied, rounded)
        return self.shifted(self.linear(x, applied), shift)

    def shifted(self, y: jax.Array, shift: jax.Array) -> jax.Array:
        """Adds to each feature, in float32 or wider."""
        if self.half:
            return add_shift(y, shift)
        # Not broadcast as a whole: that would lie on every device.
        return y + jnp.expand_dims(shift, range(y.ndim - 1))


def fixed_fold_applies(x: jax.Array) -> bool:
    """Whether :func:`fixed_fold` can take an input.

    Features have to be real, so that their moments are linear in a scaled tangent, and
    the mesh, if there is one, left to XLA.
    """
    return jnp.isrealobj(x) and not is_explicit(x)


def fixed_fold(
    layer: Layer,
    parts: Sequence[Part],
    target: Target,
    x: jax.Array,
    kernel: jax.Array,
    scale: Any,
    bias: Any,
    others: Sequence[Any],
    with_mean: bool,
) -> tuple[jax.Array, Statistics]:
    """Measures at fixed positions, folds and applies.

    Args:
      layer: the layer.
      parts: positions of its output.
      target: ``target(values, *others)`` returns the measured statistics and those to
        normalize with.
      x: ``(N, *spatial, I)``.
      kernel: ``(..., C)``.
      scale: ``(C,)`` or None.
      bias: ``(C,)`` or None.
      others: further arguments of ``target``: trees of arrays.
      with_mean: whether rounding is corrected, in half precision.

    Returns:
      The output before residual and activation, and the measured statistics.
    """
    narrow = functools.partial(round_to, dtype=x.dtype)

    def measured(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        return layer.read(parts, x, narrow(kernel))

    call, hoisted = _hoisted(target, jax.eval_shape(measured, x, kernel), *others)

    def output(
        x: jax.Array, kernel: jax.Array, towards: Statistics, scale: Any, bias: Any
    ) -> jax.Array:
        mean = layer.mean_below(parts, x) if with_mean else None
        return layer.apply(x, kernel, towards, mean, scale, bias)

    @jax.custom_jvp
    def folded(
        x: jax.Array, kernel: jax.Array, scale: Any, bias: Any, constants: Any
    ) -> tuple[jax.Array, Statistics]:
        statistics, towards = call(measured(x, kernel), *constants)
        return output(x, kernel, towards, scale, bias), statistics

    def jvp(primals: Any, tangents: Any) -> Any:
        x, kernel, scale, bias, constants = primals
        tx, *others = tangents
        tkernel, tscale, tbias, tconstants = map(_dense, primals[1:], others)

        def moments(values: list[jax.Array], constants: Any) -> Any:
            statistics, towards = call(values, *constants)
            return statistics, towards, lax.rsqrt(towards.var + layer.epsilon)

        # Once, as sums over devices are not merged afterwards.
        values = measured(x, kernel)
        (statistics, towards, r), along = jax.linearize(moments, values, constants)
        factor = r if scale is None else r * scale
        kernel_folded = scaled(kernel, factor)

        # The tangent of the sample, and that times the factor.
        tnarrow = jax.jvp(narrow, [kernel], [tkernel])[1]
        tz = layer.read(parts, x, tnarrow)
        tscaled = wide(scaled(tkernel, factor))
        tq = layer.read(parts, x, jax.jvp(narrow, [wide(kernel)], [tscaled])[1])
        ty = None
        if not isinstance(tx, SymbolicZero):
            tz = [*map(jnp.add, tz, layer.read(parts, tx, narrow(kernel)))]
            ty, *through = _with_sample(layer, parts, narrow(kernel_folded), tx)
            tq = [(t + s).astype(t.dtype) for t, s in zip(tq, through, strict=True)]

        _, tq_towards, tq_r = along(tq, _zeros(constants))
        _, tc_towards, tc_r = along(_zeros(values), tconstants)
        tstatistics, _, _ = along(tz, tconstants)
        tmean = tq_towards.mean + factor * tc_towards.mean
        tfactor = tq_r / r + (tc_r if scale is None else scale * tc_r + r * tscale)
        tshift = -tmean - towards.mean * tfactor
        if bias is not None:
            tshift += tbias

        tfolded = scaled(tkernel, factor) + scaled(kernel, tfactor)
        _, tapplied = jax.jvp(narrow, [kernel_folded], [tfolded])
        by_kernel = layer.linear(x, tapplied)
        ty = layer.shifted(by_kernel if ty is None else ty + by_kernel, tshift)
        y = output(x, kernel, towards, scale, bias)
        return (y, statistics), (ty, tstatistics)

    folded.defjvp(jvp, symbolic_zeros=True)
    return folded(x, kernel, scale, bias, (hoisted, *others))


def _hoisted(function: Callable[..., Any], *args: Any) -> tuple[Any, list[jax.Array]]:
    """Returns a function that takes the arrays first that the given one closes over.

    And these arrays. Rules of differentiation may not close over any.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)

    def call(first: Any, constants: list[jax.Array], *others: Any) -> Any:
        run = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, constants))
        results = run(*jax.tree.leaves((first, *others)))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call, closed.consts


def _dense(primals: Any, tangents: Any) -> Any:
    """Returns tangents that are arrays, of which none is left out."""
    return jax.tree.map(
        lambda x, t: _zeros(x) if isinstance(t, SymbolicZero) else t, primals, tangents
    )


def _zeros(primals: Any) -> Any:
    """Returns tangents that are zero."""

    def zero(x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros_like(x)
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, primals)


def _with_sample(
    layer: Layer, parts: Sequence[Part], kernel: jax.Array, x: jax.Array
) -> list[jax.Array]:
    """Returns the output, and what is of it at the positions, in float32 or wider.

    The gradient of the sample is added to that of the output, which compilers for CPUs
    and TPUs fuse into what is before or after. A GPU's convolutions fuse with nothing
    before them, but the gradient that comes out of them does: there the sample's goes
    through a convolution of its own, and is added to that.
    """
    like = jax.typeof(x)

    def take(y: jax.Array) -> list[jax.Array]:
        return [part.take(y, range(y.ndim - 1)) for part in parts]

    def to_input(kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        back = jax.linear_transpose(lambda x: layer.linear(x, kernel), like)
        [result] = back(gradient)
        return result

    def taken(kernel: jax.Array, x: jax.Array) -> list[jax.Array]:
        y = layer.linear(x, kernel)
        return [y, *map(wide, take(y))]

    def added(kernel: jax.Array, g: jax.Array, *gq: jax.Array) -> list[jax.Array]:
        # One elementwise operation, in float32 or wider.
        [there] = jax.linear_transpose(take, jax.typeof(wide(g)))(list(gq))
        return [to_input(kernel, (wide(g) + there).astype(g.dtype))]

    def sampled(kernel: jax.Array, x: jax.Array) -> list[jax.Array]:
        # From the wide input, so that the gradients are added before they are rounded.
        values = layer.read(parts, x.astype(kernel.dtype), kernel)
        return [wide(value) for value in values]

    def both(kernel: jax.Array, x: jax.Array) -> list[jax.Array]:
        return [layer.linear(x, kernel), *sampled(kernel, x)]

    def joined(kernel: jax.Array, g: jax.Array, *gq: jax.Array) -> list[jax.Array]:
        broad = like.update(dtype=jnp.promote_types(x.dtype, jnp.float32))
        back = jax.linear_transpose(lambda x: sampled(kernel, x), broad)
        [through] = back(list(gq))
        return [(wide(to_input(kernel, g)) + through).astype(x.dtype)]

    gpu = Form(both, joined)
    return linear(Form(taken, added), [kernel], [x], cuda=gpu, rocm=gpu)
