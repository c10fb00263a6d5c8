"""The folded form is the unfolded one: value, statistics and all gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from tests import cases, unfolded
from tests.closeness import assert_same_to_rounding, assert_trees_close
from tests.samples import KEY

IMAGES, INPUTS, OUTPUTS = 12, 4, 8

# As in BORDERS, with fewer than three spatial axes these are the first values.
GEOMETRY = {
    "rank": [2, 1, 3],
    "kernel": [(3, 3, 2), (1, 1, 1), (4, 2, 3)],
    "strides": [(1, 1, 1), (2, 2, 1), (3, 1, 2)],
    "kernel_dilation": [(1, 1, 1), (2, 1, 2), (1, 3, 1)],
    "groups": [1, 2, 4],
    "extent": [(9, 12, 6), (11, 10, 7)],
}
AFTER = {
    "sampler": list(cases.SAMPLERS),
    "affine": ["both", "scale", "bias", "none"],
    "residual": [True, False],
    "activation": [jax.nn.relu, jnp.tanh, None],
    "masked": [False, True],
}
# Of these the others are made; with causal borders all meet.
PARTS = ["BS-strata", "FS", "FS+VDN", "lattice"]
CONVOLUTIONS = [
    *cases.pairwise(
        border=list(cases.BORDERS), **GEOMETRY, **AFTER | {"sampler": PARTS}
    ),
    *cases.pairwise(
        border=["CAUSAL"],
        **{option: values[-2:] for option, values in GEOMETRY.items()} | {"rank": [1]},
        **AFTER | {"affine": ["both", "none"]},
    ),
]
DENSE = [
    case
    for case in cases.pairwise(extent=[(), (4, 5)], **AFTER)
    if case["extent"] or case["sampler"] not in cases.SPATIAL
]


def name(case):
    return "-".join(getattr(v, "__name__", str(v)) for v in case.values())


def geometry(case):
    """The options of a convolution."""
    border, rank = case["border"], case["rank"]
    return {
        "strides": case["strides"][:rank],
        "kernel_dilation": case["kernel_dilation"][:rank],
        "feature_group_count": case["groups"],
        **({"padding": border} if border == "CAUSAL" else cases.border(border, rank)),
    }


def weights(shape):
    """Returns a kernel of either sign without small values.

    The output hardly depends on a kernel's scale: its gradient is a sum that cancels,
    divided by the kernel. A single small weight is enough to make that ill-conditioned.
    """
    kernel = cases.inputs(shape, "float64", seed=9)
    return kernel + jnp.sign(kernel)


def assert_folds(fold, plain, x, kernel, case):
    """Asserts that both forms have the same value, statistics and gradients."""
    shape = jax.eval_shape(plain, x, kernel)[0].shape
    scale, bias = cases.inputs((2, shape[-1]), "float64", seed=1)
    scale = scale.at[0].set(0)  # what sends no gradient, but gets one
    arguments = {
        "x": x,
        "kernel": kernel,
        "scale": scale if case["affine"] in ("both", "scale") else None,
        "bias": bias if case["affine"] in ("both", "bias") else None,
        "residual": cases.inputs(shape, "float64", 2) if case["residual"] else None,
    }
    mask = np.random.default_rng(3).random(shape) < 0.7 if case["masked"] else None
    cotangents = (
        cases.inputs(shape, "float64", seed=4),
        sbn.Statistics(*cases.inputs((2, shape[-1]), "float64", seed=5)),
    )

    @unfolded.quick_jit
    def both(arguments):
        return tuple(
            unfolded.value_and_gradients(
                functools.partial(
                    function,
                    sampler=cases.SAMPLERS[case["sampler"]],
                    key=KEY,
                    activation=case["activation"],
                    mask=mask,
                ),
                arguments,
                cotangents,
            )
            for function in (fold, plain)
        )

    assert_same_to_rounding(*both(arguments))


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=name)
def test_convolutions_fold(case, x64):
    rank, groups, options = case["rank"], case["groups"], geometry(case)
    window = case["kernel"][:rank]
    assert_folds(
        functools.partial(sbn.conv_norm, **options),
        functools.partial(unfolded.conv_norm, **options),
        cases.inputs((IMAGES, *case["extent"][:rank], INPUTS), "float64"),
        weights((*window, INPUTS // groups, OUTPUTS)),
        case,
    )


@pytest.mark.parametrize("case", DENSE, ids=name)
def test_dense_layers_fold(case, x64):
    assert_folds(
        sbn.dense_norm,
        unfolded.dense_norm,
        cases.inputs((IMAGES, *case["extent"], INPUTS), "float64"),
        weights((INPUTS, OUTPUTS)),
        case,
    )


@pytest.mark.parametrize("sampler", ["lattice", "BS"])
def test_parameters_may_be_narrower_than_what_is_computed(sampler, x64):
    x = cases.inputs((IMAGES, 13, INPUTS), "float64")
    kernel = cases.inputs((3, INPUTS, OUTPUTS), "float32", seed=1)
    scale, bias = cases.inputs((2, OUTPUTS), "float32", seed=2)
    arguments = {"x": x, "kernel": kernel, "scale": scale, "bias": bias}
    options = {"sampler": cases.SAMPLERS[sampler], "key": KEY}
    cotangents = (
        cases.inputs((IMAGES, 13, OUTPUTS), "float64", seed=4),
        sbn.Statistics(*cases.inputs((2, OUTPUTS), "float64", seed=5)),
    )
    (*value, grads), (*expected, plain) = (
        jax.jit(
            functools.partial(
                unfolded.value_and_gradients, functools.partial(function, **options)
            )
        )(arguments, cotangents)
        for function in (sbn.conv_norm, unfolded.conv_norm)
    )
    assert_same_to_rounding((value, grads.pop("x")), (expected, plain.pop("x")))
    assert_trees_close(grads, plain)


FLOATS = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        x=FLOATS,
        kernel=FLOATS,
        scale=FLOATS,
        dtype=[None, *FLOATS],
        sampler=["lattice", "BS"],
    ),
    ids=name,
)
def test_arguments_of_all_dtypes_meet(case, x64):
    x = jnp.zeros((IMAGES, 13, INPUTS), case["x"])
    kernel = jnp.zeros((3, INPUTS, OUTPUTS), case["kernel"])
    scale, bias = jnp.zeros((2, OUTPUTS), case["scale"])
    options = {"dtype": case["dtype"], "sampler": cases.SAMPLERS[case["sampler"]]}

    def loss(*arguments):
        y, _ = sbn.conv_norm(*arguments, **options, key=KEY)
        expected = case["dtype"] or jnp.result_type(*arguments)
        assert y.dtype == expected
        return y.sum()

    arguments = (x, kernel, scale, bias)
    grads = jax.eval_shape(jax.grad(loss, (0, 1, 2, 3)), *arguments)
    assert [g.dtype for g in grads] == [a.dtype for a in arguments]


@pytest.mark.parametrize("batch", [(), (2, 6), (3, 1, 4)], ids=str)
def test_batch_axes_are_taken_together_as_images(batch, x64):
    sampler = cases.SAMPLERS["FS" if batch == () else "BS+VDN"]
    x = cases.inputs((*batch, 9, 8, INPUTS), "float64")
    kernel = cases.inputs((3, 3, INPUTS, OUTPUTS), "float64", seed=1)
    residual = cases.inputs((*batch, 9, 8, OUTPUTS), "float64", seed=2)
    mask = np.random.default_rng(3).random((*batch, 1, 8, 1)) < 0.7
    options = {"sampler": sampler, "key": KEY, "activation": jnp.tanh}

    def run(function, x, residual, mask):
        return unfolded.quick_jit(functools.partial(function, **options))(
            x, kernel, residual=residual, mask=mask
        )

    y, statistics = run(sbn.conv_norm, x, residual, mask)
    flat = (a.reshape(-1, *a.shape[-3:]) for a in (x, residual, mask))
    expected = run(unfolded.conv_norm, *flat)
    assert y.shape == (*batch, 9, 8, OUTPUTS)
    assert_same_to_rounding((y.reshape(expected[0].shape), statistics), expected)


@pytest.mark.parametrize("name", ["conv", "dense"])
def test_given_statistics_are_folded_and_nothing_is_measured(name, x64):
    spatial = {"conv": (9, 8), "dense": ()}[name]
    x = cases.inputs((IMAGES, *spatial, INPUTS), "float64")
    kernel = cases.inputs((*[3] * len(spatial), INPUTS, OUTPUTS), "float64", seed=1)
    mean, scale, bias = cases.inputs((3, OUTPUTS), "float64", seed=2)
    statistics = sbn.Statistics(mean, scale**2)
    fold = {"conv": sbn.conv_norm, "dense": sbn.dense_norm}[name]
    y, same = fold(x, kernel, scale, bias, statistics=statistics, epsilon=0.1)
    z = getattr(unfolded, name)(x, kernel)
    expected = sbn.normalize(z, statistics, scale, bias, epsilon=0.1)
    assert_same_to_rounding((y, same), (expected, statistics))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_without_a_sampler_batch_norm_follows(masked, fast):
    x = cases.inputs((IMAGES, 9, 8, INPUTS))
    kernel = cases.inputs((3, 3, INPUTS, OUTPUTS), seed=1)
    mask = np.random.default_rng(3).random((IMAGES, 9, 8, 1)) < 0.7 if masked else None
    actual = sbn.conv_norm(x, kernel, mask=mask, use_fast_variance=fast)
    expected = sbn.batch_norm(
        unfolded.conv(x, kernel), mask=mask, use_fast_variance=fast
    )
    chex.assert_trees_all_equal(actual, expected)


given = unfolded.quick_jit(sbn.conv_norm)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_a_sample_that_is_masked_out_is_normalized_with_the_running_statistics(name):
    x = cases.inputs((IMAGES, 9, 8, INPUTS))
    kernel = cases.inputs((3, 3, INPUTS, OUTPUTS), seed=1)
    running = sbn.Statistics(*cases.inputs((2, OUTPUTS), seed=2) ** 2)
    fold = functools.partial(sbn.conv_norm, sampler=cases.SAMPLERS[name], mask=False)
    y, statistics = unfolded.quick_jit(fold)(x, kernel, key=KEY, running=running)
    chex.assert_trees_all_equal(statistics, running)
    chex.assert_trees_all_equal(y, given(x, kernel, statistics=running)[0])


@pytest.mark.parametrize("name", ["BS", "FS", "BS+VDN", "lattice"])
def test_statistics_are_pooled_over_a_named_axis(name, x64):
    x = cases.inputs((2, IMAGES, 9, 8, INPUTS), "float64")
    kernel = cases.inputs((3, 3, INPUTS, OUTPUTS), "float64", seed=1)
    g = cases.inputs((2, IMAGES, 5, 4, OUTPUTS), "float64", seed=2)

    def run(function):
        def loss(kernel, x, g):
            y, statistics = function(
                x,
                kernel,
                sampler=cases.SAMPLERS[name],
                key=KEY,
                strides=2,
                activation=jnp.tanh,
                axis_name="device",
            )
            return (y * g).sum(), statistics

        mapped = jax.vmap(
            jax.value_and_grad(loss, (0, 1), has_aux=True),
            (None, 0, 0),
            axis_name="device",
        )
        return jax.jit(mapped)(kernel, x, g)

    assert_same_to_rounding(run(sbn.conv_norm), run(unfolded.conv_norm))


def written(function, shape, *arguments):
    """The operations of a program whose results have the given shape."""

    def equations(program):
        for equation in program.eqns:
            if equation.primitive.name == "custom_jvp_call":
                yield from equations(equation.params["call_jaxpr"].jaxpr)
            else:
                yield equation

    names = {
        equation.primitive.name
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if shape in [getattr(out.aval, "shape", None) for out in equation.outvars]
    }
    return names - {"broadcast_in_dim"}


@pytest.mark.parametrize("name", [*cases.SAMPLERS, "evaluation"])
def test_the_output_is_computed_by_one_convolution_with_a_bias(name):
    options = {"sampler": cases.SAMPLERS.get(name), "key": KEY}
    if name == "evaluation":
        ones = jnp.ones(OUTPUTS)
        options = {"statistics": sbn.Statistics(ones, ones)}
    x, kernel = jnp.ones((IMAGES, 9, 8, INPUTS)), jnp.ones((3, 3, INPUTS, OUTPUTS))
    found = written(
        lambda *args: sbn.conv_norm(*args, **options)[0],
        (IMAGES, 9, 8, OUTPUTS),
        x,
        kernel,
    )
    assert found == {"add", "conv_general_dilated"}
