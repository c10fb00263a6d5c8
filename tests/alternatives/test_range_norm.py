"""Range batch norm: against its equation, at its limits, and as layers."""

import functools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives import range_batch_norm, range_moments
from flax_sbn.sampling import sampled_parts
from tests import cases, reference, samples, teaching, unfolded
from tests.closeness import assert_close
from tests.samples import KEY

EPSILON = 1e-2  # large, so that its place matters
SHAPE = (8, 4, 3, 2)
STATIC = ("sampler", "axis", "num_chunks", "epsilon")
norm = unfolded.quick_jit(range_batch_norm, static_argnames=STATIC)


def factor(n):
    return (
        0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(n))
    )


def expected_moments(x, where=None, num_chunks=16, epsilon=EPSILON):
    """Mean, and ``s ** 2 - epsilon``, of ``(m, C)`` values; NaN where not measured."""
    x = reference.wide(x)
    where = np.ones(x.shape, bool) if where is None else where
    num_chunks = min(num_chunks, len(x) // 2)
    n = len(x) // num_chunks
    means, variances = [], []
    for values, kept in zip(x.T, where.T, strict=True):
        ranges = []
        for i in range(num_chunks):
            chunk = values[i * n : (i + 1) * n][kept[i * n : (i + 1) * n]]
            if len(chunk) >= 2:
                ranges.append(factor(len(chunk)) * (chunk.max() - chunk.min()))
        means.append(values[kept].mean() if ranges else np.nan)
        variances.append(
            (np.mean(ranges) + epsilon) ** 2 - epsilon if ranges else np.nan
        )
    return np.stack(means), np.stack(variances)


def expected_norm(x, scale=1.0, bias=0.0, sampler=None, mask=True, num_chunks=16):
    """Output and statistics; the parts of a sample mix as mean and variance."""
    x = np.asarray(x)
    mask = np.broadcast_to(mask, x.shape)
    extent = x.shape[:-1]
    parts, weights = [], []
    for part in sampled_parts(sampler, extent, KEY):
        index = np.arange(math.prod(extent)).reshape(extent)
        for windows in part.windows:
            index = samples.take(windows, index)
        values, kept = (a.reshape(-1, x.shape[-1])[index.ravel()] for a in (x, mask))
        parts.append(expected_moments(values, kept, num_chunks))
        weights.append(part.weight)
    mean, var = reference.mix(parts, weights)
    return reference.normalize(x, mean, var, scale, bias, EPSILON), mean, var


@pytest.mark.parametrize(
    ("name", "masked", "num_chunks", "dtype"),
    [
        ("all", False, 16, "float32"),
        ("all", False, 5, "float64"),  # a remainder of 1
        ("all", True, 7, "float64"),
        ("all", True, 48, "float64"),  # one value, or none, left of some chunks of two
        ("NS", False, 100, "float64"),  # fewer chunks than asked for
        ("BS+VDN", True, 4, "float32"),
    ],
)
def test_values_are_those_of_the_equation(name, masked, num_chunks, dtype, x64):
    x = cases.inputs(SHAPE, dtype)
    scale, bias = cases.inputs((2, 2), dtype, seed=1)
    mask = np.ones((*SHAPE[:-1], 1), bool)
    if masked:
        mask[::3, 1:] = False
    sampler = {"all": None, **cases.SAMPLERS}[name]
    y, statistics = norm(
        np.where(mask, x, np.nan) if masked else x,
        scale,
        bias,
        sampler=sampler,
        key=KEY,
        mask=mask if masked else None,
        num_chunks=num_chunks,
        epsilon=EPSILON,
    )
    expected, mean, var = expected_norm(x, scale, bias, sampler, mask, num_chunks)
    assert y.dtype == dtype
    assert_close(y[mask[..., 0]], expected[mask[..., 0]], dtype, num=x.size)
    assert_close(statistics.mean, mean, dtype, num=x.size)
    assert_close(statistics.var, var, dtype, num=x.size)


def test_features_are_where_axis_says():
    x = cases.inputs((6, 5, 4))
    y, statistics = norm(x, axis=1, epsilon=EPSILON)
    expected, mean, _ = expected_norm(np.moveaxis(np.asarray(x), 1, -1))
    assert_close(y, np.moveaxis(expected, -1, 1), num=x.size)
    assert_close(statistics.mean, mean, num=x.size)


def test_half_precision_is_measured_in_float32():
    x = cases.inputs((64, 8, 2), "bfloat16")
    y, statistics = norm(x)
    assert (y.dtype, statistics.var.dtype) == ("bfloat16", "float32")
    _, expected = expected_moments(np.asarray(x).reshape(-1, 2), epsilon=1e-5)
    assert_close(statistics.var, expected, num=x.size)


def test_the_gradient_goes_through_the_extremes(x64):
    x = cases.inputs(SHAPE, "float64")
    mask = np.arange(8).reshape(-1, 1, 1, 1) != 6
    options = {"sampler": cases.SAMPLERS["NS"], "num_chunks": 3}

    def loss(x):
        y, _ = range_batch_norm(x, mask=mask, **options)
        return jnp.sin(y).sum()

    check_grads(jax.jit(loss), (x,), 1, "rev")


# The ratio that the docstring names.
@pytest.mark.parametrize(
    ("n", "ratio"),
    [(2, 0.52), (8, 0.75), (32, 0.85), (128, 0.90), (1024, 0.94), (16384, 0.97)],
)
def test_of_normal_values_it_is_less_than_the_deviation(n, ratio):
    x = 5 + 3 * np.random.default_rng(0).standard_normal((2**20, 1), "float32")
    statistics = norm(x, num_chunks=len(x) // n, epsilon=0.0)[1]
    found = float(jnp.sqrt(statistics.var)[0]) / 3
    # The expected range of n values, integrated.
    t = np.linspace(-9, 9, 10_001)
    below = np.array([NormalDist().cdf(each) for each in t])
    exact = factor(n) * ((1 - below**n - (1 - below) ** n) * (t[1] - t[0])).sum()
    np.testing.assert_allclose(found, exact, rtol=0.01)
    np.testing.assert_allclose(exact, ratio, atol=0.005)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-8])
def test_features_that_do_not_vary_stay_finite(epsilon):
    x = np.broadcast_to(np.float32([0.0, 8.0, 1e-6]), (8, 4, 3))
    running = sbn.Statistics(jnp.zeros(3), jnp.ones(3))

    @unfolded.quick_jit
    def step(x, running):
        options = {"running": running, "epsilon": epsilon}
        y, pullback, statistics = jax.vjp(
            lambda x: range_batch_norm(x, **options), x, has_aux=True
        )
        running = sbn.update_running(running, statistics, 0.5, std_epsilon=epsilon)
        return running, (y, pullback(jnp.ones_like(y)))

    for _ in range(100):
        running, found = step(x, running)
        for array in (*running, *found):
            assert np.isfinite(array).all()


def test_a_feature_without_a_chunk_to_measure_has_the_running_statistics():
    x = jnp.where(jnp.arange(3) == 0, jnp.nan, cases.inputs((32, 3)))
    mask = np.ones((32, 3), bool)
    mask[:, 0] = False
    mask[:, 1] = np.arange(32) % 4 == 0  # one value in every second chunk of two
    running = sbn.Statistics(jnp.array([3.0, 4.0, 0.0]), jnp.array([2.0, 5.0, 1.0]))

    @unfolded.quick_jit
    def step(x):
        def loss(x):
            options = {"mask": mask, "running": running, "epsilon": EPSILON}
            y, statistics = range_batch_norm(x, **options)
            return jnp.where(mask, y, 0).sum(), statistics

        return jax.grad(loss, has_aux=True)(x)

    dx, statistics = step(x)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(statistics.mean[:2], [3.0, 4.0])
    np.testing.assert_array_equal(statistics.var[:2], [2.0, 5.0])
    mean, var = expected_moments(x[:, 2:])
    assert_close(statistics.mean[2:], mean, num=32)
    assert_close(statistics.var[2:], var, num=32)


def test_devices_pool_as_parts_of_a_sample():
    x = cases.inputs((2, 8, 3))
    pooled = functools.partial(range_batch_norm, axis_name="device", epsilon=EPSILON)
    _, statistics = unfolded.quick_jit(jax.vmap(pooled, axis_name="device"))(x)
    mean, var = reference.mix([expected_moments(each) for each in x], [0.5, 0.5])
    for i in range(2):
        assert_close(statistics.mean[i], mean, num=x.size)
        assert_close(statistics.var[i], var, num=x.size)


@pytest.mark.parametrize(
    ("shape", "call", "error", "given", "fix"),
    [
        ((1, 3), range_batch_norm, ValueError, "got 1 values", "more images"),
        (
            (8, 3),
            functools.partial(range_batch_norm, num_chunks=0),
            ValueError,
            "num_chunks=0",
            "num_chunks >= 1",
        ),
        (
            (8, 3),
            lambda x: range_moments(1j * x, (0,)),
            TypeError,
            "dtype=complex64",
            "BatchNorm takes complex ones",
        ),
    ],
)
def test_what_has_no_range_is_refused(shape, call, error, given, fix):
    teaching.message_while_tracing(shape, call, error, given, fix)


OPTIONS = {
    "all": {},
    "sample": {"sampler": sbn.NaiveSampling(3)},
    "ghost": {"ghost_groups": 2},
}


def expected_training(steps, options, momentum, num_chunks):
    """Outputs and running statistics, of the average of ``s``, after each step."""
    running_mean, running_std = np.zeros(2), np.full(2, np.sqrt(1 + EPSILON))
    for x in steps:
        groups = np.split(reference.wide(x), options.get("ghost_groups", 1))
        sampler = options.get("sampler")
        found = [
            expected_norm(group, sampler=sampler, num_chunks=num_chunks)
            for group in groups
        ]
        outputs, means, variances = zip(*found, strict=True)
        mean, std = np.mean(means, 0), np.sqrt(np.mean(variances, 0) + EPSILON)
        running_mean = reference.running(running_mean, mean, momentum)
        running_std = reference.running(running_std, std, momentum)
        yield np.concatenate(outputs), running_mean, running_std**2 - EPSILON


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_train_and_evaluate(api, name):
    steps = [cases.inputs(SHAPE, seed=i) for i in range(3)]
    options = {"num_chunks": 5, "momentum": 0.8, "epsilon": EPSILON, **OPTIONS[name]}
    if api == "linen":
        layer = sbn.linen.RangeBatchNorm(**options)
        state = layer.init(KEY, jnp.zeros((1, 2)), use_running_average=False)
        apply = functools.partial(layer.apply, mutable=["batch_stats"])
        step = unfolded.quick_jit(functools.partial(apply, use_running_average=False))

        def train(x):
            y, updates = step(state, x)
            state.update(updates)
            return y, *(updates["batch_stats"][key] for key in ("mean", "var"))

        def evaluate(x):
            return layer.apply(state, x, True)
    else:
        layer = sbn.nnx.RangeBatchNorm(2, **options, rngs=nnx.Rngs(0))
        step = nnx.jit(lambda layer, x: layer(x))

        def train(x):
            y = step(layer, x)
            return y, layer.mean[...], layer.var[...]

        def evaluate(x):
            layer.eval()
            return layer(x)

    training = expected_training(steps, OPTIONS[name], 0.8, 5)
    for x, expected in zip(steps, training, strict=True):
        for found, wanted in zip(train(x), expected, strict=True):
            assert_close(found, wanted, num=x.size)
    _, mean, var = expected
    wanted = reference.normalize(x, mean, var, 1.0, 0.0, EPSILON)
    assert_close(evaluate(x), wanted, num=x.size)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_it_is_the_norm_of_a_folded_layer(api):
    x = cases.inputs((8, 5, 5, 3))
    options = {"sampler": sbn.NaiveSampling(3), "momentum": 0.8, "epsilon": EPSILON}
    if api == "linen":
        norm_cls = functools.partial(sbn.linen.RangeBatchNorm, num_chunks=5)
        layer = sbn.linen.ConvNorm(2, (3, 3), norm_cls=norm_cls, **options)
        train = layer.clone(use_running_average=False)
        state = unfolded.quick_jit(train.init)(KEY, x)
        apply = functools.partial(train.apply, mutable=["batch_stats"])
        y, updates = unfolded.quick_jit(apply)(state, x)
        kernel, found = state["params"]["conv"]["kernel"], updates["batch_stats"]
        found = sbn.Statistics(**found["norm"])
        evaluated = layer.apply({**state, **updates}, x, use_running_average=True)
    else:
        norm_cls = functools.partial(sbn.nnx.RangeBatchNorm, num_chunks=5)
        rngs = nnx.Rngs(0)
        layer = sbn.nnx.ConvNorm(3, 2, (3, 3), norm_cls=norm_cls, **options, rngs=rngs)
        step = nnx.jit(lambda layer, x: layer(x))
        kernel, y = layer.conv.kernel[...], step(layer, x)
        found = sbn.Statistics(layer.norm.mean[...], layer.norm.var[...])
        layer.eval()
        evaluated = step(layer, x)
    values = unfolded.conv(x, kernel)
    sampled = {"sampler": options["sampler"]}
    [(expected, mean, var)] = expected_training([values], sampled, 0.8, 5)
    assert_close(y, expected, num=x.size)
    assert_close(found.mean, mean, num=x.size)
    assert_close(found.var, var, num=x.size)
    wanted = reference.normalize(values, mean, var, 1.0, 0.0, EPSILON)
    assert_close(evaluated, wanted, num=x.size)
