"""Kalman normalization: against the equations, at its limits, and as layers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from scipy.special import erf

import flax_sbn as sbn
from flax_sbn.alternatives.kalman import (
    add_statistics,
    kalman_norm,
    kalman_prior,
    kalman_update,
)
from flax_sbn.linen.kalman import KalmanNorm as LinenKalmanNorm
from flax_sbn.nnx.kalman import KalmanNorm as NnxKalmanNorm
from tests import cases, unfolded
from tests.closeness import assert_close, assert_same_to_rounding
from tests.teaching import message_while_tracing

KEY = jax.random.key(5)
quick_jit = unfolded.quick_jit


# The equations, in NumPy float64.


def moments(y):
    axes = tuple(range(y.ndim - 1))
    return y.mean(axes), y.var(axes)


def predicted(noise, mean, var, linear):
    """Moments of what a layer makes of a rectified Gaussian row."""
    return moments(linear(np.maximum(mean + np.sqrt(var) * noise, 0)))


def mixed(measured, prior, p):
    (m, v), (m_p, v_p) = measured, prior
    if not np.mean(v_p / v) < 100:
        return m, v
    mean = p * m_p + (1 - p) * m
    return mean, p * v_p + (1 - p) * v + p * (1 - p) * (m - m_p) ** 2


def normalized(y, mean, var, scale, bias, epsilon=1e-5):
    return scale * (y - mean) / np.sqrt(var + epsilon) + bias


def product(kernel):
    return lambda z: z @ kernel


def convolution(kernel):
    """A convolution with zeros around, by its definition; any number of axes."""
    *window, _, features = kernel.shape

    def apply(z):
        pad = [((n - 1) // 2, n // 2) for n in window]
        padded = np.pad(z, [(0, 0), *pad, (0, 0)])
        y = np.zeros((*z.shape[:-1], features))
        for offset in np.ndindex(*window):
            shifted = [
                slice(o, o + n) for o, n in zip(offset, z.shape[1:], strict=False)
            ]
            y += padded[:, *shifted] @ kernel[offset]
        return y

    return apply


# The same, for the library.


def convolve(x, kernel):
    layer = nn.Conv(kernel.shape[-1], kernel.shape[:-2], use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)


def statistics_of(features, dtype="float32", seed=7):
    mean, var = cases.inputs((2, features), dtype, seed)
    return sbn.Statistics(mean, var**2)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


LINEAR: dict[str, tuple[Any, Any, tuple[int, ...], tuple[int, ...]]] = {
    "dense": (jnp.matmul, product, (3, 4), (9, 3)),
    "dense-maps": (jnp.matmul, product, (3, 4), (1, 5, 4, 3)),
    "conv-2d": (convolve, convolution, (3, 2, 3, 4), (1, 5, 4, 3)),
    "conv-3d": (convolve, convolution, (1, 3, 2, 3, 4), (1, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_prior_is_what_the_layer_makes_of_a_rectified_gaussian_row(name, x64):
    ours, reference, kernel_shape, shape = LINEAR[name]
    kernel, before = cases.inputs(kernel_shape, "float64"), statistics_of(3, "float64")

    @quick_jit
    def prior_of(before, kernel):
        return kalman_prior(KEY, before, lambda z: ours(z, kernel), shape)

    prior = prior_of(before, kernel)
    noise = wide(jax.random.normal(KEY, shape, "float64"))
    expected = predicted(noise, *wide(before), reference(wide(kernel)))
    for found, e in zip(prior, expected, strict=True):
        assert found.dtype == "float64"
        assert_close(found, e, "float64", num=kernel.size * noise.size)


@pytest.mark.parametrize("activation", [None, jnp.tanh])
def test_the_prior_passes_any_activation_or_none(activation, x64):
    before = statistics_of(3, "float64")
    shape = (4, 5, 3)

    @quick_jit
    def prior_of(before):
        return kalman_prior(KEY, before, lambda z: 2 * z, shape, activation=activation)

    prior = prior_of(before)
    noise = np.asarray(jax.random.normal(KEY, shape, "float64"))
    z = np.asarray(before.mean) + np.sqrt(before.var) * noise
    expected = moments(2 * wide(z if activation is None else activation(z)))
    for found, e in zip(prior, expected, strict=True):
        assert_close(found, e, "float64", num=z.size)


def test_the_prior_of_a_large_row_is_the_analytic_one():
    mean, std = np.array([0.5, -1.0, 2.0]), np.array([1.0, 2.0, 0.5])
    density = np.exp(-((mean / std) ** 2) / 2) / np.sqrt(2 * np.pi)
    below = (1 + erf(mean / std / np.sqrt(2))) / 2
    first = mean * below + std * density
    second = (mean**2 + std**2) * below + mean * std * density
    kernel = np.array([[1.0, -2.0], [0.5, 1.0], [-1.0, 3.0]])

    before = sbn.Statistics(jnp.float32(mean), jnp.float32(std**2))
    window = jnp.float32(kernel[None, None])
    prior = kalman_prior(KEY, before, lambda z: convolve(z, window), (1, 512, 512, 3))
    expected_mean, expected_var = first @ kernel, (second - first**2) @ kernel**2
    error = np.sqrt(expected_var / 512**2)  # of a mean of independent values
    assert (abs(prior.mean - expected_mean) < 4 * error).all()
    np.testing.assert_allclose(prior.var, expected_var, rtol=0.01)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_is_the_mixture(p, dtype, x64):
    measured, prior = (statistics_of(5, dtype, seed) for seed in (1, 2))
    found = quick_jit(kalman_update)(measured, prior, p)
    assert found.mean.dtype == dtype
    for f, e in zip(found, mixed(wide(measured), wide(prior), p), strict=True):
        assert_close(f, e, dtype)


@pytest.mark.parametrize(
    ("measured_var", "prior_var", "mixes"),
    [
        ([1.0, 1.0], [99.0, 99.0], True),
        ([1.0, 1.0], [101.0, 101.0], False),
        ([1.0, 1.0], [150.0, 49.0], True),  # the mean over features counts
        ([1.0, 0.0], [1.0, 1e-6], False),  # what is constant is not predicted
        ([1.0, 0.0], [1.0, 0.0], True),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1e-30, 1e-30], [1e30, 1e30], False),
    ],
)
def test_a_prediction_that_is_far_too_wide_is_left_out(measured_var, prior_var, mixes):
    measured = sbn.Statistics(jnp.array([1.0, -1.0]), jnp.array(measured_var))
    prior = sbn.Statistics(jnp.array([0.0, 3.0]), jnp.array(prior_var))

    def total(measured, prior):
        mean, var = kalman_update(measured, prior, 0.75)
        return mean.sum() + var.sum()

    found = kalman_update(measured, prior, 0.75)
    expected = sbn.mix_statistics([prior, measured], [0.75, 0.25])
    assert_same_to_rounding(found, expected if mixes else measured, 1e-6)
    d_measured, d_prior = jax.grad(total, (0, 1))(measured, prior)
    assert_close(d_measured.var, [0.25 if mixes else 1.0] * 2)
    assert_close(d_prior.var, [0.75 if mixes else 0.0] * 2)


@pytest.mark.parametrize("name", ["all", "FS+VDN"])
@pytest.mark.parametrize("prior", [None, statistics_of(3)], ids=["None", "p=0"])
def test_without_a_prior_or_its_weight_it_is_batch_norm(prior, name):
    x = cases.inputs((16, 6, 4, 3))
    scale, bias = cases.inputs((2, 3), seed=1)
    sampler = {"all": None, **cases.SAMPLERS}[name]
    options = {"sampler": sampler, "key": KEY, "running_weight": 0.25}
    options["running"] = statistics_of(3, seed=3)
    ours = functools.partial(kalman_norm, prior=prior, prior_weight=0.0, **options)
    plain = functools.partial(sbn.batch_norm, **options)

    def value_and_gradients(norm):
        given = {"x": x, "scale": scale, "bias": bias}
        cotangents = cases.inputs(x.shape, seed=4), options["running"]
        return quick_jit(functools.partial(unfolded.value_and_gradients, norm))(
            given, cotangents
        )

    found, expected = value_and_gradients(ours), value_and_gradients(plain)
    assert_same_to_rounding(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes_and_jit(dtype, x64):
    x = cases.inputs((2, 4, 4, 3), dtype)
    prior = statistics_of(3, "float64" if dtype == "float64" else "float32")
    y, statistics = quick_jit(kalman_norm)(x, prior=prior)
    assert y.dtype == dtype
    assert statistics.mean.dtype == jnp.promote_types(dtype, "float32")
    expected = mixed(moments(wide(x)), wide(prior), 0.9)
    assert_close(statistics.var, expected[1], "float32", num=32)
    assert_close(y, normalized(wide(x), *expected, 1, 0), dtype, num=32)


def two_layers(x, first, second, scale, bias, through=lambda statistics: statistics):
    """Two layers, ``through`` what the statistics pass in between."""
    y, statistics = sbn.batch_norm(convolve(x, first), scale, bias)
    z = (1, *y.shape[1:])
    prior = kalman_prior(KEY, through(statistics), lambda z: convolve(z, second), z)
    y, statistics = kalman_norm(
        convolve(jax.nn.relu(y), second), scale, bias, prior=prior
    )
    return jnp.sin(y).sum() + statistics.mean.sum() + jnp.cos(statistics.var).sum()


def two_layer_arguments(dtype="float64"):
    x = cases.inputs((2, 4, 3, 2), dtype)
    # Small ones, or the prediction would be left out as far too wide.
    kernels = 0.1 * cases.inputs((2, 3, 3, 2, 2), dtype, seed=1)
    return (x, *kernels, *cases.inputs((2, 2), dtype, seed=2))


def test_the_gradient_goes_through_everything(x64):
    check_grads(jax.jit(two_layers), two_layer_arguments(), 1, "rev")


def test_the_prior_has_a_gradient_which_the_caller_may_stop(x64):
    arguments = two_layer_arguments()
    stopped = functools.partial(two_layers, through=jax.lax.stop_gradient)
    free, stop = (
        quick_jit(jax.grad(loss, (0, 1, 2)))(*arguments)
        for loss in (two_layers, stopped)
    )
    for a, b in zip(free[:2], stop[:2], strict=True):  # all before the statistics
        assert abs(a - b).max() > 1e-3
    assert_same_to_rounding(free[2], stop[2])


def test_sums_add_means_and_variances_and_fill_up_with_zeros():
    wide_one, narrow = statistics_of(5), statistics_of(3, seed=8)
    for a, b in ((wide_one, narrow), (narrow, wide_one)):
        for found, x, y in zip(add_statistics(a, b), wide_one, narrow, strict=True):
            assert_close(found, wide(x) + np.pad(wide(y), (0, 2)))
    same = jax.jit(add_statistics)(narrow, narrow)
    assert_close(same.var, 2 * wide(narrow.var))


def test_sums_of_independent_arrays_have_these_statistics():
    std = jnp.array([1.0, 3.0]).reshape(1, 1, 1, 1, 2)
    a, b = jax.random.normal(KEY, (2, 1, 256, 256, 2)) * std + 2
    summed = sbn.batch_statistics(a + b)
    found = add_statistics(sbn.batch_statistics(a), sbn.batch_statistics(b))
    np.testing.assert_allclose(found.mean, summed.mean, rtol=1e-4)
    np.testing.assert_allclose(found.var, summed.var, rtol=0.02)


@quick_jit
@functools.partial(jax.value_and_grad, argnums=range(4))
def dense_loss(x, first, second, scale):
    y, statistics = sbn.batch_norm(x @ first, scale)
    z = (2, *x.shape[1:])
    prior = kalman_prior(KEY, statistics, lambda z: z @ second, z)
    y, statistics = kalman_norm(jax.nn.relu(y) @ second, scale, prior=prior)
    return jnp.sin(y).sum() + statistics.mean.sum() + statistics.var.sum()


@pytest.mark.parametrize("shape", [(1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("fill", [None, 0.0, 7.0])
@pytest.mark.parametrize("zero", ["none", "first", "second", "scale"])
def test_what_is_constant_stays_finite(shape, fill, zero):
    x = cases.inputs(shape) if fill is None else jnp.full(shape, fill, "float32")
    shapes = {"first": (3, 3), "second": (3, 3), "scale": (3,)}
    arrays = {name: cases.inputs(shape, seed=1) for name, shape in shapes.items()}
    if zero != "none":
        arrays[zero] *= 0
    value, gradients = dense_loss(x, *arrays.values())
    for array in (value, *gradients):
        assert np.isfinite(array).all()


def test_mapped_groups_are_as_alone():
    x = cases.inputs((3, 2, 4, 4, 3))
    kernel, keys = cases.inputs((3, 3), seed=1), jax.random.split(KEY, 3)

    def layer(x, key):
        prior = kalman_prior(key, statistics_of(3), lambda z: z @ kernel, (1, 4, 4, 3))
        return kalman_norm(x @ kernel, prior=prior)

    found = quick_jit(jax.vmap(layer))(x, keys)
    alone = [quick_jit(layer)(*pair) for pair in zip(x, keys, strict=True)]
    expected = jax.tree.map(lambda *each: jnp.stack(each), *alone)
    assert_same_to_rounding(found, expected, 1e-5)


def test_devices_pool_measured_and_predicted_statistics():
    x = cases.inputs((2, 1, 4, 4, 3))
    keys = jax.random.split(KEY)

    @functools.partial(jax.vmap, axis_name="devices")
    def layer(x, key):
        prior = kalman_prior(
            key, statistics_of(3), jnp.sin, (1, 4, 4, 3), axis_name="devices"
        )
        return kalman_norm(x, prior=prior, axis_name="devices")

    noise = jnp.concatenate([jax.random.normal(key, (1, 4, 4, 3)) for key in keys])
    prior = predicted(wide(noise), *wide(statistics_of(3)), np.sin)
    expected = mixed(moments(wide(x.reshape(2, 4, 4, 3))), prior, 0.9)
    for found, e in zip(quick_jit(layer)(x, keys)[1], expected, strict=True):
        for device in found:
            assert_close(device, e, num=32)


# The layers.

SHAPES = {"conv": (2, 5, 4, 3), "dense": (4, 3)}
ROWS = {"conv": 1, "dense": 8}
FEATURES = 4


def linen_layer(kind, norm=None, **options):
    linear = {
        "conv": nn.Conv(FEATURES, (3, 2), use_bias=False),
        "dense": nn.Dense(FEATURES, use_bias=False),
    }[kind]
    norm = sbn.linen.BatchNorm(momentum=0.9, **(norm or {}))
    return LinenKalmanNorm(linear, norm, num_virtual=ROWS[kind], **options)


def nnx_layer(kind, norm=None, rngs=None, **options):
    rngs = rngs or nnx.Rngs(0, sampling=1)
    linear = {
        "conv": lambda: nnx.Conv(3, FEATURES, (3, 2), use_bias=False, rngs=rngs),
        "dense": lambda: nnx.Linear(3, FEATURES, use_bias=False, rngs=rngs),
    }[kind]()
    norm = sbn.nnx.BatchNorm(FEATURES, momentum=0.9, **(norm or {}), rngs=rngs)
    return NnxKalmanNorm(linear, norm, num_virtual=ROWS[kind], **options, rngs=rngs)


class Linen:
    """A linen layer, driven as an nnx one is; its keys are those of the next call."""

    def __init__(self, kind, norm=None, **options):
        self.layer = linen_layer(kind, norm, **options)
        x = jnp.zeros((1, *SHAPES[kind][1:]))
        self.variables = self.layer.init(KEY, x, statistics_of(3), False)
        self.step = 0

    def keys(self):
        def draw(layer):
            return layer.make_rng("sampling"), layer.norm.make_rng("sampling")

        return self.layer.apply(self.variables, rngs=self.rngs(), method=draw)

    def rngs(self):
        return {"sampling": jax.random.key(self.step)}

    def state(self):
        params, stats = self.variables["params"], self.variables["batch_stats"]["norm"]
        norm = params["norm"]
        running = sbn.Statistics(stats["mean"], stats["var"])
        return params["linear"]["kernel"], norm["scale"], norm["bias"], running

    def __call__(self, x, statistics, evaluate=False, **options):
        result, updates = self.layer.apply(
            self.variables,
            x,
            statistics,
            evaluate,
            **options,
            mutable=["batch_stats"],
            rngs={} if evaluate else self.rngs(),
        )
        self.variables = {**self.variables, **updates}
        self.step += 1
        return result


class Nnx:
    """An nnx layer, likewise."""

    def __init__(self, kind, norm=None, **options):
        self.layer = nnx_layer(kind, norm, **options)

    def keys(self):
        copy = nnx.clone(self.layer)
        return copy.rngs(), None if copy.norm.rngs is None else copy.norm.rngs()

    def state(self):
        affine, running = self.layer.norm._values()
        return self.layer.linear.kernel[...], *affine, running

    def __call__(self, x, statistics, evaluate=False, **options):
        return self.layer(x, statistics, evaluate, **options)


APIS = {"linen": Linen, "nnx": Nnx}


def apply(kind, x, kernel):
    return convolve(x, kernel) if kind == "conv" else x @ kernel


@pytest.mark.parametrize(
    ("kind", "sampler"), [("conv", None), ("dense", sbn.BatchSampling(2))], ids=str
)
@pytest.mark.parametrize("api", APIS)
def test_layers_are_the_functions_step_by_step(api, kind, sampler):
    norm = {"sampler": sampler, "running_weight": 0.25}
    layer = APIS[api](kind, norm, prior_weight=0.6, input_activation=jnp.tanh)
    for step in range(3):
        x, before = cases.inputs(SHAPES[kind], seed=step), statistics_of(3, seed=step)
        kernel, scale, bias, running = layer.state()
        key, sampling = layer.keys()
        linear = functools.partial(apply, kind, kernel=kernel)
        rows = (ROWS[kind], *x.shape[1:])
        prior = kalman_prior(key, before, linear, rows, activation=jnp.tanh)
        options = {"prior_weight": 0.6, "key": sampling, "running": running, **norm}
        expected = kalman_norm(linear(x), scale, bias, prior=prior, **options)
        assert_same_to_rounding(layer(x, before), expected, 1e-5)
        averaged = sbn.update_running(running, expected[1], 0.9)
        assert_same_to_rounding(layer.state()[-1], averaged, 1e-5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("api", APIS)
def test_layers_are_the_equations(api, kind):
    layer, x, before = APIS[api](kind), cases.inputs(SHAPES[kind]), statistics_of(3)
    kernel, scale, bias, running = wide(layer.state())
    noise = jax.random.normal(layer.keys()[0], (ROWS[kind], *x.shape[1:]))
    linear = (convolution if kind == "conv" else product)(kernel)
    prior = predicted(wide(noise), *wide(before), linear)
    expected = mixed(moments(linear(wide(x))), prior, 0.9)
    y, statistics = layer(x, before)
    assert_close(y, normalized(linear(wide(x)), *expected, scale, bias), num=x.size)
    found = layer.state()[-1]
    for new, old, s, e in zip(found, running, statistics, expected, strict=True):
        assert_close(s, e, num=x.size)
        assert_close(new, 0.9 * old + 0.1 * e, num=x.size)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("api", APIS)
def test_the_first_layer_is_batch_norm(api, kind):
    layer, x = APIS[api](kind), cases.inputs(SHAPES[kind])
    kernel, scale, bias, _ = layer.state()
    expected = sbn.batch_norm(apply(kind, x, kernel), scale, bias)
    assert_same_to_rounding(layer(x, None), expected, 1e-5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("api", APIS)
def test_evaluation_draws_nothing_and_changes_nothing(api, kind):
    layer, x = APIS[api](kind), cases.inputs(SHAPES[kind])
    layer(x, statistics_of(3))
    kernel, scale, bias, running = layer.state()
    y, statistics = layer(x[:1], statistics_of(3), True)
    expected = sbn.normalize(apply(kind, x[:1], kernel), running, scale, bias)
    assert_close(y, wide(expected), num=x.size)
    for handed, now, old in zip(statistics, layer.state()[-1], running, strict=True):
        np.testing.assert_array_equal(handed, old)
        np.testing.assert_array_equal(now, old)


@pytest.mark.parametrize("api", APIS)
def test_rows_are_new_in_each_step(api):
    layer, x = APIS[api]("conv"), cases.inputs(SHAPES["conv"])
    (_, first), (_, second) = (layer(x, statistics_of(3)) for _ in range(2))
    assert (first.mean != second.mean).all()


@pytest.mark.parametrize("api", APIS)
def test_a_mask_leaves_positions_out(api):
    x = cases.inputs(SHAPES["conv"])
    mask = jnp.arange(2).reshape(2, 1, 1, 1) == 0
    statistics = [
        APIS[api]("conv")(values, statistics_of(3), mask=where)[1]
        for values, where in ((x.at[1].set(jnp.nan), mask), (x[:1], None))
    ]
    assert_same_to_rounding(*statistics, 1e-5)


@pytest.mark.parametrize("api", APIS)
def test_layers_map_and_compile(api):
    x = cases.inputs((3, *SHAPES["conv"]))
    before = statistics_of(3)
    if api == "linen":
        layer = linen_layer("conv")
        variables = layer.init(KEY, x[0], None, False)

        def call(x, key):
            return layer.apply(
                variables,
                x,
                before,
                False,
                mutable=["batch_stats"],
                rngs={"sampling": key},
            )[0]

    else:
        graph, state = nnx.split(nnx_layer("conv"))

        def call(x, key):
            layer = nnx.merge(graph, state, copy=True)
            layer.rngs.key[...] = key
            return layer(x, before)

    keys = jax.random.split(KEY, 3)
    found, alone = quick_jit(jax.vmap(call))(x, keys), quick_jit(call)
    for i in range(3):
        each = jax.tree.map(lambda a, i=i: a[i], found)
        assert_same_to_rounding(each, alone(x[i], keys[i]), 1e-5)


def test_variables_are_those_of_the_layers_one_after_the_other():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(2, (3, 3), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=False)(x)

    class Kalman(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(2, (3, 3), use_bias=False)
            norm = sbn.linen.BatchNorm(use_running_average=False)
            return LinenKalmanNorm(conv, norm)(x, None)[0]

    x = jnp.zeros((1, 4, 4, 3))  # and a row of zeros is enough for init
    plain, kalman = (model.init(KEY, x) for model in (Plain(), Kalman()))
    assert_same_to_rounding(kalman, plain)


def call(kind="dense", width=3, api="linen", norm=None, **options):
    def run(x):
        if api == "nnx":
            return nnx_layer(kind, norm, **options)(x, statistics_of(width))
        layer = linen_layer(kind, norm, **options)
        variables = layer.init(KEY, x, None, False)
        rngs = {"sampling": KEY}
        return layer.apply(
            variables, x, statistics_of(width), False, mutable=True, rngs=rngs
        )

    return run


def one_row(x):
    return kalman_prior(KEY, statistics_of(3), lambda z: z, (1, 3))


def without_stream(x):
    layer = linen_layer("dense")
    variables = layer.init(KEY, x, None, False)
    return layer.apply(variables, x, statistics_of(3), False, mutable=True)


def nnx_without_stream(x):
    rngs = nnx.Rngs(params=0)
    return nnx_layer("dense", rngs=rngs)(x, statistics_of(3))


ERRORS = {
    "width": (call(width=5), "mean of shape (5,)", "add_statistics"),
    "width-nnx": (call(width=5, api="nnx"), "mean of shape (5,)", "layer before"),
    "weight": (call(prior_weight=1.5), "prior_weight=1.5", "in [0, 1]"),
    "weight-nnx": (call(prior_weight=-1, api="nnx"), "prior_weight=-1", "in [0, 1]"),
    "ghost": (call(norm={"ghost_groups": 2}), "got 2", "Map the network"),
    "ghost-nnx": (call(norm={"ghost_groups": 2}, api="nnx"), "got 2", "Map the"),
    "rows": (one_row, "got 1 from shape=(1, 3)", "num_virtual=64"),
    "stream": (without_stream, "got none", "rngs={'sampling': key}"),
    "stream-nnx": (nnx_without_stream, "['params']", "nnx.Rngs(params=0, sampling=1)"),
    "prior": (
        lambda x: kalman_norm(x, prior=statistics_of(1)),
        "shape (1,)",
        "layer that is measured",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    run, given, fix = ERRORS[name]
    message_while_tracing((4, 3), run, ValueError, given, fix)
