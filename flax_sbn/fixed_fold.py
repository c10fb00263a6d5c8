r"""The derivative of a fold whose sample is at fixed positions.

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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend import core

from flax_sbn.moments import wide
from flax_sbn.normalization import Norm
from flax_sbn.sampled_layer import Layer, scaled
from flax_sbn.statistics import Statistics
from flax_sbn.windows import Part
from flax_sbn.xla.half_precision import round_to
from flax_sbn.xla.sharding import is_explicit, varying_like
from flax_sbn.xla.transposes import Form, linear


def fixed_fold_applies(layer: Layer, norm: Norm, x_type: Any) -> bool:
    """Whether :func:`fixed_fold` can take a layer, its norm and an input of a type.

    The layer has to be JAX's own product, as that of a quantized one is not linear in
    ``x``. Features have to be real, so that their moments are linear in a scaled
    tangent, and the norm the library's own, which treats each feature by itself. The
    mesh, if there is one, has to be left to XLA.
    """
    product = _inner(layer.linear.function)
    return (
        product in (lax.conv_general_dilated, lax.dot_general)
        and all(map(_treats_features_apart, (norm.measure, norm.correct)))
        and not isinstance(norm.epsilon, jax.core.Tracer)
        and not jnp.issubdtype(x_type.dtype, jnp.complexfloating)
        and not is_explicit(x_type)
    )


def _treats_features_apart(function: Callable[..., Any] | None) -> bool:
    """Whether a measure or correction is the library's own, or None."""
    module = getattr(_inner(function), "__module__", "")
    return function is None or module.partition(".")[0] == __name__.partition(".")[0]


def _inner(function: Any) -> Any:
    """Returns the function that :func:`functools.partial` was given, if any."""
    return getattr(function, "func", function)


def fixed_fold(
    layer: Layer, norm: Norm, parts: Sequence[Part], x_type: Any, kernel_type: Any
) -> Callable[..., tuple[jax.Array, Statistics]]:
    """Returns :meth:`Layer.fold` of arrays of these types, which measures ``parts``."""

    def narrow(kernel: jax.Array) -> jax.Array:
        return round_to(kernel, x_type.dtype)

    def read(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        return layer.read(parts, x, narrow(kernel))

    def target(values: Sequence[jax.Array], arrays: Any) -> tuple[Statistics, ...]:
        given = dataclasses.replace(norm, **arrays)
        statistics = given.statistics(parts, values, layer.axes)
        return statistics, varying_like(x_type, given.target(statistics))

    values = jax.eval_shape(read, x_type, kernel_type)
    call, constants = _hoisted(target, values, norm.arrays)

    @jax.custom_jvp
    def folded(
        constants: Any, x: jax.Array, kernel: jax.Array, scale: Any, bias: Any
    ) -> tuple[jax.Array, Statistics]:
        statistics, towards = call(read(x, kernel), constants)
        mean = layer.mean_below(parts, x)
        return layer.apply(x, kernel, towards, mean, scale, bias), statistics

    def jvp(primals: Any, tangents: Any) -> Any:
        constants, x, kernel, scale, bias = primals
        tconstants, tx, *tothers = tangents
        tconstants = _dense(constants, tconstants)
        tkernel, tscale, tbias = map(_dense, (kernel, scale, bias), tothers)

        def narrowed(kernel: jax.Array, tangent: jax.Array) -> jax.Array:
            return jax.jvp(narrow, [kernel.astype(tangent.dtype)], [tangent])[1]

        # Once, as sums over devices are not merged afterwards.
        values = read(x, kernel)
        (statistics, towards), along = jax.linearize(call, values, constants)
        r = lax.rsqrt(towards.var + layer.epsilon)
        factor = r if scale is None else r * scale
        kernel_folded = scaled(kernel, factor)

        # The tangent of the sample, and that times the factor.
        tz = layer.read(parts, x, narrowed(kernel, tkernel))
        tscaled = wide(scaled(tkernel, factor))
        tq = layer.read(parts, x, narrowed(kernel, tscaled))
        ty = None
        if not isinstance(tx, SymbolicZero):
            tz = [*map(jnp.add, tz, layer.read(parts, tx, narrow(kernel)))]
            ty, *through = _with_sample(layer, parts, narrow(kernel_folded), tx)
            tq = [(t + s).astype(t.dtype) for t, s in zip(tq, through, strict=True)]

        # Of the target times the factor, as the sample's is.
        _, by_sample = along(tq, zero_from_primal(constants))
        _, by_constants = along(zero_from_primal(values), tconstants)
        tstatistics, _ = along(tz, tconstants)
        tmean, tvar = (
            s + factor * c for s, c in zip(by_sample, by_constants, strict=True)
        )
        tfactor = -0.5 * r**2 * tvar
        if scale is not None:
            tfactor += r * tscale
        tshift = -tmean - towards.mean * tfactor
        if bias is not None:
            tshift += tbias

        tfolded = scaled(tkernel, factor) + scaled(kernel, tfactor)
        by_kernel = layer.linear(x, narrowed(kernel_folded, tfolded))
        ty = layer.shifted(by_kernel if ty is None else ty + by_kernel, tshift)
        y = layer.apply(x, kernel, towards, layer.mean_below(parts, x), scale, bias)
        return (y, statistics), (ty, tstatistics)

    folded.defjvp(jvp, symbolic_zeros=True)
    return functools.partial(folded, constants)


def _hoisted(function: Callable[..., Any], first: Any, second: Any) -> tuple[Any, Any]:
    """Returns the function and its second argument, with no arrays in the function.

    Rules of differentiation may not close over any: those of ``function`` become part
    of the second argument.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(first, second)

    def call(first: Any, constants: tuple[list[jax.Array], Any]) -> Any:
        hoisted, second = constants
        run = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, hoisted))
        results = run(*jax.tree.leaves((first, second)))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return call, (closed.consts, second)


def _dense(primals: Any, tangents: Any) -> Any:
    """Returns tangents that are arrays, of which none is left out."""
    return jax.tree.map(
        lambda x, t: zero_from_primal(x) if isinstance(t, SymbolicZero) else t,
        primals,
        tangents,
    )


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
