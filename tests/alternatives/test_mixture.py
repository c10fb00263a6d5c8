"""Mixture normalization against its equations; modes found, kept apart and pooled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from flax_sbn.alternatives.mixture import (
    Mixture,
    initial_mixture,
    mixture_norm,
    mixture_normalize,
)
from flax_sbn.linen import mixture as linen
from flax_sbn.nnx import mixture as nnx_layers
from tests import cases
from tests.closeness import assert_close
from tests.devices import mesh
from tests.samples import KEY
from tests.teaching import message_while_tracing

EPSILON = 1e-5


def floored(weight):
    """The least that a weight counts as."""
    return np.maximum(weight, 0.1 / len(weight))


def posteriors(points, weight, mean, var):
    """Share of each component in each point, (M, K)."""
    squares = (points[:, None] - mean) ** 2 / (var + EPSILON)
    logs = np.log(floored(weight)) - (squares + np.log(var + EPSILON)).sum(-1) / 2
    densities = np.exp(logs - logs.max(1, keepdims=True))
    return densities / densities.sum(1, keepdims=True)


def moments(points, shares):
    """The mixture that posteriors make of the points."""
    num = shares.sum(0)[:, None]
    mean = shares.T @ points / num
    squares = (shares.T[..., None] * (points - mean[:, None]) ** 2).sum(1)
    var = (squares + 0.01 * points.var(0)) / (num + 0.01)
    return num[:, 0] / num.sum(), mean, var


def summed(points, shares, weight, mean, var):
    """The normalized points."""
    parts = (points - mean[:, None]) / np.sqrt(var + EPSILON)[:, None]
    return ((shares / np.sqrt(floored(weight))).T[..., None] * parts).sum(0)


def backward(points, g, shares, weight, mean, var):
    """Gradient of the points, with constant posteriors."""
    num, std = shares.sum(0)[:, None], np.sqrt(var + EPSILON)
    of_part = (shares / np.sqrt(floored(weight))).T[..., None] * g / std[:, None]
    away = points - mean[:, None]
    of_mean = -of_part.sum(1)
    of_squares = -(of_part * away).sum(1) / (2 * std**2) / (num + 0.01)
    through = (of_mean / num)[:, None] + 2 * of_squares[:, None] * away
    of_whole = 0.02 * of_squares.sum(0) * (points - points.mean(0)) / len(points)
    return (of_part + shares.T[..., None] * through).sum(0) + of_whole


def reference(x, start, num_steps=2):
    """Normalized points, the last posteriors and the mixture."""
    points = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    mixture = start
    for _ in range(num_steps):
        shares = posteriors(points, *mixture)
        mixture = moments(points, shares)
    return summed(points, shares, *mixture), shares, mixture


def arrays(mixture):
    """Weight, mean and var in float64."""
    return [np.asarray(a, np.float64) for a in mixture[1:]]


def given(num_components, num_features, dtype="float32"):
    """Returns a running mixture of components that overlap, after some steps."""
    shape = (num_components, num_features)
    weight = np.arange(1.0, 1 + num_components)
    return Mixture(
        jnp.array(3, jnp.int32),
        jnp.asarray(weight / weight.sum(), dtype),
        cases.inputs(shape, dtype, seed=11),
        0.5 + jnp.abs(cases.inputs(shape, dtype, seed=12)),
    )


def two_modes(num=96, num_features=3, distance=20.0, seed=0):
    """Returns points, two thirds of them about zero, and which are not."""
    x = np.random.default_rng(seed).standard_normal((num, num_features))
    far = np.arange(num) % 3 == 0
    return jnp.asarray(x + distance * far[:, None], "float32"), far


@jax.jit
def compiled(x, running, momentum, mask):
    """One program for many tests."""
    return mixture_norm(x, running=running, momentum=momentum, mask=mask)


def norm(x, running, momentum=0.99, mask=None):
    """Calls the function, compiled."""
    return compiled(x, running, momentum, mask)


@pytest.mark.parametrize(
    ("shape", "num_components", "num_steps"),
    [((24, 2), 2, 1), ((4, 5, 3), 1, 2), ((3, 2, 4, 5), 4, 3)],
)
def test_value_gradient_and_running_mixture_are_the_equations(
    shape, num_components, num_steps, x64
):
    x, g = (cases.inputs(shape, "float64", seed=i) for i in range(2))
    scale, bias = cases.inputs((2, shape[-1]), "float64", seed=2)
    running = given(num_components, shape[-1], "float64")

    @jax.jit
    def value_and_gradients(x, scale, bias):
        def call(x, scale, bias):
            return mixture_norm(
                x, scale, bias, running=running, num_steps=num_steps, momentum=0.8
            )

        y, pullback, updated = jax.vjp(call, x, scale, bias, has_aux=True)
        return y, updated, pullback(g)

    y, updated, (dx, dscale, dbias) = value_and_gradients(x, scale, bias)
    normal, shares, fitted = reference(x, arrays(running), num_steps)
    points, through = (
        np.reshape(np.asarray(a), normal.shape)
        for a in (x, np.asarray(g) * np.asarray(scale))
    )
    of_points = backward(points, through, shares, *fitted)
    normal = normal.reshape(shape)
    close = functools.partial(assert_close, dtype="float64", num=x.size)
    close(y, np.asarray(scale) * normal + np.asarray(bias))
    close(dx, of_points.reshape(shape))
    over = tuple(range(x.ndim - 1))
    close(dscale, (np.asarray(g) * normal).sum(over))
    close(dbias, np.asarray(g).sum(over))
    assert int(updated.step) == 4
    for new, old, batch in zip(updated[1:], arrays(running), fitted, strict=True):
        close(new, 0.8 * old + 0.2 * batch)


@pytest.mark.parametrize(("axis", "masked"), [(1, True), ((1, 2), False)])
def test_one_component_is_batch_norm(axis, masked, x64):
    x, g = (cases.inputs((6, 4, 3), "float64", seed=i) for i in range(2))
    mask = jnp.arange(6)[:, None, None] < 4 if masked else None
    axes = sbn.statistics.reduction_axes(3, axis)
    features = tuple(n for a, n in enumerate(x.shape) if a not in axes)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(call):
        y, pullback, state = jax.vjp(call, x, has_aux=True)
        return y, *pullback(g), state

    def mixture(x):
        running = initial_mixture(1, features)
        return mixture_norm(x, running=running, axis=axis, mask=mask)

    def batch(x):
        return sbn.batch_norm(x, axis=axis, mask=mask)

    *found, running = value_and_gradient(mixture)
    *expected, statistics = value_and_gradient(batch)
    for actual, e in zip(found, expected, strict=True):
        assert_close(actual, np.asarray(e), "float64", num=x.size)
    assert running.mean.dtype == "float32"
    assert_close(running.mean[0], np.asarray(statistics.mean), num=x.size)
    assert_close(running.var[0], np.asarray(statistics.var), num=x.size)


def test_the_first_batch_finds_its_modes():
    x, far = two_modes()
    y, running = norm(x, running=initial_mixture(2, (3,)))
    modes = [np.asarray(x)[which].mean(0) for which in (~far, far)]
    order = np.argsort(np.asarray(running.mean)[:, 0])
    assert_close(running.mean[order], np.stack(modes), num=x.size)
    assert_close(running.weight[order], np.array([2 / 3, 1 / 3]), num=96)
    for which, weight in ((~far, 2 / 3), (far, 1 / 3)):
        mode = np.asarray(y)[which]
        assert_close(mode.mean(0), np.zeros(3), num=x.size)
        np.testing.assert_allclose(mode.var(0) * weight, 1, rtol=0.05)


def test_components_keep_their_labels():
    _, running = norm(two_modes()[0], running=initial_mixture(2, (3,)))
    first = running
    for seed in range(1, 6):
        x, _ = two_modes(seed=seed)
        _, running = norm(x[::-1], running=running, momentum=0.5)
    assert int(running.step) == 6
    np.testing.assert_allclose(running.mean, first.mean, atol=0.5)
    assert_close(running.weight, np.asarray(first.weight))


def test_far_from_zero_nothing_is_lost():
    x = two_modes(distance=4.0)[0] + 1000
    _, running = norm(x, running=initial_mixture(2, (3,)))
    y, updated = norm(x, running=running, momentum=0.0)
    expected, _, fitted = reference(x, arrays(running))
    assert_close(updated.mean, fitted[1], num=96)
    # Means and squares are taken about the center of both modes.
    assert_close(updated.var, fitted[2], num=96, c=4 * (1 + 4.0**2))
    assert_close(y, expected, c=4 * 1000)  # the means' rounding


def test_masked_points_are_not_measured():
    x, _ = two_modes(distance=4.0)
    mask = jnp.arange(96)[:, None] < 60
    for running in (initial_mixture(2, (3,)), given(2, 3)):
        expected, expected_updated = norm(x[:60], running=running)
        for rest in (x[60:], jnp.nan):
            masked = x.at[60:].set(rest)
            y, updated = norm(masked, running=running, mask=mask)
            assert_close(y[:60], np.asarray(expected), num=x.size)
            for actual, e in zip(updated, expected_updated, strict=True):
                assert_close(actual, np.asarray(e), num=x.size)
            assert np.isnan(rest).all() or np.isfinite(y).all()


def test_without_points_the_running_mixture_stays():
    x, _ = two_modes()
    mask = jnp.zeros((96, 1), bool)
    for running in (initial_mixture(2, (3,)), given(2, 3)):
        y, updated = norm(x, running=running, mask=mask)
        assert np.isfinite(y).all()
        for new, old in zip(updated, running, strict=True):
            np.testing.assert_array_equal(new, old)


def gradients(x, g, running, axis_name=None):
    """Value and gradient of x, and the running mixture."""

    def call(x):
        return mixture_norm(x, running=running, axis_name=axis_name)

    y, pullback, updated = jax.vjp(call, x, has_aux=True)
    return y, *pullback(g), updated


@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
def test_devices_that_pool_fit_one_mixture(mapped):
    x, _ = two_modes(distance=4.0)
    x = x.reshape(16, 6, 3)
    g = cases.inputs(x.shape, seed=1)
    shape = (8, 2, 6, 3) if mapped == "vmap" else x.shape
    pooled = functools.partial(gradients, axis_name="data")
    if mapped == "vmap":
        pooled = jax.vmap(pooled, (0, 0, None), (0, 0, None), axis_name="data")
    else:
        specs = (P("data"), P("data"), P())
        pooled = jax.shard_map(pooled, mesh=mesh(), in_specs=specs, out_specs=specs)
    pooled, whole = jax.jit(pooled), jax.jit(gradients)
    for running in (initial_mixture(2, (3,)), given(2, 3)):
        *expected, expected_mixture = whole(x, g, running)
        *found, mixture = pooled(x.reshape(shape), g.reshape(shape), running)
        for actual, e in zip(found, expected, strict=True):
            assert_close(actual.reshape(x.shape), np.asarray(e), num=x.size)
        for actual, e in zip(mixture, expected_mixture, strict=True):
            assert_close(actual, np.asarray(e), num=x.size)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def gradient(x, running):
    """Gradient of x; value and running mixture; and evaluation."""
    y, updated = mixture_norm(x, running=running)
    evaluated = mixture_normalize(x, updated, dtype="float32")
    return jnp.sin(y.astype("float32")).sum(), (y, updated, evaluated)


@pytest.mark.parametrize(
    ("num", "dtype"), [(8, "float32"), (8, "bfloat16"), (1, "float16")]
)
def test_degenerate_batches_stay_finite(num, dtype):
    far = given(2, 3)._replace(mean=jnp.array([[0.0] * 3, [1e4] * 3]))
    lost = far._replace(weight=jnp.array([1.0, 0.0]), var=jnp.zeros((2, 3)))
    for scale in (0, 1e-4, 1, 3e3):
        x = (scale * cases.inputs((num, 3))).astype(dtype)
        for running in (initial_mixture(2, (3,)), far, lost):
            leaves = gradient(x, running)
            assert leaves[0].dtype == leaves[1][0].dtype == dtype
            for leaf in jax.tree.leaves(leaves):
                assert np.isfinite(np.asarray(leaf, "float32")).all()


def test_many_features_saturate_the_posteriors():
    x, far = two_modes(24, 2048, distance=3.0)
    result = gradient(x, initial_mixture(3, (2048,)))
    for leaf in jax.tree.leaves(result):
        assert np.isfinite(leaf).all()
    y, updated, _ = result[1]
    assert_close(updated.weight.sum(), np.array(1.0))
    assert_close(np.asarray(y)[far].mean(0), np.zeros(2048), num=y.size)


def test_a_component_without_points_keeps_its_mean_and_is_found_again():
    noise, far = jax.random.normal(KEY, (96, 3)), jnp.arange(96)[:, None] < 48
    running = Mixture(
        jnp.array(5, jnp.int32),
        jnp.array([0.5, 0.5]),
        jnp.array([[0.0] * 3, [20.0] * 3]),
        jnp.ones((2, 3)),
    )
    for _ in range(5):
        _, running = norm(noise, running=running, momentum=0.0)
    assert_close(running.mean[1], np.full(3, 20.0))
    assert_close(running.weight, np.array([1.0, 0.0]))
    _, running = norm(noise + 20 * far, running=running, momentum=0.0)
    assert_close(running.weight, np.array([0.5, 0.5]))


def test_posteriors_are_constants_in_the_gradient_of_evaluation():
    x, mixture = cases.inputs((6, 3), "float32"), given(2, 3)
    weight, mean, var = arrays(mixture)
    shares = posteriors(np.float64(x), weight, mean, var) / np.sqrt(floored(weight))
    expected = shares @ (1 / np.sqrt(var + EPSILON))
    gradient = jax.grad(lambda x: mixture_normalize(x, mixture, epsilon=EPSILON).sum())(
        x
    )
    assert_close(gradient, expected)


def test_nothing_flows_into_the_running_mixture():
    x, _ = two_modes()

    @jax.jit
    @functools.partial(jax.grad, allow_int=True)
    def flow(running):
        y, updated = mixture_norm(x, running=running)
        return y.sum() + sum(u.sum() for u in updated)

    for leaf in flow(given(2, 3))[1:]:
        assert (leaf == 0).all()


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_call_the_functions(api):
    shape, options = (4, 5, 3), {"num_components": 2, "momentum": 0.7}
    running = initial_mixture(2, (3,))
    if api == "linen":
        layer = linen.MixtureNorm(**options)
        init = jax.jit(lambda x: layer.init_with_output(KEY, x, False))
        y, variables = init(jnp.zeros((1, 5, 3)))
        assert np.isfinite(y).all()
        assert int(variables["batch_stats"]["step"]) == 0

        @jax.jit
        def apply(variables, x, mask):
            return layer.apply(variables, x, False, mask=mask, mutable=["batch_stats"])
    else:
        module = nnx_layers.MixtureNorm(3, rngs=nnx.Rngs(0), **options)
        call = nnx.jit(lambda module, x, mask: module(x, mask=mask))

    mask = jnp.arange(4)[:, None, None] < 3
    for i in range(3):
        x = cases.inputs(shape, seed=i)
        expected, running = norm(x, running, 0.7, mask)
        if api == "linen":
            y, updates = apply(variables, x, mask)
            variables = {**variables, **updates}
            state = updates["batch_stats"]
        else:
            y = call(module, x, mask)
            state = {name: getattr(module, name) for name in Mixture._fields}
        assert_close(y, np.asarray(expected), num=x.size)
        for name, value in running._asdict().items():
            assert_close(state[name][...], np.asarray(value), num=x.size)
            assert state[name].dtype == value.dtype

    expected = jax.jit(mixture_normalize)(x, running)
    points = np.asarray(x, np.float64).reshape(-1, 3)
    by_hand = summed(points, posteriors(points, *arrays(running)), *arrays(running))
    assert_close(expected, by_hand.reshape(shape), num=x.size)
    if api == "linen":
        y = jax.jit(lambda variables: layer.apply(variables, x, True))(variables)
    else:
        module.eval()
        y = nnx.jit(lambda module: module(x))(module)
        assert int(module.step[...]) == 3
    assert_close(y, np.asarray(expected), num=x.size)


def test_parameters_are_optional_and_dtypes_are_flaxs():
    x = cases.inputs((2, 4, 3), "bfloat16")
    layer = linen.MixtureNorm(True, use_scale=False, use_bias=False)
    y, variables = jax.jit(layer.init_with_output)(KEY, x)
    assert y.dtype == "bfloat16"
    assert set(variables) == {"batch_stats"}
    module = nnx_layers.MixtureNorm(
        3, use_scale=False, use_bias=False, dtype="float16", rngs=nnx.Rngs(0)
    )
    assert not nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert nnx.jit(lambda module, x: module(x))(module, x).dtype == "float16"


@pytest.mark.parametrize(
    ("call", "given", "fix"),
    [
        (lambda x: initial_mixture(0, (3,)), "num_components=0", "batch norm"),
        (
            lambda x: mixture_norm(x, running=initial_mixture(2, (3,)), num_steps=0),
            "num_steps=0",
            "Two are usual",
        ),
        (
            lambda x: mixture_norm(x, running=initial_mixture(2, (4,))),
            "(2, 4)",
            "Is `axis` the feature axis?",
        ),
        (
            lambda x: mixture_normalize(x, initial_mixture(2, (3,)), axis=0),
            "axis=0",
            "Is `axis` the feature axis?",
        ),
        (
            lambda x: mixture_norm(
                x, running=initial_mixture(2, (3,)), mask=jnp.ones((5, 3), bool)
            ),
            "(5, 3)",
            "Give it size 1",
        ),
    ],
)
def test_errors_teach(call, given, fix):
    message_while_tracing((5, 3), call, ValueError, given, fix)
