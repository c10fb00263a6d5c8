"""The folded layers under jit, remat, vmap, scan, and on several devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from tests import cases, unfolded
from tests.closeness import assert_close, assert_trees_close
from tests.devices import collectives, mesh

KEY = jax.random.key(3)
X = cases.inputs((16, 6, 5, 4))


def linen(sampler, cls=sbn.linen.ConvNorm, **options):
    options = {"use_running_average": False, "activation": nn.relu, **options}
    return cls(4, (3, 3), sampler=sampler, **options)


def nnx_layer(sampler, rngs=None, **options):
    rngs = rngs or nnx.Rngs(0, sampling=1)
    options = {"activation": nnx.relu, **options}
    return sbn.nnx.ConvNorm(4, 4, (3, 3), sampler=sampler, rngs=rngs, **options)


def train(module, variables, *args):
    return module.apply(
        variables, *args, mutable=["batch_stats"], rngs={"sampling": KEY}
    )


def call(layer, x):
    return layer(x)


@pytest.mark.parametrize("name", ["NS", "BS", "FS", "FS+VDN", "lattice"])
def test_jit_gives_what_plain_calls_give(name):
    def step(layer, x):
        return nnx.grad(lambda layer: (layer(x) ** 3).sum())(layer)

    plain, jitted = (nnx_layer(cases.SAMPLERS[name]) for _ in range(2))
    compiled = nnx.jit(step)
    for _ in range(2):
        expected, actual = step(plain, X), compiled(jitted, X)
        chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-2)
    states = (nnx.state(layer, nnx.BatchStat) for layer in (plain, jitted))
    chex.assert_trees_all_close(*states, rtol=1e-5)


@pytest.mark.parametrize("name", ["BS", "FS", "lattice"])
def test_remat_draws_the_same_place_again(name):
    def linen_gradient(cls):
        layer = linen(cases.SAMPLERS[name], cls, name="layer")
        variables = layer.init(KEY, X)

        def loss(x):
            y, updated = train(layer, variables, x)
            return (y**3).sum(), updated

        return jax.jit(jax.grad(loss, has_aux=True))(X)

    def nnx_gradient(call):
        layer = nnx_layer(cases.SAMPLERS[name])
        dx = nnx.grad(lambda x, layer: (call(layer, x) ** 3).sum())(X, layer)
        return dx, layer.norm.mean[...]

    for gradient, plain, remat in [
        (linen_gradient, sbn.linen.ConvNorm, nn.remat(sbn.linen.ConvNorm)),
        (nnx_gradient, call, nnx.remat(call)),
    ]:
        chex.assert_trees_all_close(
            gradient(plain), gradient(remat), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("split", [False, True])
def test_linen_vmap_draws_one_place_or_one_for_each(split):
    model = linen(
        sbn.BatchSampling(2),
        nn.vmap(
            sbn.linen.ConvNorm,
            variable_axes={"params": None, "batch_stats": 0},
            split_rngs={"params": False, "sampling": split},
        ),
        momentum=0.0,
    )
    x = jnp.stack([X] * 8)
    _, updated = train(model, model.init(KEY, x), x)
    mean = updated["batch_stats"]["norm"]["mean"]
    assert (len(np.unique(mean[:, 0].round(4))) > 1) == split


def stacked(num=8):
    """As many nnx layers in one, along the first axis of their state."""

    @nnx.split_rngs(splits=num)
    @nnx.vmap
    def create(rngs):
        return nnx_layer(sbn.BatchSampling(2), rngs, momentum=0.0)

    return create(nnx.Rngs(0))


def test_nnx_vmap_over_layers_is_each_layer():
    layers = stacked()
    graph, state = nnx.split(layers)
    each = [
        nnx.merge(graph, jax.tree.map(lambda s, i=i: s[i], state))(X) for i in range(8)
    ]
    assert_close(nnx.vmap(call, in_axes=(0, None))(layers, X), jnp.stack(each), num=36)


class Block(nn.Module):
    """The body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return linen(sbn.BatchSampling(2), momentum=0.0, name="layer")(x, X), None


def test_scan_over_layers_draws_another_place_in_each():
    model = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": False, "sampling": True},
        length=8,
    )()
    variables = model.init(KEY, X, None)
    _, updated = jax.jit(lambda v: train(model, v, X, None))(variables)
    mean = updated["batch_stats"]["layer"]["norm"]["mean"]
    assert mean.shape == (8, 4)
    assert len(np.unique(mean[:, 0].round(3))) > 3

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x, X)

    layers = stacked()
    assert forward(layers, X).shape == X.shape
    assert len(np.unique(layers.norm.mean[:, 0].round(3))) > 3


def apply_linen(x, **options):
    layer = linen(activation=None, momentum=0.0, **options)
    variables = layer.init(KEY, x)
    y, updated = train(layer, variables, x)
    return y, variables["params"]["conv"]["kernel"], updated["batch_stats"]["norm"]


def apply_nnx(x, **options):
    layer = nnx_layer(activation=None, momentum=0.0, **options)
    y, norm = layer(x), layer.norm
    return y, layer.conv.kernel[...], {"mean": norm.mean[...], "var": norm.var[...]}


@pytest.mark.parametrize("sampler", [None, sbn.NaiveSampling(2)], ids=str)
@pytest.mark.parametrize("apply", [apply_linen, apply_nnx])
def test_layers_pool_over_their_named_axis(apply, sampler):
    x = cases.inputs((32, 6, 5, 4))
    mapped = jax.shard_map(
        functools.partial(apply, sampler=sampler, axis_name="data"),
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=(P("data"), P(), P()),
    )
    y, kernel, stats = jax.jit(mapped)(x)
    z = np.float64(unfolded.conv(x, kernel))
    rows = z.reshape(8, 4, *z.shape[1:])[:, -2 if sampler else 0 :]
    mean, var = rows.mean((0, 1, 2, 3)), rows.var((0, 1, 2, 3))
    assert_close(stats["mean"], mean, num=rows.size)
    assert_close(stats["var"], var, num=rows.size)
    assert_close(y, (z - mean) / np.sqrt(var + 1e-5), num=rows.size)


# One stratum for each data shard, or patches of rows, are read where they are.
LOCAL = [
    sbn.BatchSampling(16, strata=8),
    sbn.VirtualSampling(16, strata=8),
    sbn.FeatureSampling(1 / 4),
    sbn.FeatureSampling(1 / 4, groups=1),
    sbn.LatticeSampling(1, min_values=1),
]


@pytest.mark.parametrize("sampler", LOCAL, ids=str)
def test_under_jit_only_sums_of_features_and_kernels_are_communicated(sampler):
    def layer(x, kernel, key):
        return sbn.conv_norm(x, kernel, sampler=sampler, key=key, activation=sbn.relu)

    def gradient(x, kernel, key):
        y, pullback = jax.vjp(lambda x, kernel: layer(x, kernel, key)[0], x, kernel)
        return pullback(y)

    data = NamedSharding(mesh(), P("data"))
    x = jax.ShapeDtypeStruct((64, 6, 5, 4), jnp.float32, sharding=data)
    kernel = jnp.ones((3, 3, 4, 4))
    forward = collectives(layer, x, kernel, KEY)
    # The first value, about which the others are measured, then all moments at once.
    assert len(forward) <= 2
    sums = {"all-reduce", "f32[4]", "f32[1,1,1,4]"}
    assert set().union(*forward) == sums
    found = set().union(*collectives(gradient, x, kernel, KEY))
    # A lattice's own gradient of the kernel comes with its axes in another order.
    assert found - {"f32[4,3,3,4]"} == {*sums, "f32[3,3,4,4]"}


ONE_EACH = {
    "BS": (sbn.BatchSampling(1), (1,)),
    "NS": (sbn.NaiveSampling(1), (2,)),
    "lattice": (sbn.LatticeSampling(), (1,)),
    "pixel": (sbn.LatticeSampling(), (1, 1, 1)),
}


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("folded", [False, True])
def test_one_value_a_device_is_enough_where_devices_pool(name, folded):
    sampler, extent = ONE_EACH[name]
    x = cases.inputs((8, *extent, 3))
    kernel = cases.inputs((3, 3), seed=1)
    options = {"sampler": sampler, "key": KEY, "axis_name": "devices"}

    def norm(x):
        if folded:
            return sbn.dense_norm(x, kernel, **options)
        return sbn.batch_norm(x @ kernel, **options)

    _, statistics = jax.vmap(norm, axis_name="devices")(x)
    values = (x[:, -1:] @ kernel).reshape(8, 3)
    expected = sbn.Statistics(values.mean(0), values.var(0))
    for i in range(8):
        one = jax.tree.map(lambda s, i=i: s[i], statistics)
        assert_trees_close(one, expected, num=8)


@pytest.mark.parametrize("groups", [None, [[0], [1]]])
def test_one_value_in_all_is_still_too_few(groups):
    x = jnp.ones((1 if groups is None else 2, 1, 3))
    norm = functools.partial(
        sbn.batch_norm,
        sampler=sbn.NaiveSampling(1),
        axis_name="devices",
        axis_index_groups=groups,
    )
    message = r"at least 2 measured values per feature, got 1 .* or pool devices"
    with pytest.raises(ValueError, match=message):
        jax.pmap(norm, axis_name="devices")(x)
