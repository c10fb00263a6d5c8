"""How the linen layer behaves in models: state, rng streams, evaluation, transforms."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.linen import BatchNorm
from tests import cases, reference, samples
from tests.closeness import assert_close

KEY = jax.random.key(3)
SHAPE = cases.SHAPES[4]
X = cases.inputs(SHAPE)
SAMPLERS = {"all": None, **cases.SAMPLERS}
OTHERS = jax.random.split(jax.random.key(9), 4)


def layer_of(sampler, **options):
    return BatchNorm(use_running_average=False, sampler=sampler, **options)


def train(module, variables, *args, key=KEY, **options):
    return module.apply(
        variables, *args, mutable=["batch_stats"], rngs={"sampling": key}, **options
    )


def first_key(layer, variables):
    """The key that the layer draws first in a step."""
    return layer.apply(
        variables, rngs={"sampling": KEY}, method=lambda m: m.make_rng("sampling")
    )


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_the_layer_is_the_function_with_a_key_of_the_stream(name):
    sampler = cases.SAMPLERS[name]
    layer = layer_of(sampler, momentum=0.0)
    variables = layer.init(KEY, X)
    scale, bias = cases.inputs((2, 3), seed=1)
    variables["params"] = {"scale": scale, "bias": bias}
    y, updated = train(layer, variables, X)
    key = first_key(layer, variables)
    expected, statistics = sbn.batch_norm(X, scale, bias, sampler=sampler, key=key)
    chex.assert_trees_all_equal(y, expected)
    # From zero, momentum 0 moves to the mean exactly; from one, to rounding.
    chex.assert_trees_all_equal(updated["batch_stats"]["mean"], statistics.mean)
    assert_close(updated["batch_stats"]["var"], statistics.var)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_init_takes_one_image_and_no_stream_and_leaves_the_statistics(name):
    variables = layer_of(cases.SAMPLERS[name]).init(KEY, jnp.ones((1, *SHAPE[1:])))
    expected = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }
    chex.assert_trees_all_equal(variables, expected)


@pytest.mark.parametrize("name", ["BS", "FS", "BS+VDN"])
def test_a_missing_stream_is_named_with_the_fix(name):
    layer = layer_of(cases.SAMPLERS[name])
    variables = layer.init(KEY, X)
    message = r"Expected an rng stream 'sampling' for .*rngs=\{'sampling': key\}"
    with pytest.raises(ValueError, match=message):
        layer.apply(variables, X, mutable=["batch_stats"])


@pytest.mark.parametrize("stream", ["sampling", "places"])
@pytest.mark.parametrize("kind", [BatchNorm, sbn.linen.IC, sbn.linen.BNET])
def test_positions_come_from_the_named_stream_or_else_from_params(kind, stream):
    layer = kind(
        use_running_average=False,
        sampler=sbn.BatchSampling(2),
        rng_collection=stream,
        **({"rate": 0.0} if kind is sbn.linen.IC else {}),
    )
    variables = layer.init(KEY, X)
    other = jax.random.key(9)

    def output(rngs):
        return layer.apply(variables, X, mutable=["batch_stats"], rngs=rngs)[0]

    expected = output({stream: KEY, "params": other})
    chex.assert_trees_all_equal(output({stream: KEY, "unused": other}), expected)
    chex.assert_trees_all_equal(output({"params": KEY}), expected)
    chex.assert_trees_all_equal(output(KEY), expected)
    assert any((output({stream: k, "params": KEY}) != expected).any() for k in OTHERS)
    with pytest.raises(ValueError, match=f"Expected an rng stream '{stream}'"):
        output({"unused": KEY})


@pytest.mark.parametrize("name", ["all", "NS", "VDN", "VDN-strata"])
def test_a_layer_that_draws_nothing_needs_no_stream(name):
    layer = layer_of(SAMPLERS[name])
    layer.apply(layer.init(KEY, X), X, mutable=["batch_stats"])


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_evaluation_is_flax_and_needs_no_stream(name):
    layer = BatchNorm(sampler=cases.SAMPLERS[name])
    variables = layer.init(KEY, X, use_running_average=False)
    variables["batch_stats"] = {"mean": X[0, 0, 0], "var": X[1, 0, 0] ** 2}
    one_image = X[:1]
    chex.assert_trees_all_equal(
        layer.apply(variables, one_image, use_running_average=True),
        nn.BatchNorm().apply(variables, one_image, use_running_average=True),
    )


class Twice(nn.Module):
    """Two layers, or one layer twice, on the same input."""

    shared: bool
    momentum: float = 0.0

    @nn.compact
    def __call__(self, x):
        first = layer_of(sbn.BatchSampling(2), momentum=self.momentum)
        second = layer_of(sbn.BatchSampling(2), momentum=self.momentum)
        return first(x), (first if self.shared else second)(x)


def test_each_layer_and_step_draws_another_place():
    model = Twice(shared=False)
    variables, drawn = model.init(KEY, X), []
    for key in jax.random.split(KEY, 8):
        stats = train(model, variables, X, key=key)[1]["batch_stats"]
        drawn.append([float(layer["mean"][0]) for layer in stats.values()])
    first, second = zip(*drawn, strict=True)
    assert len(set(first)) > 1
    assert first != second


def test_a_shared_layer_draws_anew_and_updates_twice():
    model = Twice(shared=True, momentum=0.5)
    variables = model.init(KEY, X)
    different = []
    for key in jax.random.split(KEY, 4):
        (a, b), updated = train(model, variables, X, key=key)
        different.append(bool((a != b).any()))
        # The mean of each sample, from what it normalized a common value to.
        std = (X[0] - X[1]) / (a[0] - a[1]), (X[0] - X[1]) / (b[0] - b[1])
        first, second = (X[0] - y[0] * s for y, s in zip((a, b), std, strict=True))
        expected = (first / 4 + second / 2).reshape(-1, 3).mean(0)
        mean = updated["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(mean, expected, atol=1e-3)
    assert any(different)


def test_running_statistics_follow_the_reference():
    layer = layer_of(cases.SAMPLERS["VDN"], momentum=0.9)
    variables, mean, var = layer.init(KEY, X), np.zeros(3), np.ones(3)
    for seed in range(4):
        x = cases.inputs(SHAPE, seed=seed)
        _, updated = train(layer, variables, x)
        variables = {**variables, **updated}
        new_mean, new_var = samples.moments(x, cases.SAMPLERS["VDN"])
        mean, var = (
            reference.running(old, new, 0.9)
            for old, new in ((mean, new_mean), (var, new_var))
        )
    assert_close(variables["batch_stats"]["mean"], mean, num=X.size)
    assert_close(variables["batch_stats"]["var"], var, num=X.size)


def test_running_statistics_keep_their_dtype():
    layer = layer_of(
        SAMPLERS["BS"], force_float32_reductions=False, param_dtype=jnp.bfloat16
    )
    variables = layer.init(KEY, X)
    _, updated = train(layer, variables, X)
    chex.assert_trees_all_equal_dtypes(updated["batch_stats"], variables["batch_stats"])


def test_options_of_flax_apply_to_samples():
    options = {"axis": 1, "epsilon": 0.5}
    layer = layer_of(
        SAMPLERS["VDN"], momentum=0.0, use_scale=False, use_bias=False, **options
    )
    variables = layer.init(KEY, X)
    assert "params" not in variables
    y, updated = train(layer, variables, X)
    expected, statistics = sbn.batch_norm(X, sampler=SAMPLERS["VDN"], **options)
    chex.assert_trees_all_equal(y, expected)
    chex.assert_trees_all_equal(updated["batch_stats"]["mean"], statistics.mean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_empty_mask_leaves_the_running_statistics_as_they_are(name):
    layer = layer_of(SAMPLERS[name])
    variables = layer.init(KEY, X)
    variables["batch_stats"] = {"mean": X[0, 0, 0], "var": X[1, 0, 0] ** 2}
    y, updated = train(layer, variables, X, mask=jnp.zeros((16, 1, 1, 1), bool))
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])
    if name != "all":  # with no sampler the output is flax's, which is NaN
        chex.assert_tree_all_finite(y)


def test_layers_with_equal_samplers_are_equal():
    a, b = (layer_of(sbn.BatchSampling(4)) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != layer_of(sbn.BatchSampling(8))


class Net(nn.Module):
    """A small network, trained with virtual images."""

    sampler: sbn.Sampler

    @nn.compact
    def __call__(self, x, train):
        for features in (4, 4):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = BatchNorm(use_running_average=not train, sampler=self.sampler)(x)
            x = nn.relu(x)
        return nn.Dense(2)(x.mean((1, 2)))


def test_a_network_trains_with_virtual_images_in_three_lines():
    net = Net(sbn.VirtualSampling(4))
    variables = net.init(KEY, X[:1], train=False)
    virtual = sbn.virtual_samples(KEY, 4, SHAPE[1:])
    logits, updated = train(net, variables, sbn.append_virtual(X, virtual), train=True)
    assert sbn.drop_virtual(logits, 4).shape == (16, 2)
    mean, _ = samples.moments(
        nn.Conv(4, (3, 3), use_bias=False).apply(
            {"params": variables["params"]["Conv_0"]}, virtual
        ),
        None,
    )
    assert_close(updated["batch_stats"]["BatchNorm_0"]["mean"], 0.01 * mean, num=96)
    evaluated = net.apply({**variables, **updated}, X[:1], train=False)
    assert evaluated.shape == (1, 2)
