"""Linear functions with a transpose by hand: as any other, but for the transpose."""

import functools
import itertools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

from flax_sbn.xla.batched_slice import batched_slice
from flax_sbn.xla.transposes import Form, linear
from tests import cases
from tests.closeness import assert_close, assert_same_to_rounding


def apply(c, x, z):
    return [jnp.sin(c) @ x + 2 * z, c**2 @ x]


def transpose(c, g, h):
    return [jnp.sin(c).T @ g + (c**2).T @ h, 2 * g]


FORM = Form(apply, transpose)
SHAPES = [(3, 4), (4,), (3,)]  # of c, x and z


def by_hand(c, x, z):
    """The function that is tested."""
    return linear(FORM, [c], [x, z])


def arguments(seed=0):
    return [cases.inputs(s, "float64", seed=3 * seed + i) for i, s in enumerate(SHAPES)]


def loss(function, *args):
    y, z = function(*args)
    return (jnp.sin(y) * jnp.exp(z / 9)).sum()


ALL = (0, 1, 2)


def gradients(f):
    return jax.grad(functools.partial(loss, f), ALL)


def scanned(f, *args):
    """A loop over several ``c`` that carries the other arguments."""

    def body(carry, c):
        y, z = f(c, *carry)
        return (jnp.tanh(carry[0] * z.sum() / 9), jnp.tanh(y)), z

    return jax.lax.scan(body, tuple(args[1:]), jnp.stack([args[0], 2 * args[0]]))


TRANSFORMS = {
    "value": lambda f: f,
    "jvp": lambda f: lambda *a: jax.jvp(f, a, tuple(arguments(1))),
    **{
        f"gradient by {'cxz'[min(by)]}{len(by)}": lambda f, by=by: jax.grad(
            functools.partial(loss, f), by
        )
        for by in [(0,), (1,), (2,), (0, 1), ALL]
    },
    "hessian": lambda f: jax.hessian(functools.partial(loss, f), ALL),
    "reverse over reverse": lambda f: jax.jacrev(
        jax.grad(functools.partial(loss, f), ALL), ALL
    ),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f, ALL), ALL),
    "checkpoint": lambda f: jax.hessian(
        functools.partial(loss, jax.checkpoint(f)), ALL
    ),
    "scan": lambda f: jax.jacrev(functools.partial(scanned, f), ALL),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_differentiated_as_if_it_were_written_out(name, x64):
    actual, expected = (
        jax.jit(TRANSFORMS[name](f))(*arguments()) for f in (by_hand, apply)
    )
    assert_same_to_rounding(actual, expected)


def test_it_needs_no_jit(x64):
    args = arguments()
    for transform in (lambda f: f, gradients):
        actual, expected = (transform(f)(*args) for f in (by_hand, apply))
        assert_same_to_rounding(actual, expected)


@pytest.mark.parametrize("dims", list(itertools.product([None, -1], repeat=3))[1:])
def test_vmap_maps_any_of_the_arguments(dims, x64):
    given = [
        a if dim is None else jnp.stack([a, b, a - b], dim)
        for a, b, dim in zip(arguments(), arguments(1), dims, strict=True)
    ]

    @jax.jit
    def run(*given):
        results = []
        for f in (by_hand, apply):
            of_one = functools.partial(loss, f)
            of_all = jax.vmap(of_one, dims)
            results.append(
                (
                    jax.vmap(f, dims)(*given),
                    jax.vmap(jax.grad(of_one, ALL), dims)(*given),
                    jax.grad(lambda *a, f=of_all: f(*a).sum(), ALL)(*given),
                )
            )
        return results

    assert_same_to_rounding(*run(*given))


def thrice(c, g, h):
    """No transpose of the function: that it is used shows in the gradient."""
    return [3 * gradient for gradient in transpose(c, g, h)]


@pytest.mark.parametrize(
    "transform",
    [
        gradients,
        lambda f: jax.jit(gradients(f)),
        lambda f: gradients(jax.checkpoint(f)),
        lambda f: jax.vmap(gradients(f), None, axis_size=2),
        lambda f: gradients(
            lambda c, x, z: jax.vmap(f, (None, 0, None))(c, jnp.stack([x, -x]), z)
        ),
    ],
    ids=["grad", "jit", "checkpoint", "vmap of grad", "grad of vmap"],
)
def test_the_transpose_is_the_one_that_is_given(transform, x64):
    args = arguments()

    def wrong(c, x, z):
        return linear(Form(apply, thrice), [c], [x, z])

    by_c, by_x, by_z = transform(by_hand)(*args)
    expected = (by_c, 3 * by_x, 3 * by_z)
    assert_same_to_rounding(transform(wrong)(*args), expected)


def test_the_transpose_of_the_transpose_is_the_function(x64):
    c, x, z = arguments()

    def wrong(x, z):
        return linear(Form(apply, thrice), [c], [x, z])

    back = jax.linear_transpose(wrong, x, z)
    results = wrong(x, z)
    assert_same_to_rounding(back(results), thrice(c, *results))
    again = jax.linear_transpose(back, results)
    assert_same_to_rounding(again((x, z))[0], results)


def test_constants_may_be_integers():
    def take(start, x):
        return [jax.lax.dynamic_slice(x, [start], [2])]

    def put(start, g):
        return [jax.lax.dynamic_update_slice(jnp.zeros(5), g, [start])]

    def f(start, x):
        return (linear(Form(take, put), [start], [x])[0] ** 2).sum()

    x = jnp.arange(5.0)
    gradient = jax.jit(jax.grad(f, 1))(jnp.int32(1), x)
    chex.assert_trees_all_equal(gradient, jnp.array([0.0, 2, 4, 0, 0]))


def of_platforms(x):
    """Twice its argument: a sum, but elsewhere a product or a negation, both ways."""

    def form(operation):
        return Form(lambda x: [operation(x)], lambda g: [operation(g)])

    [y] = linear(
        form(lambda x: x + x),
        [],
        [x],
        cuda=form(lambda x: x * 2),
        rocm=form(lambda x: x * 2),
        tpu=form(lambda x: -(x * -2)),
    )
    return y


MARKS = {"stablehlo.add", "stablehlo.multiply", "stablehlo.negate"}
PLATFORMS = {
    "cpu": {"stablehlo.add"},
    "cuda": {"stablehlo.multiply"},
    "rocm": {"stablehlo.multiply"},
    "tpu": {"stablehlo.multiply", "stablehlo.negate"},
    "METAL": {"stablehlo.add"},  # as all that have no form of their own
}
WAYS = {
    "value": of_platforms,
    "tangent": lambda x: jax.jvp(of_platforms, [x], [x])[1],
    "gradient": lambda x: jax.vjp(of_platforms, x)[1](x)[0],
    "mapped": jax.vmap(of_platforms),
    "gradient of mapped": lambda x: jax.vjp(jax.vmap(of_platforms), x)[1](x)[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_platform_computes_its_own_form(platform, way):
    x = jnp.arange(3.0)
    exported = jax.export.export(jax.jit(WAYS[way]), platforms=[platform])(x)
    program = exported.mlir_module()
    assert {mark for mark in MARKS if mark in program} == PLATFORMS[platform]


@pytest.mark.parametrize("way", WAYS)
def test_a_program_for_several_platforms_runs_here(way):
    x = jnp.arange(3.0)
    exported = jax.export.export(jax.jit(WAYS[way]), platforms=["cuda", "cpu"])(x)
    np.testing.assert_array_equal(exported.call(x), 2 * x)


def test_taylor_series_go_through_term_by_term():
    starts = [jnp.array([0, 3]), jnp.array([1, -1])]

    def cube(x):
        return batched_slice(x, starts, [1, 2], [2, 3]) ** 3

    x, slope = cases.inputs((2, 5, 4)), cases.inputs((2, 5, 4), seed=1)
    value, (first, second) = jet.jet(cube, (x,), ((slope, jnp.zeros_like(x)),))
    taken, along = (batched_slice(a, starts, [1, 2], [2, 3]) for a in (x, slope))
    assert_close(value, taken**3)
    assert_close(first, 3 * taken**2 * along)
    assert_close(second, 6 * taken * along**2)


def test_a_taylor_series_of_a_constant_is_refused():
    form = Form(lambda c, x: [c * x], lambda c, g: [c * g])
    with pytest.raises(NotImplementedError, match=r"Expected whole numbers .* jax.jvp"):
        jet.jet(lambda c: linear(form, [c], [c])[0], (2.0,), ((1.0,),))
