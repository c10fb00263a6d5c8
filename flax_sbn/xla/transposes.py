"""Linear functions whose transpose is written by hand, for each platform if need be.

JAX transposes a gather into a scatter, and a convolution together with what reads its
output into passes over whole arrays. Where a better transpose is known, it is given
here, next to the function. Differentiation in either mode and to any order,
``jax.vmap`` and all that transforms programs work as with any other function.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.extend import core
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Form:
    """A linear function and its transpose, each called with constants first.

    Attributes:
      apply: ``apply(*constants, *xs)`` returns the results, linear in ``xs``.
      transpose: ``transpose(*constants, *cotangents)`` returns a gradient for each of
        ``xs``, linear in the results' cotangents.
    """

    apply: Function
    transpose: Function


def linear(
    form: Form,
    constants: Sequence[jax.Array],
    xs: Sequence[jax.Array],
    **elsewhere: Form,
) -> list[jax.Array]:
    """Applies a linear function.

    Args:
      form: the function, whose values and derivatives are taken everywhere.
      constants: its first arguments, in which it may be anything.
      xs: the arguments in which it is linear.
      **elsewhere: another form of the same function, by the platform that is to compute
        it so.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> double = lambda x: [2 * x]
      >>> [y] = linear(Form(double, double), [], [jnp.array(3.0)])
      >>> jax.grad(lambda x: linear(Form(double, double), [], [x])[0] ** 2)(3.0)
      Array(24., dtype=float32, weak_type=True)
    """
    forms = ((None, form), *elsewhere.items())
    return _linear_p.bind(*constants, *xs, num_constants=len(constants), forms=forms)


def _apply(params: dict[str, Any], platform: str | None = None) -> Function:
    """Returns the function, in the form for a platform; None for all others."""
    forms: dict[str | None, Form] = dict(params["forms"])
    return forms.get(platform, forms[None]).apply


_linear_p = core.Primitive("linear")
_linear_p.multiple_results = True
_linear_p.def_impl(lambda *args, **params: _apply(params)(*args))
_linear_p.def_abstract_eval(
    lambda *avals, **params: jax.make_jaxpr(_apply(params))(*avals).out_avals
)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[jax.Array], list[Any]]:
    n, apply = params["num_constants"], _apply(params)
    constants, xs = primals[:n], primals[n:]
    results = _linear_p.bind(*primals, **params)
    along = [ad.Zero(jax.typeof(result)) for result in results]
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        along = _linear_p.bind(
            *constants, *map(ad.instantiate_zeros, tangents[n:]), **params
        )
    moving = [i for i in range(n) if type(tangents[i]) is not ad.Zero]
    if moving:

        def of_moving(*given: jax.Array) -> Sequence[jax.Array]:
            at = dict(zip(moving, given, strict=True))
            return apply(*(at.get(i, c) for i, c in enumerate(constants)), *xs)

        _, more = jax.jvp(
            of_moving,
            [constants[i] for i in moving],
            [tangents[i] for i in moving],
        )
        along = [ad.add_tangents(a, b) for a, b in zip(along, more, strict=True)]
    return results, along


def _transpose(cts: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
    n = params["num_constants"]
    # Of which the transpose is the function again.
    params["forms"] = tuple((p, Form(f.transpose, f.apply)) for p, f in params["forms"])
    given = _linear_p.bind(*args[:n], *map(ad.instantiate_zeros, cts), **params)
    gradients = [
        g if ad.is_undefined_primal(x) else None
        for g, x in zip(given, args[n:], strict=True)
    ]
    return [*[None] * n, *gradients]


def _batch(
    args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    n = params["num_constants"]
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    # What is linear is mapped throughout, so that the transpose is as the function is.
    xs = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[n:], dims[n:], strict=True)
    ]

    def mapped(function: Function) -> Function:
        return lambda *a: jax.vmap(function, (*dims[:n], *[0] * (len(a) - n)))(*a)

    params["forms"] = tuple(
        (p, Form(mapped(f.apply), mapped(f.transpose))) for p, f in params["forms"]
    )
    results = _linear_p.bind(*args[:n], *xs, **params)
    return results, [0] * len(results)


def _jet(
    primals: Sequence[Any], series: Sequence[Any], **params: Any
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    n = params["num_constants"]
    if any(jnp.issubdtype(jnp.result_type(c), jnp.inexact) for c in primals[:n]):
        raise NotImplementedError(
            "Expected whole numbers as constants of a linear function in a Taylor "
            "series, got floats. Nest jax.jvp instead."
        )
    results = _linear_p.bind(*primals, **params)
    terms = [
        _linear_p.bind(*primals[:n], *xs, **params)
        for xs in zip(*series[n:], strict=True)
    ]
    return results, [list(of_result) for of_result in zip(*terms, strict=True)]


def _lower(
    platform: str | None, ctx: mlir.LoweringRuleContext, *args: Any, **params: Any
) -> Any:
    apply = _apply(params, platform)
    return mlir.lower_fun(apply, multiple_results=True)(ctx, *args)


ad.primitive_jvps[_linear_p] = _jvp
_jet_rules: dict[Any, Any] = jet.jet_rules
_jet_rules[_linear_p] = _jet
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
for _platform in (None, "cuda", "rocm", "tpu"):  # None for all others
    mlir.register_lowering(
        _linear_p, functools.partial(_lower, _platform), platform=_platform
    )
