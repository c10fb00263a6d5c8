"""BNET: against its equation, at its limits, and as layers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives import bnet, depthwise_affine, identity_kernel
from tests import cases, reference, samples, teaching, unfolded
from tests.closeness import assert_close
from tests.samples import KEY


def expected_affine(x, kernel, bias):
    """Each feature with its own window about every position, zeros outside."""
    x, kernel = reference.wide(x), reference.wide(kernel)
    window = kernel.shape[:-2]
    pads = [((n - 1) // 2, n // 2) for n in window]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    y = np.broadcast_to(reference.wide(bias), x.shape).copy()
    for entry in itertools.product(*map(range, window)):
        places = (slice(e, e + n) for e, n in zip(entry, x.shape[1:-1], strict=True))
        y += kernel[entry][0] * padded[:, *places]
    return y


def expected_norm(x, moments):
    return reference.normalize(x, *moments, 1.0, 0.0)


@pytest.mark.parametrize(
    ("space", "window", "dtype"),
    [
        ((), (), "float64"),
        ((7,), (3,), "float64"),
        ((5, 4), (3, 2), "float32"),
        ((2, 4, 3), (1, 3, 5), "float64"),
    ],
)
def test_values_are_those_of_the_equation(space, window, dtype, x64):
    x = cases.inputs((8, *space, 3), dtype)
    kernel = cases.inputs((*window, 1, 3), dtype, seed=1)
    bias = cases.inputs((3,), dtype, seed=2)
    sampler = sbn.BatchSampling(4)
    norm = functools.partial(bnet, sampler=sampler, key=KEY)
    y, statistics = unfolded.quick_jit(norm)(x, kernel, bias)
    moments = samples.moments(x, sampler)
    expected = expected_affine(expected_norm(x, moments), kernel, bias)
    assert y.dtype == dtype
    assert_close(y, expected, dtype, num=x.size)
    for found, moment in zip(statistics, moments, strict=True):
        assert_close(found, moment, dtype, num=x.size)


def test_a_window_of_one_is_batch_norm():
    x = cases.inputs((8, 4, 3, 2))
    scale, bias = cases.inputs((2, 2), seed=1)
    kernel = scale.reshape(1, 1, 1, 2)
    for given in (bias, None):
        y, _ = unfolded.quick_jit(bnet)(x, kernel, given)
        expected, _ = unfolded.quick_jit(sbn.batch_norm)(x, scale, given)
        assert_close(y, np.asarray(expected))


@pytest.mark.parametrize("window", [(3, 3), (4, 1), (2, 6)])
def test_the_first_kernel_changes_nothing(window):
    x = cases.inputs((2, 5, 4, 3))
    kernel = identity_kernel(KEY, (*window, 1, 3), "bfloat16")
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(depthwise_affine(x, kernel), x)


def test_the_gradient_is_that_of_the_equation(x64):
    x = cases.inputs((4, 3, 4, 2), "float64")
    kernel = cases.inputs((3, 3, 1, 2), "float64", seed=1)
    bias = cases.inputs((2,), "float64", seed=2)

    @jax.jit
    def loss(*given):
        return jnp.sin(bnet(*given, sampler=sbn.NaiveSampling(2))[0]).sum()

    check_grads(loss, (x, kernel, bias), 1, "rev")


@pytest.mark.parametrize(
    ("dtypes", "dtype", "wanted"),
    [
        (("bfloat16", "float32"), None, "float32"),
        (("bfloat16", "bfloat16"), None, "bfloat16"),
        (("float32", "float32"), "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_is_that_asked_for_or_promoted(dtypes, dtype, wanted):
    x = jnp.ones((4, 3, 2), dtypes[0])
    kernel, bias = jnp.ones((3, 1, 2), dtypes[1]), jnp.ones(2, dtypes[1])
    norm = functools.partial(bnet, dtype=dtype)
    y, statistics = jax.eval_shape(norm, x, kernel, bias)
    assert (y.dtype, statistics.var.dtype) == (wanted, "float32")


def test_features_that_do_not_vary_stay_finite():
    x, kernel = jnp.full((4, 3, 2), 7.0), jnp.zeros((3, 1, 2))
    gradient = jax.grad(lambda *given: bnet(*given)[0].sum(), (0, 1))
    dx, dkernel = unfolded.quick_jit(gradient)(x, kernel)
    assert np.isfinite(dx).all()
    assert np.isfinite(dkernel).all()


@pytest.mark.parametrize(
    ("shapes", "given", "fix"),
    [
        (((3, 1, 2), (2,)), "kernel of shape (3, 1, 2)", "one number for each spatial"),
        (((3, 3, 1, 4), (2,)), "kernel of shape (3, 3, 1, 4)", "(1, 2)"),
        (((3, 3, 2, 2), (2,)), "kernel of shape (3, 3, 2, 2)", "(1, 2)"),
        (((3, 3, 1, 2), (1,)), "bias of shape (1,)", "bias of shape (2,)"),
    ],
)
def test_other_shapes_are_refused(shapes, given, fix):
    kernel, bias = map(jnp.ones, shapes)
    teaching.message_while_tracing(
        (4, 5, 5, 2), lambda x: bnet(x, kernel, bias), ValueError, given, fix
    )


@functools.partial(unfolded.quick_jit, static_argnums=(0, 3))
def apply(layer, state, x, evaluate):
    return layer.apply(state, x, evaluate, mutable=["batch_stats"])


OPTIONS = {
    "all": {},
    "sample": {"sampler": sbn.NaiveSampling(3)},
    "ghost": {"ghost_groups": 2},
    "weight": {"running_weight": 0.5, "epsilon": 1e-2, "dtype": "float32"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_train_and_evaluate_as_batch_norm_and_then_convolve(api, name):
    shape = (8, 4, 3, 2)
    kernel, bias = cases.inputs((3, 3, 1, 2), seed=7), cases.inputs((2,), seed=8)
    options = {"momentum": 0.8, **OPTIONS[name]}
    norm = sbn.linen.BatchNorm(use_scale=False, use_bias=False, **options)
    normed = norm.init(KEY, jnp.zeros(shape), use_running_average=True)

    if api == "linen":
        layer = sbn.linen.BNET(**options)
        state = layer.init(KEY, jnp.zeros((1, *shape[1:])), use_running_average=False)
        assert jax.tree.map(jnp.shape, state) == {
            "params": {"kernel": (3, 3, 1, 2), "bias": (2,)},
            "batch_stats": {"norm": {"mean": (2,), "var": (2,)}},
        }
        state["params"] = {"kernel": kernel, "bias": bias}

        def call(x, evaluate):
            y, updates = apply(layer, state, x, evaluate)
            state.update(updates)
            return y, updates["batch_stats"]["norm"]
    else:
        layer = sbn.nnx.BNET(2, **options, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = kernel, bias

        def call(x, evaluate):
            layer.eval() if evaluate else layer.train()
            y = layer(x)
            return y, {"mean": layer.norm.mean[...], "var": layer.norm.var[...]}

    for step, evaluate in enumerate([False, False, True]):
        x = cases.inputs(shape, seed=step)
        y, found = call(x, evaluate)
        normal, updates = apply(norm, normed, x, evaluate)
        normed.update(updates)
        assert_close(y, expected_affine(normal, kernel, bias), num=9)
        for statistic in ("mean", "var"):
            wanted = np.asarray(normed["batch_stats"][statistic])
            assert_close(found[statistic], wanted)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_start_as_batch_norm_and_take_masks(api):
    x = np.array(cases.inputs((8, 5, 2)))
    mask = np.arange(8).reshape(8, 1, 1) < 6
    x[6:] = np.nan
    if api == "linen":
        layer = sbn.linen.BNET(3, use_running_average=False)
        state = layer.init(KEY, x)
        y, _ = layer.apply(state, x, mask=mask, mutable=["batch_stats"])
    else:
        y = sbn.nnx.BNET(2, 3, rngs=nnx.Rngs(0))(x, mask=mask)
    moments = reference.moments(x[:6], np.ones(x[:6].shape, bool))
    assert_close(y[:6], expected_norm(x[:6], moments), num=x.size)


def test_a_window_of_another_rank_is_refused_by_layers():
    x = jnp.ones((4, 5, 2))
    for call in (
        lambda x: sbn.linen.BNET().init(KEY, x, use_running_average=True),
        lambda x: sbn.nnx.BNET(2, rngs=nnx.Rngs(0))(x),
    ):
        teaching.message_while_tracing(
            x.shape, call, ValueError, "kernel of shape (3, 3, 1, 2)", "kernel_size"
        )
