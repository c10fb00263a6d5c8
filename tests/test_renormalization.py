"""Statistics moved towards the running ones: against the reference, and at limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from tests import cases, reference, samples, unfolded
from tests.closeness import assert_close
from tests.samples import KEY

SHAPE = (8, 4, 3, 2)
RUNNING = sbn.Statistics(jnp.array([0.4, -1.5]), jnp.array([0.3, 2.5]))
SAMPLERS = {"all": None, **cases.SAMPLERS}
LIMITS = [(3.0, 5.0), (1.2, 0.1)]


def measured(x, sampler=None):
    return sbn.batch_statistics(x, sampler=sampler, key=KEY)


def normalized(x, sampler, scale=None, bias=None, **options):
    """Normalizes with what :func:`flax_sbn.renormalize` makes of a sample."""
    target = sbn.renormalize(measured(x, sampler), RUNNING, **options)
    return sbn.normalize(x, target, scale, bias)


@pytest.mark.parametrize(
    "case",
    cases.pairwise(name=list(SAMPLERS), weight=[0.3, 1.0], limits=LIMITS),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_value_and_gradients_are_those_of_batch_renormalization(case, x64):
    sampler, weight = SAMPLERS[case["name"]], case["weight"]
    r_max, d_max = case["limits"]
    x, g = (cases.inputs(SHAPE, "float64", seed=i) for i in range(2))
    scale, bias = cases.inputs((2, 2), "float64", seed=2)

    @jax.jit
    def run(x, scale, bias, g):
        limits = {"r_max": r_max, "d_max": d_max}
        y, pullback = jax.vjp(
            lambda x, *affine: normalized(
                x, sampler, *affine, running_weight=weight, **limits
            ),
            *(x, scale, bias),
        )
        return y, *pullback(g)

    moments = samples.moments(x, sampler)
    normal, r, d = reference.renormalized(x, moments, RUNNING, weight, r_max, d_max)
    if r_max < 3:
        assert (r != 1).all()
        assert (abs(d) <= d_max).all()
    y, dx, dscale, dbias = run(x, scale, bias, g)
    expected = np.asarray(scale) * normal + np.asarray(bias)
    assert_close(y, expected, "float64", num=x.size)
    shares = samples.shares(sampler, SHAPE)
    expected, _, _ = reference.backward(x, np.asarray(g) * r, shares, np.asarray(scale))
    assert_close(dx, expected, "float64", num=x.size)
    assert_close(dscale, (np.asarray(g) * normal).sum((0, 1, 2)), "float64", num=x.size)
    assert_close(dbias, np.asarray(g).sum((0, 1, 2)), "float64", num=x.size)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_gradient_holds_both_corrections_fixed(weight, x64):
    x = cases.inputs(SHAPE, "float64")
    sampler = sbn.BatchSampling(4)
    _, r, d = reference.renormalized(
        x, samples.moments(x, sampler), RUNNING, weight, 3.0, 5.0
    )

    def fixed(x):
        y, _ = sbn.batch_norm(x, sampler=sampler, key=KEY)
        return jnp.sin(y * r[None, None, None] + d[None, None, None]).sum()

    def ours(x):
        return jnp.sin(normalized(x, sampler, running_weight=weight)).sum()

    assert_close(ours(x), fixed(x), "float64", num=x.size)
    assert_close(jax.grad(ours)(x), jax.grad(fixed)(x), "float64", num=x.size)
    check_grads(fixed, (x,), 1, "rev")  # and that is the gradient


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_shift_and_a_scaling_of_everything_have_no_gradient(name, x64):
    x = cases.inputs(SHAPE, "float64")
    g = cases.inputs(SHAPE, "float64", seed=1)

    def loss(x):
        statistics = measured(x, SAMPLERS[name])
        options = {"running_weight": 0.75, "epsilon": 0.0}
        target = sbn.renormalize(statistics, RUNNING, **options)
        return (g * sbn.normalize(x, target, epsilon=0.0)).sum()

    dx = np.asarray(jax.jit(jax.grad(loss))(x))
    assert_close(dx.mean((0, 1, 2)), np.zeros(2), "float64", num=x.size)
    assert_close(
        (dx * np.asarray(x)).mean((0, 1, 2)), np.zeros(2), "float64", num=x.size
    )


def test_all_weight_on_the_running_statistics_trains_as_it_evaluates():
    x = cases.inputs(SHAPE)
    limits = {"r_max": float("inf"), "d_max": float("inf")}
    y = normalized(x, sbn.BatchSampling(2), running_weight=1.0, **limits)
    assert_close(y, np.asarray(sbn.normalize(x, RUNNING)))


def test_no_weight_leaves_the_statistics_as_they_are():
    statistics = measured(cases.inputs(SHAPE))
    assert sbn.renormalize(statistics, None, running_weight=0) is statistics
    traced = jax.jit(sbn.renormalize)(statistics, RUNNING, running_weight=0.0)
    assert_close(traced.mean, np.asarray(statistics.mean))
    assert_close(traced.var, np.asarray(statistics.var))


def test_the_weight_reduces_the_noise_of_a_sample():
    x = jax.random.normal(KEY, (256, 8, 8, 1))
    exact = measured(x)

    def errors(key, weight):
        sample = sbn.batch_statistics(x, sampler=sbn.BatchSampling(2), key=key)
        target = sbn.renormalize(sample, exact, running_weight=weight)
        return jnp.stack(target) - jnp.stack(exact)

    keys = jax.random.split(KEY, 256)
    noise = [
        np.square(jax.vmap(lambda key, w=weight: errors(key, w))(keys)).mean(0)
        for weight in (0.0, 0.5, 0.75)
    ]
    np.testing.assert_allclose(noise[1], noise[0] / 4, rtol=1e-3)
    np.testing.assert_allclose(noise[2], noise[0] / 16, rtol=1e-3)


@pytest.mark.parametrize("mean", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("std", [0.01, 1.0, 1e3])
def test_running_statistics_that_know_nothing_do_little_harm(mean, std, x64):
    x = mean + std * jax.random.normal(KEY, (32, 8, 8, 3), "float64")
    fresh = sbn.Statistics(jnp.zeros(3), jnp.ones(3))
    y, _ = sbn.batch_norm(x, running=fresh, running_weight=0.75)
    exact, _ = sbn.batch_norm(x)
    r = y.std((0, 1, 2)) / exact.std((0, 1, 2))
    assert ((r > 1 / 3.0001) & (r < 3.0001)).all()
    assert (abs(y.mean((0, 1, 2))) < 5.0001).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_constant_features_stay_finite(dtype, fill):
    x = jnp.full((8, 4, 3), fill, dtype)

    def loss(x):
        y, _ = sbn.batch_norm(
            x,
            sampler=sbn.BatchSampling(2),
            key=KEY,
            running=sbn.Statistics(jnp.zeros(3), jnp.ones(3)),
            running_weight=0.75,
        )
        return jnp.abs(y).astype("float32").sum()

    assert np.isfinite(jax.grad(loss)(x)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["BS", "FS", "FS+VDN", "VDN", "lattice"])
def test_folding_changes_nothing(name, dtype, x64):
    x = cases.inputs((8, 6, 6, 3), dtype)
    kernel = cases.inputs((3, 3, 3, 2), dtype, seed=1)
    scale, bias = cases.inputs((2, 2), dtype, seed=2)
    options = {
        "sampler": cases.SAMPLERS[name],
        "key": KEY,
        "running": RUNNING,
        "running_weight": 0.6,
    }

    def folded(x, kernel, scale, bias):
        return sbn.conv_norm(x, kernel, scale, bias, **options)

    def apart(x, kernel, scale, bias):
        return sbn.batch_norm(unfolded.conv(x, kernel), scale, bias, **options)

    given = {"x": x, "kernel": kernel, "scale": scale, "bias": bias}
    shapes = jax.eval_shape(folded, **given)
    cotangents = jax.tree.map(lambda y: cases.inputs(y.shape, dtype, seed=3), shapes)
    actual, expected = unfolded.quick_jit(
        lambda given: tuple(
            unfolded.value_and_gradients(function, given, cotangents)
            for function in (folded, apart)
        )
    )(given)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, np.asarray(e), dtype, num=x.size)


LINEN = {
    "BatchNorm": sbn.linen.BatchNorm,
    "ConvNorm": functools.partial(sbn.linen.ConvNorm, 2, (1, 1)),
    "DenseNorm": functools.partial(sbn.linen.DenseNorm, 2),
}
NNX = {
    "BatchNorm": functools.partial(sbn.nnx.BatchNorm, 2, rngs=nnx.Rngs(0)),
    "ConvNorm": functools.partial(sbn.nnx.ConvNorm, 2, 2, (1, 1), rngs=nnx.Rngs(0)),
    "DenseNorm": functools.partial(sbn.nnx.DenseNorm, 2, 2, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("sampler", [None, sbn.NaiveSampling(3)], ids=str)
@pytest.mark.parametrize("layer", list(LINEN))
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_normalize_with_moved_and_remember_measured_statistics(
    api, layer, sampler
):
    x = cases.inputs(SHAPE)
    linear = "conv" if layer == "ConvNorm" else "dense"
    options = {"sampler": sampler, "running_weight": 0.6, "momentum": 0.8}
    if api == "linen":
        module = LINEN[layer](use_running_average=False, **options)
        variables = module.init(KEY, x)
        kernel = variables["params"].get(linear, {}).get("kernel")
        y, updates = module.apply(variables, x, mutable=["batch_stats"])
        found = updates["batch_stats"]
        found = sbn.Statistics(**(found if layer == "BatchNorm" else found["norm"]))
    else:
        module = NNX[layer](**options)
        norm = module if layer == "BatchNorm" else module.norm
        kernel = None if layer == "BatchNorm" else getattr(module, linear).kernel[...]
        y = module(x)
        found = sbn.Statistics(norm.mean[...], norm.var[...])

    values = x if kernel is None else x @ kernel.reshape(2, 2)
    moments = samples.moments(values, sampler)
    fresh = (np.zeros(2), np.ones(2))
    expected, _, _ = reference.renormalized(values, moments, fresh, 0.6, 3.0, 5.0)
    assert_close(y, expected, num=x.size)
    for new, old, statistic in zip(found, fresh, moments, strict=True):
        assert_close(new, reference.running(old, statistic, 0.8), num=x.size)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"running_weight": 1.5}, "running_weight"),
        ({"running_weight": -0.1}, "running_weight"),
        ({"running_weight": float("nan")}, "running_weight"),
        ({"r_max": 0.5}, "r_max"),
        ({"d_max": -1.0}, "d_max"),
    ],
)
def test_values_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=f"Expected {name} in"):
        sbn.renormalize(measured(cases.inputs(SHAPE)), RUNNING, **options)


def test_a_weight_needs_running_statistics():
    with pytest.raises(ValueError, match="Expected running statistics"):
        sbn.batch_norm(cases.inputs(SHAPE), running_weight=0.5)


@pytest.mark.parametrize("layer", list(LINEN))
def test_layers_refuse_a_weight_out_of_range(layer):
    x = cases.inputs(SHAPE)
    module = LINEN[layer](use_running_average=False, running_weight=2.0)
    variables = module.init(KEY, x)
    with pytest.raises(ValueError, match="Expected running_weight in"):
        module.apply(variables, x, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="Expected running_weight in"):
        NNX[layer](running_weight=2.0)(x)
