"""L1-norm batch norm: against its equation, at its limits, and as layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives import l1_batch_norm, l1_moments
from tests import cases, reference, samples, teaching, unfolded
from tests.closeness import assert_close
from tests.samples import KEY

EPSILON = 1e-2  # large, so that its place matters
SHAPE = (8, 4, 3, 2)
STATIC = ("sampler", "axis", "epsilon")
norm = unfolded.quick_jit(l1_batch_norm, static_argnames=STATIC)


def expected_moments(x, where=None, epsilon=EPSILON):
    """Mean, and ``s ** 2 - epsilon``, of the values of each feature."""
    x = reference.wide(x)
    where = np.ones(x.shape, bool) if where is None else where
    num = where.sum(reference.over(x))
    mean = np.where(where, x, 0).sum(reference.over(x)) / num
    absolute = np.where(where, abs(x - mean), 0).sum(reference.over(x)) / num
    return mean, (np.sqrt(np.pi / 2) * absolute + epsilon) ** 2 - epsilon


def expected_norm(x, scale=1.0, bias=0.0, sampler=None, mask=True):
    """Output and statistics; the parts of a sample mix as mean and variance."""
    wheres, weights = samples.measured(sampler, x.shape[:-1])
    wheres = [np.broadcast_to(where[..., None] & mask, x.shape) for where in wheres]
    parts = [expected_moments(x, where) for where in wheres]
    mean, var = reference.mix(parts, weights)
    return reference.normalize(x, mean, var, scale, bias, EPSILON), mean, var


@pytest.mark.parametrize(
    ("name", "masked", "dtype"),
    [
        ("all", False, "float32"),
        ("all", True, "float64"),
        ("NS", False, "float64"),
        ("BS+VDN", True, "float32"),
    ],
)
def test_values_are_those_of_the_equation(name, masked, dtype, x64):
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
        epsilon=EPSILON,
    )
    expected, mean, var = expected_norm(x, scale, bias, sampler, mask)
    assert y.dtype == dtype
    expected = np.where(mask, expected, np.nan) if masked else expected
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
    expected, _ = expected_moments(x, epsilon=1e-5)
    assert_close(statistics.mean, expected, num=x.size)


def test_the_gradient_is_that_of_the_equation(x64):
    x, g = (cases.inputs(SHAPE, "float64", seed=i) for i in range(2))
    scale, bias = cases.inputs((2, 2), "float64", seed=2)

    @unfolded.quick_jit
    def gradients(*given):
        def output(*given):
            return l1_batch_norm(*given, epsilon=EPSILON)[0]

        return jax.vjp(output, *given)[1](g)

    dx, dscale, dbias = gradients(x, scale, bias)
    x, g = map(reference.wide, (x, g))
    mean, var = expected_moments(x)
    std, sign = np.sqrt(var + EPSILON), np.sign(x - mean)
    normal, axes = (x - mean) / std, (0, 1, 2)
    slope = np.sqrt(np.pi / 2) * (sign - sign.mean(axes)) / sign[..., 0].size
    expected = g - g.mean(axes) - (g * normal).sum(axes) * slope
    assert_close(dx, np.asarray(scale) / std * expected, "float64", num=x.size)
    assert_close(dscale, (g * normal).sum(axes), "float64", num=x.size)
    assert_close(dbias, g.sum(axes), "float64", num=x.size)


def test_the_gradient_goes_through_the_sample(x64):
    x = cases.inputs(SHAPE, "float64")
    mask = np.arange(8).reshape(-1, 1, 1, 1) != 6

    def loss(x):
        options = {"sampler": cases.SAMPLERS["NS"], "mask": mask}
        return jnp.sin(l1_batch_norm(x, **options)[0]).sum()

    check_grads(jax.jit(loss), (x,), 1, "rev")


def test_normal_values_are_normalized_as_by_batch_norm():
    x = 5 + 3 * np.random.default_rng(0).standard_normal((100_000, 2), "float32")
    np.testing.assert_allclose(norm(x)[1].var, x.var(0), rtol=0.01)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-8])
def test_features_that_do_not_vary_stay_finite(epsilon):
    x = np.broadcast_to(np.float32([0.0, 8.0, 1e-6]), (8, 4, 3))
    running = sbn.Statistics(jnp.zeros(3), jnp.ones(3))

    @unfolded.quick_jit
    def step(x, running):
        options = {"running": running, "epsilon": epsilon}
        y, pullback, statistics = jax.vjp(
            lambda x: l1_batch_norm(x, **options), x, has_aux=True
        )
        running = sbn.update_running(running, statistics, 0.5, std_epsilon=epsilon)
        evaluated = sbn.normalize(x, running, epsilon=epsilon)
        return running, (y, pullback(jnp.ones_like(y)), evaluated)

    for _ in range(100):
        running, found = step(x, running)
        for array in (*running, *found):
            assert np.isfinite(array).all()
    std = np.sqrt(running.var + np.float32(epsilon))
    least = max(epsilon, (1e-5 * epsilon) ** 0.5)
    np.testing.assert_allclose(std, least, rtol=0.01)


def test_the_spread_is_exact_beside_a_large_mean():
    x = 1000 + np.random.default_rng(0).standard_normal((4096, 2), "float32")
    _, var = expected_moments(x, epsilon=1e-5)
    np.testing.assert_allclose(norm(x)[1].var, var, rtol=1e-4)


def test_a_feature_without_measured_values_has_the_running_statistics():
    x = np.array(cases.inputs((4, 2)))
    x[:, 0] = np.nan
    running = sbn.Statistics(jnp.array([3.0, 0.0]), jnp.array([2.0, 1.0]))
    mask = jnp.array([False, True])
    _, statistics = norm(x, mask=mask, running=running, epsilon=EPSILON)
    assert (statistics.mean[0], statistics.var[0]) == (3.0, 2.0)
    mean, var = expected_moments(x[:, 1:])
    assert_close(statistics.mean[1:], mean)
    assert_close(statistics.var[1:], var)


def test_devices_pool_as_parts_of_a_sample():
    x = cases.inputs((2, 8, 3))
    pooled = functools.partial(l1_batch_norm, axis_name="device", epsilon=EPSILON)
    _, statistics = unfolded.quick_jit(jax.vmap(pooled, axis_name="device"))(x)
    mean, var = reference.mix([expected_moments(each) for each in x], [0.5, 0.5])
    for i in range(2):
        assert_close(statistics.mean[i], mean, num=x.size)
        assert_close(statistics.var[i], var, num=x.size)


def test_complex_values_are_refused():
    for call in (l1_batch_norm, functools.partial(l1_moments, axes=(0,))):
        teaching.message_while_tracing(
            (8, 3),
            lambda x, call=call: call(1j * x),
            TypeError,
            "dtype=complex64",
            "BatchNorm takes complex ones",
        )


OPTIONS = {
    "all": {},
    "sample": {"sampler": sbn.NaiveSampling(3)},
    "ghost": {"ghost_groups": 2},
}


def expected_training(steps, options, momentum):
    """Outputs and running statistics, of the average of ``s``, after each step."""
    running_mean, running_std = np.zeros(2), np.full(2, np.sqrt(1 + EPSILON))
    for x in steps:
        groups = np.split(reference.wide(x), options.get("ghost_groups", 1))
        sampler = options.get("sampler")
        found = [expected_norm(group, sampler=sampler) for group in groups]
        outputs, means, variances = zip(*found, strict=True)
        mean, std = np.mean(means, 0), np.sqrt(np.mean(variances, 0) + EPSILON)
        running_mean = reference.running(running_mean, mean, momentum)
        running_std = reference.running(running_std, std, momentum)
        yield np.concatenate(outputs), running_mean, running_std**2 - EPSILON


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_train_and_evaluate(api, name):
    steps = [cases.inputs(SHAPE, seed=i) for i in range(3)]
    options = {"momentum": 0.8, "epsilon": EPSILON, **OPTIONS[name]}
    if api == "linen":
        layer = sbn.linen.L1BatchNorm(**options)
        state = layer.init(KEY, jnp.zeros((1, *SHAPE[1:])), use_running_average=False)
        apply = functools.partial(layer.apply, mutable=["batch_stats"])
        step = unfolded.quick_jit(functools.partial(apply, use_running_average=False))

        def train(x):
            y, updates = step(state, x)
            state.update(updates)
            return y, *(updates["batch_stats"][key] for key in ("mean", "var"))

        def evaluate(x):
            return layer.apply(state, x, True)
    else:
        layer = sbn.nnx.L1BatchNorm(2, **options, rngs=nnx.Rngs(0))
        step = nnx.jit(lambda layer, x: layer(x))

        def train(x):
            y = step(layer, x)
            return y, layer.mean[...], layer.var[...]

        def evaluate(x):
            layer.eval()
            return layer(x)

    for x, expected in zip(
        steps, expected_training(steps, OPTIONS[name], 0.8), strict=True
    ):
        for found, wanted in zip(train(x), expected, strict=True):
            assert_close(found, wanted, num=x.size)
    _, mean, var = expected
    wanted = reference.normalize(x, mean, var, 1.0, 0.0, EPSILON)
    assert_close(evaluate(x), wanted, num=x.size)


@pytest.mark.parametrize("name", ["FS", "lattice"])
def test_folding_changes_neither_value_nor_gradient(name, x64):
    x = cases.inputs((8, 5, 5, 3), "float64")
    kernel = cases.inputs((3, 3, 3, 2), "float64", seed=1)
    scale, bias = cases.inputs((2, 2), "float64", seed=2)
    options = {"sampler": cases.SAMPLERS[name], "key": KEY}
    measure = functools.partial(l1_moments, epsilon=1e-5)

    def folded(x, kernel, scale, bias):
        return sbn.conv_norm(x, kernel, scale, bias, measure=measure, **options)

    def apart(x, kernel, scale, bias):
        return l1_batch_norm(unfolded.conv(x, kernel), scale, bias, **options)

    given = {"x": x, "kernel": kernel, "scale": scale, "bias": bias}
    shapes = jax.eval_shape(folded, **given)
    cotangents = jax.tree.map(
        lambda y: cases.inputs(y.shape, "float64", seed=3), shapes
    )
    actual, wanted = (
        unfolded.quick_jit(functools.partial(unfolded.value_and_gradients, function))(
            given, cotangents
        )
        for function in (folded, apart)
    )
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert_close(a, np.asarray(w), "float64", num=x.size)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_it_is_the_norm_of_a_folded_layer(api):
    x = cases.inputs((8, 5, 5, 3))
    options = {"sampler": sbn.NaiveSampling(3), "momentum": 0.8, "epsilon": EPSILON}
    if api == "linen":
        layer = sbn.linen.ConvNorm(2, (3, 3), norm_cls=sbn.linen.L1BatchNorm, **options)
        train = layer.clone(use_running_average=False)
        state = unfolded.quick_jit(train.init)(KEY, x)
        apply = functools.partial(train.apply, mutable=["batch_stats"])
        y, updates = unfolded.quick_jit(apply)(state, x)
        kernel, found = state["params"]["conv"]["kernel"], updates["batch_stats"]
        found = sbn.Statistics(**found["norm"])
        evaluated = layer.apply({**state, **updates}, x, use_running_average=True)
    else:
        layer = sbn.nnx.ConvNorm(
            3, 2, (3, 3), norm_cls=sbn.nnx.L1BatchNorm, **options, rngs=nnx.Rngs(0)
        )
        step = nnx.jit(lambda layer, x: layer(x))
        kernel, y = layer.conv.kernel[...], step(layer, x)
        found = sbn.Statistics(layer.norm.mean[...], layer.norm.var[...])
        layer.eval()
        evaluated = step(layer, x)
    values = unfolded.conv(x, kernel)
    sampled = {"sampler": options["sampler"]}
    [(expected, mean, var)] = expected_training([values], sampled, 0.8)
    assert_close(y, expected, num=x.size)
    assert_close(found.mean, mean, num=x.size)
    assert_close(found.var, var, num=x.size)
    wanted = reference.normalize(values, mean, var, 1.0, 0.0, EPSILON)
    assert_close(evaluated, wanted, num=x.size)
