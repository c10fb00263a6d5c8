"""Diminishing batch norm against its equations, over steps; folded; the weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives.diminishing import (
    diminished,
    diminishing_batch_norm,
    one_over_steps,
    update_diminished,
)
from flax_sbn.linen import diminishing as linen
from flax_sbn.nnx import diminishing as nnx_layers
from tests import cases, samples
from tests.closeness import assert_close, assert_same_to_rounding
from tests.samples import KEY
from tests.teaching import message_while_tracing

EPSILON = 1e-5
SHAPE = (8, 4, 3, 2)
RUNNING = sbn.Statistics(jnp.array([0.4, -1.5]), jnp.array([0.3, 2.5]))


def mixed(batch, old, weight):
    """Mean and standard deviation of a step's mixture."""
    (mean, var), (old_mean, old_std) = batch, old
    std = np.sqrt(var + EPSILON)
    return weight * mean + (1 - weight) * old_mean, weight * std + (
        1 - weight
    ) * old_std


def backward(x, g, batch, old, weight, shares):
    """Gradient of x: through the batch's moments, the old ones held constant."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    over = tuple(range(x.ndim - 1))
    mean, std = mixed(batch, old, weight)
    of_mean, of_std = -g.sum(over) / std, -(g * (x - mean)).sum(over) / std**2
    of_batch = of_mean + of_std * (x - batch[0]) / np.sqrt(batch[1] + EPSILON)
    return g / std + weight * shares * of_batch


def old_moments(running):
    """Mean and standard deviation of running statistics."""
    mean, var = (np.asarray(s, np.float64) for s in running)
    return mean, np.sqrt(var + EPSILON)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [None, "BS", "FS+VDN"])
def test_value_gradients_and_state_are_those_of_the_equations(name, weight, x64):
    x, g = (cases.inputs(SHAPE, "float64", seed=i) for i in range(2))
    scale, bias = cases.inputs((2, 2), "float64", seed=2)
    sampler = cases.SAMPLERS[name] if name else None
    old = sbn.Statistics(*(s.astype("float64") for s in RUNNING))

    @jax.jit
    def value_and_gradients(x, scale, bias):
        def norm(x, scale, bias):
            return diminishing_batch_norm(
                x, scale, bias, running=old, weight=weight, sampler=sampler, key=KEY
            )

        y, pullback, running = jax.vjp(norm, x, scale, bias, has_aux=True)
        return y, running, pullback(g)

    y, running, (dx, dscale, dbias) = value_and_gradients(x, scale, bias)
    batch = samples.moments(x, sampler)
    mean, std = mixed(batch, old_moments(old), weight)
    normal = (np.asarray(x) - mean) / std
    close = functools.partial(assert_close, dtype="float64", num=x.size)
    close(y, np.asarray(scale) * normal + np.asarray(bias))
    close(running.mean, mean)
    close(running.var, std**2 - EPSILON)
    shares = samples.shares(sampler, SHAPE)
    through = np.asarray(g) * np.asarray(scale)
    close(dx, backward(x, through, batch, old_moments(old), weight, shares))
    close(dscale, (np.asarray(g) * normal).sum((0, 1, 2)))
    close(dbias, np.asarray(g).sum((0, 1, 2)))


def test_the_gradient_is_that_of_finite_differences(x64):
    x = cases.inputs((4, 5, 3), "float64")
    running = sbn.Statistics(jnp.ones(3), jnp.full(3, 2.0))

    @jax.jit
    def norm(x):
        return jnp.sin(diminishing_batch_norm(x, running=running, weight=0.4)[0])

    check_grads(norm, (x,), 2, "rev")


def test_nothing_flows_into_what_is_remembered():
    x = cases.inputs(SHAPE)

    def loss(running):
        y, updated = diminishing_batch_norm(x, running=running, weight=0.3)
        return y.sum() + sum(u.sum() for u in updated)

    for gradient in jax.grad(loss)(RUNNING):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_a_weight_of_one_is_batch_norm_whatever_was_before(dtype):
    x = cases.inputs(SHAPE, dtype)
    expected, statistics = sbn.batch_norm(x)
    for weight in (1.0, jnp.array(1.0), jnp.array(2.0)):
        for old in (RUNNING, sbn.Statistics(jnp.full(2, 1e3), jnp.full(2, 1e8))):
            y, running = diminishing_batch_norm(x, running=old, weight=weight)
            assert y.dtype == expected.dtype
            assert_close(y, np.asarray(expected), dtype, num=x.size)
            assert_close(running.mean, np.asarray(statistics.mean), num=x.size)
            assert_close(running.var, np.asarray(statistics.var), num=x.size)


def test_a_weight_of_zero_normalizes_as_inference_does():
    x = cases.inputs(SHAPE)
    for weight in (0, jnp.array(-1.0)):
        y, running = diminishing_batch_norm(x, running=RUNNING, weight=weight)
        assert_close(y, np.asarray(sbn.normalize(x, RUNNING)))
        assert_same_to_rounding(running, RUNNING, 1e-6)


def test_small_variances_survive_a_large_initial_one(x64):
    x = 1e-3 * cases.inputs(SHAPE)
    fresh = sbn.Statistics(jnp.zeros(2, "float32"), jnp.ones(2, "float32"))
    _, running = diminishing_batch_norm(x, running=fresh, weight=1.0, epsilon=1e-8)
    var = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(running.var, var, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_constant_features_and_empty_masks_stay_finite(masked, weight):
    x = jnp.full((1, 2, 3), 7.0)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(x):
        running = sbn.Statistics(jnp.zeros(3), jnp.zeros(3))
        mask = jnp.zeros((1, 2, 1), bool) if masked else None
        y, updated = diminishing_batch_norm(
            x, running=running, weight=weight, mask=mask
        )
        return y.sum(), (y, updated)

    for leaf in jax.tree.leaves(gradient(x)):
        assert np.isfinite(leaf).all()


def test_the_default_weight_falls_to_its_floor():
    steps = jnp.array([0, 1, 2, 3, 4, 10**6])
    expected = [1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4]
    assert_close(one_over_steps(steps), np.array(expected))
    assert_close(1e6 * one_over_steps(steps[-1] - 1, floor=0.0), np.array(1.0))


SCHEDULES = {
    "default": ({}, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4]),
    "number": ({"weight": 0.4}, [0.4] * 6),
    "optax": (
        {"weight": optax.linear_schedule(1.5, 0.5, 4)},
        [1, 1, 1, 0.75, 0.5, 0.5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_follow_the_schedule_and_restore_the_step(api, name):
    options, weights = SCHEDULES[name]
    old = (np.zeros(2), np.full(2, np.sqrt(1 + EPSILON)))
    if api == "linen":
        layer = linen.DiminishingBatchNorm(**options)
        variables = layer.init(KEY, jnp.zeros((1, *SHAPE[1:])), False)
    else:
        module = nnx_layers.DiminishingBatchNorm(2, rngs=nnx.Rngs(0), **options)

    @jax.jit
    def apply(variables, x):
        return layer.apply(variables, x, False, mutable=["batch_stats"])

    for i, weight in enumerate(weights):
        x = cases.inputs(SHAPE, seed=i) * (1 + i)
        old = mixed(samples.moments(x, None), old, weight)
        if api == "linen":
            y, updates = apply(variables, x)
            variables = {**variables, **updates}
            stats = variables["batch_stats"]
            if i == 2:  # as from a checkpoint
                saved = serialization.to_bytes(variables)
                blank = jax.tree.map(jnp.zeros_like, variables)
                variables = serialization.from_bytes(blank, saved)
        else:
            y = nnx.jit(lambda module, x: module(x))(module, x)
            stats = {name: getattr(module, name)[...] for name in ("mean", "var")}
            stats["step"] = module.step[...]
        assert_close(y, (np.asarray(x, np.float64) - old[0]) / old[1], num=x.size)
        assert_close(stats["mean"], old[0], num=x.size)
        assert_close(stats["var"], old[1] ** 2 - EPSILON, num=x.size)
        assert stats["step"].dtype == "int32"
        assert int(stats["step"]) == i + 1

    if api == "linen":
        y = layer.apply(variables, x, True)
    else:
        module.eval()
        y = module(x)
        assert int(module.step[...]) == len(weights)
    assert_close(y, (np.asarray(x, np.float64) - old[0]) / old[1], num=x.size)


@pytest.mark.parametrize("sampler", [None, sbn.NaiveSampling(3)], ids=str)
def test_it_is_the_norm_of_folded_layers(sampler):
    x = cases.inputs((8, 5, 5, 3))
    norm_cls = functools.partial(linen.DiminishingBatchNorm, weight=0.3)
    layer = sbn.linen.ConvNorm(2, (3, 3), sampler=sampler, norm_cls=norm_cls)
    variables = layer.init(KEY, x, use_running_average=False)
    y, updates = layer.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    kernel = variables["params"]["conv"]["kernel"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )
    fresh = sbn.Statistics(jnp.zeros(2), jnp.ones(2))
    expected, running = diminishing_batch_norm(
        conv, running=fresh, weight=0.3, sampler=sampler
    )
    assert_close(y, np.asarray(expected), num=x.size)
    stats = updates["batch_stats"]["norm"]
    assert int(stats["step"]) == 1
    assert_close(stats["mean"], np.asarray(running.mean), num=x.size)
    assert_close(stats["var"], np.asarray(running.var), num=x.size)

    module = sbn.nnx.ConvNorm(
        3,
        2,
        (3, 3),
        sampler=sampler,
        norm_cls=functools.partial(nnx_layers.DiminishingBatchNorm, weight=0.3),
        rngs=nnx.Rngs(0),
    )
    module.conv.kernel[...] = kernel
    assert_close(module(x), np.asarray(expected), num=x.size)
    assert int(module.norm.step[...]) == 1


@pytest.mark.parametrize(
    ("call", "given", "fix"),
    [
        (
            lambda x: diminishing_batch_norm(x, running=RUNNING, weight=1.5),
            "weight=1.5",
            "1 is batch norm",
        ),
        (
            lambda x: diminishing_batch_norm(x, running=RUNNING, weight=float("nan")),
            "weight=nan",
            "1 is batch norm",
        ),
        (
            lambda x: diminished(RUNNING, None, weight=0.5),
            "running=None",
            "Pass running=Statistics",
        ),
        (
            lambda x: linen.DiminishingBatchNorm(weight=-0.5).apply(
                {"params": {"scale": jnp.ones(2), "bias": jnp.ones(2)}},
                x,
                False,
                mutable=["batch_stats"],
            ),
            "weight=-0.5",
            "1 is batch norm",
        ),
    ],
)
def test_errors_teach(call, given, fix):
    message_while_tracing((5, 2), call, ValueError, given, fix)


def test_what_is_remembered_keeps_its_dtype(x64):
    x = cases.inputs(SHAPE, "float64")
    statistics = sbn.batch_statistics(x)
    running = sbn.Statistics(*(s.astype("float32") for s in RUNNING))
    updated = update_diminished(running, statistics, weight=0.5)
    assert [u.dtype for u in updated] == ["float32", "float32"]
