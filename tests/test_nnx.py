"""How the nnx layer behaves in models: state, rng streams, evaluation, transforms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_sbn as sbn
from flax_sbn.nnx import BatchNorm
from tests import cases, reference, samples
from tests.closeness import assert_close

KEY = jax.random.key(3)
SHAPE = cases.SHAPES[4]
X = cases.inputs(SHAPE)
SAMPLERS = {"all": None, **cases.SAMPLERS}


def layer_of(sampler, **options):
    return BatchNorm(3, sampler=sampler, rngs=nnx.Rngs(0, sampling=1), **options)


def state(model):
    """A copy of all state, keys as numbers."""
    return jax.tree.map(
        lambda v: (
            jax.random.key_data(v)
            if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
            else jnp.array(v)
        ),
        nnx.to_pure_dict(nnx.state(model)),
    )


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_the_layer_is_the_function_with_a_key_of_the_stream(name):
    sampler = cases.SAMPLERS[name]
    layer = layer_of(sampler, momentum=0.0)
    layer.scale[...], layer.bias[...] = cases.inputs((2, 3), seed=1)
    key = nnx.clone(layer).rngs() if sampler.needs_key else None
    y = layer(X)
    expected, statistics = sbn.batch_norm(
        X, layer.scale[...], layer.bias[...], sampler=sampler, key=key
    )
    chex.assert_trees_all_equal(y, expected)
    # From zero, momentum 0 moves to the mean exactly; from one, to rounding.
    chex.assert_trees_all_equal(layer.mean[...], statistics.mean)
    assert_close(layer.var[...], statistics.var)


@pytest.mark.parametrize("name", ["all", "NS", "VDN", "VDN-strata"])
def test_a_layer_that_draws_nothing_has_no_stream(name):
    layer = BatchNorm(3, sampler=SAMPLERS[name], rngs=nnx.Rngs(params=0))
    layer(X)
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == {"mean", "var", "scale", "bias"}


@pytest.mark.parametrize("name", ["BS", "FS", "BS+VDN"])
def test_a_missing_stream_is_named_with_the_fix(name):
    message = (
        r"Expected an rng stream 'sampling' for .*got streams \['params'\].*Rngs\("
    )
    with pytest.raises(ValueError, match=message):
        BatchNorm(3, sampler=cases.SAMPLERS[name], rngs=nnx.Rngs(params=0))


def test_positions_come_from_the_named_stream():
    def output(**streams):
        rngs = nnx.Rngs(params=0, **streams)
        sampler = sbn.BatchSampling(2)
        return BatchNorm(3, sampler=sampler, rng_collection="places", rngs=rngs)(X)

    expected = output(places=1, sampling=2)
    chex.assert_trees_all_equal(output(places=1, default=2), expected)
    assert any((output(places=seed) != expected).any() for seed in range(2, 6))
    with pytest.raises(
        ValueError, match=r"rng stream 'places'.*\(params=0, places=1\)"
    ):
        output(sampling=1)


@pytest.mark.parametrize("name", ["all", "NS"])
@pytest.mark.parametrize("make", ["norm", "conv"])
def test_a_layer_that_gets_a_sampler_later_draws_or_says_what_to_do(make, name):
    given = {"sampler": SAMPLERS[name], "momentum": 0.0, "rngs": nnx.Rngs(params=0)}
    layer = (
        BatchNorm(3, **given)
        if make == "norm"
        else sbn.nnx.ConvNorm(3, 3, (1, 1), **given)
    )
    drawing = sbn.BatchSampling(2)
    layer.set_attributes(BatchNorm, sampler=drawing)
    message = r"Expected an rng stream for BatchSampling.*set_attributes\(.*rngs="
    with pytest.raises(ValueError, match=message):
        layer(X)
    layer.set_attributes(BatchNorm, sampler=drawing, rngs=nnx.Rngs(sampling=0))
    norm = layer if make == "norm" else layer.norm
    means = []
    for _ in range(8):
        layer(X)
        means.append(float(norm.mean[0]))
    assert len(set(means)) > 1


def test_the_default_stream_will_do():
    first, second = (
        BatchNorm(3, sampler=sbn.BatchSampling(2), rngs=rngs)
        for rngs in [nnx.Rngs(0), nnx.Rngs(default=0)]
    )
    chex.assert_trees_all_equal(first(X), second(X))


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluation_is_flax_and_changes_nothing(name):
    layer, flax_layer = layer_of(SAMPLERS[name]), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for each in (layer, flax_layer):
        each.mean[...], each.var[...] = X[0, 0, 0], X[1, 0, 0] ** 2
        each.eval()
    before = state(layer)
    chex.assert_trees_all_equal(layer(X[:1]), flax_layer(X[:1]))
    chex.assert_trees_all_equal(state(layer), before)


def test_training_evaluation_views_and_the_argument_switch_the_mode():
    layer = layer_of(sbn.BatchSampling(4))
    evaluated = nnx.view(layer, use_running_average=True)
    before = layer.mean[...]
    evaluated(X)
    layer.eval()
    layer(X)
    layer.train()
    layer(X, use_running_average=True)
    chex.assert_trees_all_equal(layer.mean[...], before)
    layer(X)
    assert (layer.mean[...] != before).all()
    chex.assert_trees_all_equal(evaluated.mean[...], layer.mean[...])


@pytest.mark.parametrize("name", ["all", "BS"])
def test_a_mode_that_is_never_given_is_an_error(name):
    layer = layer_of(SAMPLERS[name], use_running_average=None)
    with pytest.raises(ValueError, match="got None in both"):
        layer(X)
    layer(X, use_running_average=False)


def drawn(layer, steps=8):
    """Batch means of some steps; momentum is zero."""
    means = []
    for _ in range(steps):
        layer(X)
        means.append(float(layer.mean[0]))
    return means


def test_each_layer_and_step_draws_another_place():
    rngs = nnx.Rngs(0)
    first, second = (
        BatchNorm(3, sampler=sbn.BatchSampling(2), momentum=0.0, rngs=rngs)
        for _ in range(2)
    )
    one, two = drawn(first), drawn(second)
    assert len(set(one)) > 1
    assert one != two


def test_the_same_seed_draws_the_same_places():
    a, b = (layer_of(sbn.BatchSampling(2), momentum=0.0) for _ in range(2))
    assert drawn(a) == drawn(b)


def test_running_statistics_follow_the_reference():
    layer, mean, var = layer_of(SAMPLERS["VDN"], momentum=0.9), np.zeros(3), np.ones(3)
    for seed in range(4):
        x = cases.inputs(SHAPE, seed=seed)
        layer(x)
        new_mean, new_var = samples.moments(x, SAMPLERS["VDN"])
        mean, var = (
            reference.running(old, new, 0.9)
            for old, new in ((mean, new_mean), (var, new_var))
        )
    assert_close(layer.mean[...], mean, num=X.size)
    assert_close(layer.var[...], var, num=X.size)


def test_options_of_flax_apply_to_samples():
    options = {"axis": 1, "epsilon": 0.5}
    layer = BatchNorm(
        6,
        sampler=SAMPLERS["VDN"],
        rngs=nnx.Rngs(0),
        momentum=0.0,
        use_scale=False,
        use_bias=False,
        **options,
    )
    expected, statistics = sbn.batch_norm(X, sampler=SAMPLERS["VDN"], **options)
    chex.assert_trees_all_equal(layer(X), expected)
    chex.assert_trees_all_equal(layer.mean[...], statistics.mean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_empty_mask_leaves_the_running_statistics_as_they_are(name):
    layer = layer_of(SAMPLERS[name])
    layer.mean[...], layer.var[...] = X[0, 0, 0], X[1, 0, 0] ** 2
    y = layer(X, mask=jnp.zeros((16, 1, 1, 1), bool))
    chex.assert_trees_all_equal(layer.mean[...], X[0, 0, 0])
    chex.assert_trees_all_equal(layer.var[...], X[1, 0, 0] ** 2)
    if name != "all":  # with no sampler the output is flax's, which is NaN
        chex.assert_tree_all_finite(y)


def train_step(layer, x):
    """A gradient step as users write it."""

    def loss(layer):
        return (layer(x) ** 3).sum()

    return nnx.grad(loss)(layer)


@pytest.mark.parametrize("name", ["BS", "FS", "FS+VDN"])
def test_jit_gives_what_plain_calls_give(name):
    plain, jitted = (layer_of(SAMPLERS[name]) for _ in range(2))
    compiled = nnx.jit(train_step)
    for _ in range(2):
        expected, actual = train_step(plain, X), compiled(jitted, X)
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-3)
    chex.assert_trees_all_close(state(jitted), state(plain), rtol=1e-5)


def test_remat_draws_the_same_place_again():
    def gradient(call):
        layer = layer_of(sbn.BatchSampling(2))
        dx = nnx.grad(lambda x, layer: (call(layer, x) ** 3).sum())(X, layer)
        return dx, layer.mean[...]

    plain, remat = (gradient(c) for c in (BatchNorm.__call__, nnx.remat(call_layer)))
    chex.assert_trees_all_close(plain, remat, rtol=1e-4, atol=1e-4)


def call_layer(layer, x):
    return layer(x)


def stacked(num=8):
    """As many layers in one, along the first axis of their state."""

    @nnx.split_rngs(splits=num)
    @nnx.vmap
    def create(rngs):
        return BatchNorm(3, sampler=sbn.BatchSampling(2), momentum=0.0, rngs=rngs)

    return create(nnx.Rngs(0))


def test_vmap_over_layers_draws_another_place_in_each():
    layers = stacked()
    y = nnx.vmap(call_layer, in_axes=(0, None))(layers, X)
    assert y.shape == (8, *SHAPE)
    assert len(np.unique(layers.mean[:, 0])) > 1


def test_scan_over_layers_draws_another_place_in_each():
    layers = stacked()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x) + X

    y = forward(layers, 0 * X)
    assert y.shape == SHAPE
    # The first layer sees zeros, the others about the same input.
    assert len(np.unique(layers.mean[:, 0].round(3))) > 3


class Net(nnx.Module):
    """A small network, trained with virtual images."""

    def __init__(self, sampler, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = BatchNorm(4, sampler=sampler, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_a_network_trains_with_virtual_images_in_three_lines():
    net = Net(sbn.VirtualSampling(4), nnx.Rngs(0))
    virtual = sbn.virtual_samples(KEY, 4, SHAPE[1:])
    logits = net(sbn.append_virtual(X, virtual))
    assert sbn.drop_virtual(logits, 4).shape == (16, 2)
    mean, _ = samples.moments(net.conv(virtual), None)
    assert_close(net.norm.mean[...], 0.01 * mean, num=96)
    net.eval()
    assert net(X[:1]).shape == (1, 2)
