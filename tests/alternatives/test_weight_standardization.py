"""Scaled weight standardization: against the reference, in layers, and at depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives.weight_standardization import (
    activation_gain,
    scaled,
    standardize_kernel,
)
from flax_sbn.linen.weight_standardization import WSConv, WSDense
from flax_sbn.nnx.weight_standardization import WSConv as NnxWSConv
from flax_sbn.nnx.weight_standardization import WSDense as NnxWSDense
from tests import cases, teaching
from tests.closeness import assert_close, eps

KEY = jax.random.key(0)
ZEROS = nnx.initializers.zeros
SHAPES = [(6, 4), (3, 2, 4), (3, 2, 5, 4), (2, 3, 2, 3, 4)]


def reference(kernel, gain=1.0, mask=None, epsilon=1e-4):
    """Standardizes one output feature at a time."""
    kernel = np.asarray(kernel, np.float64)
    y = np.zeros_like(kernel)
    kept = np.ones(kernel.shape, bool) if mask is None else np.asarray(mask, bool)
    gains = np.broadcast_to(gain, kernel.shape[-1:])
    for feature in range(kernel.shape[-1]):
        chosen = kept[..., feature]
        weights = kernel[..., feature][chosen]
        if weights.size:
            total = max(weights.var() * weights.size, epsilon)
            standard = (weights - weights.mean()) / np.sqrt(total)
            y[..., feature][chosen] = gains[feature] * standard
    return y


def some_mask(shape):
    """Returns a mask; nothing is left of the last feature."""
    mask = np.random.default_rng(5).random(shape) < 0.6
    mask[..., -1] = False
    return mask


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, "float32") for shape in SHAPES),
        *((SHAPES[-1], dtype) for dtype in ("bfloat16", "float16", "float64")),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_are_those_of_the_reference(shape, dtype, masked, x64):
    kernel = cases.inputs(shape, dtype)
    gain = cases.inputs(shape[-1:], dtype, seed=1)
    mask = some_mask(shape) if masked else None
    for options in ({}, {"gain": gain}):
        y = jax.jit(standardize_kernel)(kernel, **options, mask=mask)
        assert (y.shape, y.dtype) == (shape, kernel.dtype)
        expected = reference(kernel, np.asarray(options.get("gain", 1.0)), mask)
        assert_close(y, expected, dtype, num=kernel.size)


def test_the_result_is_in_the_promoted_dtype():
    kernel, gain = jnp.ones((4, 2), jnp.bfloat16), jnp.ones(2)
    assert standardize_kernel(kernel, gain).dtype == jnp.float32
    assert standardize_kernel(np.arange(8).reshape(4, 2)).dtype == jnp.float32


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.01), (100.0, 1.0), (-9.0, 1e3)])
def test_mean_is_zero_and_variance_the_squared_gain_over_the_fan_in(mean, std):
    kernel = mean + std * jax.random.normal(KEY, (3, 3, 16, 4))
    gain = jnp.array([1.0, -2.0, 0.5, 0.0])
    y = np.asarray(jax.jit(standardize_kernel)(kernel, gain), np.float64)
    # What the mean is rounded to cannot be told from a mean.
    rounding = 4 * eps("float32") * (1 + abs(mean) / std) / 12
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=rounding)
    expected = np.square(gain) / (3 * 3 * 16)
    np.testing.assert_allclose(y.var((0, 1, 2)), expected, rtol=1e-5)


# Above and below what epsilon allows.
@pytest.mark.parametrize(("size", "masked"), [(1.0, True), (1e-3, False)])
def test_gradients_are_those_of_finite_differences(size, masked, x64):
    shape = (3, 2, 3)
    kernel = size * cases.inputs(shape, "float64")
    gain = cases.inputs(shape[-1:], "float64", seed=1)
    mask = some_mask(shape) if masked else None
    total = float(
        np.square(kernel - kernel.mean((0, 1), keepdims=True)).sum((0, 1)).min()
    )
    assert (total > 1e-4) == (size == 1.0)
    function = jax.jit(functools.partial(standardize_kernel, mask=mask))
    check_grads(function, (kernel, gain), 2, "rev", eps=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fill", [0.0, 7.0, 1e-20])
def test_constant_kernels_stay_finite(fill, dtype):
    kernel = jnp.full((3, 3, 4, 2), fill, dtype)
    weights = cases.inputs(kernel.shape)

    def loss(kernel, gain):
        return (weights * standardize_kernel(kernel, gain)).sum()

    y = standardize_kernel(kernel)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(kernel, jnp.ones(2))
    for array in (y, *gradients):
        assert np.isfinite(np.asarray(array, np.float32)).all()
    assert_close(y, np.zeros(kernel.shape), dtype)


@pytest.mark.parametrize(
    ("shape", "options", "given", "fix"),
    [
        ((1, 1, 1, 8), {}, "(1, 1, 1, 8)", "Use a plain layer"),
        ((8,), {}, "(8,)", "Use a plain layer"),
        ((3, 8), {"gain": jnp.ones(3)}, "gain of shape (3,)", "gain of shape (8,)"),
        ((3, 8), {"mask": jnp.ones(8)}, "mask of shape (8,)", "mask of shape (3, 8)"),
    ],
)
def test_wrong_shapes_are_refused(shape, options, given, fix):
    def call(kernel):
        return standardize_kernel(kernel, **options)

    with pytest.raises(ValueError, match="Expected") as raised:
        jax.eval_shape(call, jax.ShapeDtypeStruct(shape, "float32"))
    assert given in str(raised.value)
    assert fix in str(raised.value)


def deviation(function):
    """Returns the deviation of a NumPy function of normal numbers: a fine sum."""
    edges = np.linspace(-12, 12, 200_001)
    x = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * (edges[1] - edges[0])
    y = function(x)
    return np.sqrt((density * (y - (density * y).sum()) ** 2).sum())


ACTIVATIONS = {
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "sbn.relu": (sbn.relu, lambda x: np.maximum(x, 0)),
    "silu": (jax.nn.silu, lambda x: x / (1 + np.exp(-x))),
    "gelu": (
        jax.nn.gelu,
        lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "tanh": (jnp.tanh, np.tanh),
    "relu6": (jax.nn.relu6, lambda x: np.clip(x, 0, 6)),
    "sign": (jnp.sign, np.sign),
    "affine": (lambda x: 3 * x - 2, lambda x: 3 * x - 2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gain_is_one_over_the_standard_deviation(name):
    activation, in_numpy = ACTIVATIONS[name]
    assert activation_gain(activation) == pytest.approx(
        1 / deviation(in_numpy), rel=1e-7
    )


def test_gains_are_the_published_ones():
    exact = np.sqrt(2 / (1 - 1 / np.pi))
    assert activation_gain(jax.nn.relu) == pytest.approx(exact, rel=1e-12)
    # Those were estimated from samples.
    assert activation_gain(jax.nn.silu) == pytest.approx(1.7881, rel=1e-3)
    assert activation_gain(jax.nn.gelu) == pytest.approx(1.7015, rel=1e-3)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, jax.nn.silu])
def test_gains_are_constants_wherever_they_are_asked_for(activation):
    expected = activation_gain(activation)
    for transform in (jax.jit, jax.vmap, jax.grad, lambda f: jax.jit(jax.vmap(f))):
        inner = []

        def function(x, inner=inner):
            inner.append(activation_gain(activation))
            return inner[0] * x

        transform(function)(jnp.zeros(() if transform is jax.grad else 3))
        assert inner == [expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_activations_keep_the_dtype_and_are_one_object(dtype):
    x = cases.inputs((5, 3), dtype)
    y = scaled(jax.nn.relu)(x)
    assert y.dtype == x.dtype
    expected = np.maximum(np.asarray(x, np.float64), 0) / np.sqrt((1 - 1 / np.pi) / 2)
    assert_close(y, expected, dtype)
    assert scaled(jax.nn.relu) is scaled(jax.nn.relu)


@pytest.mark.parametrize("activation", [jnp.ones_like, jnp.log, jnp.sum])
def test_activations_without_a_gain_are_refused(activation):
    with pytest.raises(ValueError, match="Expected an"):
        activation_gain(activation)


CONVOLUTIONS = {
    "strides": {"strides": (2, 1), "padding": "VALID", "use_bias": False},
    "dilation": {"kernel_dilation": 2, "input_dilation": (1, 2), "padding": 2},
    "groups": {"feature_group_count": 2, "padding": "CIRCULAR"},
    "masked": {"mask": some_mask((3, 3, 4, 8)), "precision": "highest"},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16, "feature_group_count": 4},
}


def compared(linen, module, x):
    """Returns parameters, and value and gradients with them in linen and in nnx."""
    shapes = jax.eval_shape(linen.init, KEY, x)["params"]
    params = {
        name: cases.inputs(p.shape, str(p.dtype), seed=i)
        for i, (name, p) in enumerate(sorted(shapes.items()))
    }
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    assert set(nnx.to_pure_dict(state)) == set(params)

    def in_linen(params):
        return linen.apply({"params": params}, x)

    def in_nnx(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, rest)(x)

    def value_and_gradients(function, params):
        y, pullback = jax.vjp(function, params)
        return y, *pullback(jnp.cos(y))

    return params, [
        jax.jit(functools.partial(value_and_gradients, function))(params)
        for function in (in_linen, in_nnx)
    ]


def check_layer(linen, plain, module, x, mask=None):
    """Checks a layer: it is flax's own with the reference's kernel, in both APIs."""
    params, (result, other) = compared(linen, module, x)
    given = {name: p for name, p in params.items() if name != "gain"}
    kernel = reference(params["kernel"], np.asarray(params["gain"]), mask)
    given["kernel"] = jnp.asarray(kernel, params["kernel"].dtype)
    expected = jax.jit(plain.apply)({"params": given}, x)
    dtype = min(expected.dtype, given["kernel"].dtype, key=lambda d: d.itemsize).name
    assert result[0].dtype == expected.dtype
    assert_close(result[0], expected, dtype, num=36)
    for a, e in zip(*map(jax.tree.leaves, (other, result)), strict=True):
        assert a.dtype == e.dtype
        assert_close(a, np.asarray(e), dtype, num=100)
    assert all((np.asarray(g) != 0).any() for g in result[1].values())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_those_of_flax_with_a_standardized_kernel(name):
    options = CONVOLUTIONS[name]
    check_layer(
        WSConv(8, (3, 3), **options),
        nn.Conv(8, (3, 3), **options),
        NnxWSConv(4, 8, (3, 3), **options, kernel_init=ZEROS, rngs=nnx.Rngs(0)),
        cases.inputs((2, 7, 6, 4)),
        options.get("mask"),
    )


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_bias": False, "dtype": jnp.bfloat16}])
def test_dense_layers_are_those_of_flax_with_a_standardized_kernel(shape, options):
    check_layer(
        WSDense(8, **options),
        nn.Dense(8, **options),
        NnxWSDense(4, 8, **options, kernel_init=ZEROS, rngs=nnx.Rngs(0)),
        cases.inputs(shape),
    )


@pytest.mark.parametrize("transform", [jax.named_call, jax.jit, nnx.jit])
def test_nnx_layers_are_not_changed_by_a_call(transform):
    layer = NnxWSDense(4, 3, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(layer)))
    x = cases.inputs((5, 4))
    kernel = reference(before["kernel"])
    for _ in range(2):
        assert_close(transform(lambda x: layer(x))(x), np.asarray(x) @ kernel, num=4)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), before
    )


def test_a_half_precision_layer_standardizes_in_float32():
    # Cast first, these weights would all be the same.
    kernel = 100 + 0.01 * cases.inputs((3, 4, 8))
    params = {"kernel": kernel, "bias": jnp.zeros(8), "gain": jnp.ones(8)}
    x = np.random.default_rng(0).standard_normal((64, 32, 4))
    layer = WSConv(8, (3,), padding="CIRCULAR", dtype="bfloat16")
    y = jax.jit(layer.apply)({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    assert float(y.astype("float32").var()) == pytest.approx(1, abs=0.1)


def test_layers_start_as_flax_does_with_gains_of_one():
    x = jnp.zeros((1, 4, 3))
    params = WSConv(5, (3,)).init(KEY, x)["params"]
    flax = nn.Conv(5, (3,)).init(KEY, x)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        **jax.tree.map(jnp.shape, flax),
        "gain": (5,),
    }
    np.testing.assert_array_equal(params["kernel"], flax["kernel"])
    np.testing.assert_array_equal(params["gain"], np.ones(5))
    module = NnxWSDense(3, 5, gain_init=nnx.initializers.constant(2), rngs=nnx.Rngs(0))
    plain = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.kernel[...], plain.kernel[...])
    np.testing.assert_array_equal(module.gain[...], np.full(5, 2))


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: WSDense(4).init(KEY, x),
        lambda x: NnxWSDense(1, 4, rngs=nnx.Rngs(0))(x),
        lambda x: WSConv(4, (1,)).init(KEY, x[None]),
    ],
    ids=["linen", "nnx", "convolution"],
)
def test_layers_refuse_a_fan_in_of_one(layer):
    teaching.message_while_tracing(
        (2, 1), layer, ValueError, "1, 4)", "Use a plain layer"
    )


def variances(depth, layer, activation):
    """Returns the mean variance of the features after each of so many layers."""
    x = np.random.default_rng(0).standard_normal((256, 128)).astype("float32")

    def body(x, key):
        y = layer.apply(layer.init(key, x), x)
        return activation(y), y.var(0).mean()

    keys = jax.random.split(KEY, depth)
    return np.asarray(jax.jit(lambda x: jax.lax.scan(body, x, keys)[1])(x))


def test_a_deep_network_keeps_its_variance():
    ws, plain = WSDense(128), nn.Dense(128)
    for activation in (jax.nn.relu, jnp.tanh):
        found = variances(64, ws, scaled(activation))
        assert ((found > 0.5) & (found < 2)).all()
    # Each of the two is needed.
    assert variances(64, ws, jax.nn.relu)[-1] < 1e-10
    assert variances(64, plain, scaled(jax.nn.relu))[-1] > 1e3
