"""In half precision the folded form is no further from the truth than the unfolded.

The truth is the unfolded form in float64, for the same half-precision input and float32
parameters. What is compared are root mean square errors, each relative to its tensor,
over several layers and seeds.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.xla import half_precision
from tests import cases, unfolded
from tests.closeness import assert_close
from tests.samples import KEY

pytestmark = pytest.mark.optimized

# How code is made of what XLA fuses changes no number, and takes long by default.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# A CPU computes in float32, and XLA leaves out roundings in between. So results are
# rounded wherever an accelerator writes them to memory, ...
WRITTEN = {"xla_allow_excess_precision": False, **QUICK}
# ... but not between a convolution and its bias, which are one kernel there.
FUSED = {"xla_allow_excess_precision": True, **QUICK}
SEEDS = 8

# Sampler, folded and unfolded form, their options, input and kernel.
CONV, DENSE = (sbn.conv_norm, unfolded.conv_norm), (sbn.dense_norm, unfolded.dense_norm)
LAYERS = {
    "3x3-BS": (cases.SAMPLERS["BS"], *CONV, {}, (16, 8, 8, 16), (3, 3, 16, 16)),
    "3x3-FS": (
        cases.SAMPLERS["FS"],
        *CONV,
        {"feature_group_count": 2},
        (16, 8, 8, 32),
        (3, 3, 16, 16),
    ),
    "1x1-FS+VDN": (
        cases.SAMPLERS["FS+VDN"],
        *CONV,
        {"strides": 2},
        (16, 15, 15, 32),
        (1, 1, 32, 16),
    ),
    "3x3-lattice": (
        sbn.LatticeSampling(8, min_values=256),
        *CONV,
        {},
        (16, 16, 16, 16),
        (3, 3, 16, 16),
    ),
    "dense-BS": (sbn.BatchSampling(64), *DENSE, {}, (512, 64), (64, 16)),
}

# Largest ratio of the errors, by the mean of inputs of standard deviation one: 0 is
# that of normalized data, 0.7 that behind a ReLU. Where it is large, the gradient of
# the kernel is a small difference of large sums. The folded form rounds two of them,
# and reads the gradient of the scale off one. That of the bias is the same in both.
BOUNDS = {
    0: {"y": 0.95, "x": 1.0, "kernel": 1.0, "scale": 1.0, "bias": 1.25},
    0.5: {"y": 0.95, "x": 1.0, "kernel": 1.0, "scale": 1.0, "bias": 1.25},
    1: {"y": 0.95, "x": 1.0, "kernel": 1.15, "scale": 1.25, "bias": 1.25},
    10: {"y": 0.8, "x": 1.1, "kernel": 1.6, "scale": 1.6, "bias": 1.25},
}


def problem(layer, mean, seed):
    """Arguments and the output's cotangent."""
    _, _, plain, options, x_shape, kernel_shape = LAYERS[layer]
    rng = np.random.default_rng(seed)
    features, spread = kernel_shape[-1], np.prod(kernel_shape[:-1]) ** -0.5
    mean = mean * rng.uniform(0, 2, x_shape[-1])  # each feature has one of its own
    arguments = {
        "x": jnp.asarray(mean + rng.standard_normal(x_shape), jnp.bfloat16),
        "kernel": jnp.float32(spread * rng.standard_normal(kernel_shape)),
        "scale": jnp.float32(1 + 0.2 * rng.standard_normal(features)),
        "bias": jnp.float32(0.2 * rng.standard_normal(features)),
    }
    shape = jax.eval_shape(lambda: plain(**arguments, **options)[0]).shape
    return arguments, jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


@functools.cache
def programs(layer, activation):
    """Truth, unfolded and folded form, and the output of the folded form alone."""
    sampler, fold, plain, options, _, _ = LAYERS[layer]

    def call(function, dtype, key, **arguments):
        y, _ = function(
            **arguments,
            **options,
            sampler=sampler,
            key=key,
            activation=activation,
            dtype=dtype,
        )
        return y

    def results(function, dtype, key, arguments, g):
        y, gradients = unfolded.value_and_gradients(
            functools.partial(call, function, dtype, key), arguments, g
        )
        return {"y": y, **gradients}

    def truth(key, arguments, g):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), arguments)
        return results(plain, jnp.float64, key, wide, g)

    written, fused = (
        functools.partial(jax.jit, compiler_options=option)
        for option in (WRITTEN, FUSED)
    )
    return (
        written(truth),
        written(functools.partial(results, plain, jnp.bfloat16)),
        written(functools.partial(results, fold, jnp.bfloat16)),
        fused(
            lambda key, arguments, _: {"y": call(fold, jnp.bfloat16, key, **arguments)}
        ),
    )


def squares(actual, truth):
    """The squared error of each tensor, relative to it."""
    pairs = {
        name: (np.float64(a), np.float64(truth[name])) for name, a in actual.items()
    }
    return {name: ((a - e) ** 2).sum() / (e**2).sum() for name, (a, e) in pairs.items()}


def ratios(activation, mean, layers):
    """The errors of the folded form by those of the unfolded one."""
    totals = {"folded": {}, "unfolded": {}}
    for layer in layers:
        truth, *forms = programs(layer, activation)
        for seed in range(SEEDS):
            # Other places each time: the ratio depends on them, too.
            given = jax.random.key(seed), *problem(layer, mean, seed)
            expected = truth(*given)
            plain, fold, alone = (squares(form(*given), expected) for form in forms)
            for form, each in [("unfolded", plain), ("folded", {**fold, **alone})]:
                for name, square in each.items():
                    totals[form][name] = totals[form].get(name, 0.0) + square
    folded, plain = totals.values()
    return {name: (folded[name] / plain[name]) ** 0.5 for name in folded}


# All layers without an activation, and two with it: compiling takes the time.
ACTIVATIONS = {
    "none": (None, list(LAYERS)),
    "silu": (nn.silu, ["3x3-lattice", "3x3-FS"]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mean", BOUNDS)
def test_the_folded_form_is_no_further_from_the_truth(mean, activation, x64):
    function, layers = ACTIVATIONS[activation]
    found = ratios(function, mean, layers)
    for name, bound in BOUNDS[mean].items():
        assert found[name] <= bound, name


@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_the_gradient_of_the_bias_is_summed_in_float32(layer):
    fold, kernel = {
        "conv": (sbn.conv_norm, jnp.ones((1, 1, 4, 4))),
        "dense": (sbn.dense_norm, jnp.ones((4, 4))),
    }[layer]
    x = cases.inputs((64, 16, 16, 4), "bfloat16")

    @functools.partial(jax.jit, compiler_options=WRITTEN)
    def gradient(bias):
        def output(bias):
            options = {"sampler": sbn.NaiveSampling(4), "dtype": jnp.bfloat16}
            return fold(x, kernel, None, bias, **options)[0]

        y, pullback = jax.vjp(output, bias)
        return pullback(jnp.ones_like(y))[0]

    # 2^14 positions; in bfloat16 a sum of ones comes no further than 256.
    np.testing.assert_array_equal(gradient(jnp.ones(4)), np.full(4, 2.0**14))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_kernel_is_rounded_for_good(dtype):
    kernel = cases.inputs((3, 3, 4, 4))
    rounded = jax.jit(lambda k: half_precision.round_to(k, jnp.dtype(dtype)))
    np.testing.assert_array_equal(
        np.float32(rounded(kernel)), np.float32(kernel.astype(dtype))
    )
    # XLA leaves a conversion there and back out, on GPUs, but never this one.
    program = rounded.lower(kernel).as_text()
    assert ("reduce_precision" in program) == (dtype != "float32")


def test_a_small_kernel_is_rounded_to_numbers_that_float16_has_below_the_normal():
    factor = 2.0 ** -np.arange(12.0, 28).reshape(1, 1, 1, 16)
    kernel = cases.inputs((3, 3, 16, 16)) * factor
    round_to = functools.partial(half_precision.round_to, dtype=jnp.float16)
    rounded, pullback = jax.vjp(jax.jit(round_to), kernel)
    np.testing.assert_array_equal(rounded, np.float16(kernel))
    (gradient,) = pullback(jnp.ones_like(rounded))
    np.testing.assert_array_equal(gradient, np.ones(kernel.shape))


@pytest.mark.parametrize("name", ["BS", "FS", "lattice"])
def test_large_values_in_float16_fold(name):
    x = 2e4 * cases.inputs((16, 8, 8, 4))
    x, kernel = jnp.clip(x, -6e4, 6e4).astype(jnp.float16), jnp.eye(4)[None, None]
    options = {"sampler": cases.SAMPLERS[name], "key": KEY, "dtype": "float16"}
    (folded, _), (plain, _) = (
        jax.jit(functools.partial(conv_norm, **options))(x, kernel)
        for conv_norm in (sbn.conv_norm, unfolded.conv_norm)
    )
    assert_close(folded, np.float64(plain), "float16")


@pytest.mark.parametrize("add", [half_precision._add_narrow, half_precision._add_wide])
def test_the_shift_is_added_alike_on_every_platform(add):
    y = cases.inputs((64, 16, 16, 4), "bfloat16")
    shift = cases.inputs((4,), seed=1)
    total, pullback = jax.vjp(add, y, shift)
    assert total.dtype == jnp.bfloat16
    assert_close(total, np.float64(y) + np.float64(shift), "bfloat16", c=1)
    by_y, by_shift = pullback(jnp.ones_like(y))
    np.testing.assert_array_equal(np.float32(by_y), np.ones(y.shape))
    np.testing.assert_array_equal(by_shift, np.full(4, 2.0**14))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["BS", "FS", "lattice"])
def test_half_precision_is_the_dtype_of_the_output_alone(name, dtype):
    x, kernel = cases.inputs((16, 8, 8, 4), dtype), cases.inputs((3, 3, 4, 4), seed=1)
    options = {"sampler": cases.SAMPLERS[name], "key": KEY, "dtype": dtype}
    scale, bias = cases.inputs((2, 4), seed=2)

    def output(x, kernel, scale, bias):
        y, statistics = sbn.conv_norm(x, kernel, scale, bias, **options)
        assert y.dtype == dtype
        assert statistics.mean.dtype == statistics.var.dtype == jnp.float32
        return y.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(output, (0, 1, 2, 3)))(x, kernel, scale, bias)
    assert [g.dtype for g in gradients] == [dtype, *["float32"] * 3]
