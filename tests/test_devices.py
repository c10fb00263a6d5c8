"""Statistics over several devices: pooled values, and the communication they cost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from flax_sbn.sampling import sampled_parts
from tests import cases, reference, samples
from tests.closeness import assert_close
from tests.devices import collectives, mesh
from tests.samples import KEY

SAMPLERS = {"all": None, **cases.SAMPLERS}
DEVICES = 8
SHARDED, REPLICATED = P("data"), P()
SHARD = cases.SHAPES[4]
SHAPE = (DEVICES * SHARD[0], *SHARD[1:])


def vmapped(function, *args):
    """Runs ``function`` on every device's images, by vmap."""
    split = [a.reshape(DEVICES, -1, *a.shape[1:]) for a in args]
    out = jax.jit(jax.vmap(function, axis_name="data"))(*split)
    chex.assert_trees_all_close(out, jax.tree.map(lambda a: a[:1] + 0 * a, out))
    return jax.tree.map(lambda a: a[0], out)


def shard_mapped(function, *args, check_vma=True, out=REPLICATED):
    """Runs ``function`` on every device's images, by shard_map."""
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh(),
            in_specs=SHARDED,
            out_specs=out,
            check_vma=check_vma,
        )
    )(*args)


def pooled(x, sampler, mask=True):
    """Moments of what all devices measure; each part is pooled by itself."""
    x = np.asarray(x)
    wheres, weights = samples.measured(sampler, SHARD[:-1])
    wheres = [np.tile(where, (DEVICES, 1, 1))[..., None] & mask for where in wheres]
    shares = reference.shares([np.broadcast_to(w, x.shape) for w in wheres], weights)
    mean = (shares * x).sum(reference.over(x))
    return mean, (shares * (x - mean) ** 2).sum(reference.over(x))


def unequal_mask():
    """Leaves ever less on a device, and nothing on the last."""
    images = np.random.default_rng(3).random(SHAPE).reshape(DEVICES, -1)
    return (images > np.linspace(0.2, 1, DEVICES)[:, None]).reshape(SHAPE)


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        name=list(SAMPLERS),
        run=[vmapped, shard_mapped],
        masked=[True, False],
        origin=[None, 1.0],
    ),
    ids=lambda case: "-".join(getattr(v, "__name__", str(v)) for v in case.values()),
)
def test_pooled_statistics_are_those_of_one_device_with_all_samples(case):
    sampler, x = SAMPLERS[case["name"]], np.asarray(cases.inputs(SHAPE))
    running = case["origin"] and sbn.Statistics(jnp.ones(3), jnp.ones(3))
    mask = unequal_mask() if case["masked"] else np.ones(SHAPE, bool)

    def measure(x, mask):
        return sbn.batch_statistics(
            x,
            sampler=sampler,
            key=KEY,
            mask=mask if case["masked"] else None,
            axis_name="data",
            running=running,
        )

    actual = case["run"](measure, jnp.where(mask, x, jnp.nan), jnp.asarray(mask))
    mean, var = pooled(x, sampler, mask)
    assert_close(actual.mean, mean, num=x.size)
    assert_close(actual.var, var, num=x.size)


def test_devices_that_all_have_nothing_give_the_running_statistics():
    running = sbn.Statistics(jnp.full(3, 2.0), jnp.full(3, 3.0))
    actual = vmapped(
        lambda x: sbn.batch_statistics(
            x, mask=False, axis_name="data", running=running
        ),
        jnp.full(SHAPE, jnp.nan),
    )
    chex.assert_trees_all_equal(actual, running)


def linen_layer(x):
    layer = sbn.linen.BatchNorm(
        use_running_average=False,
        momentum=0.0,
        sampler=SAMPLERS["VDN"],
        axis_name="data",
    )
    variables = layer.init(KEY, x)
    return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]


def nnx_layer(x):
    layer = sbn.nnx.BatchNorm(
        3,
        momentum=0.0,
        sampler=SAMPLERS["VDN"],
        axis_name="data",
        rngs=nnx.Rngs(0),
    )
    layer(x)
    return {"mean": layer.mean[...], "var": layer.var[...]}


@pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
def test_layers_pool_over_their_named_axis(layer):
    x = cases.inputs(SHAPE)
    stats, (mean, var) = vmapped(layer, x), pooled(x, SAMPLERS["VDN"])
    assert_close(stats["mean"], mean, num=x.size)
    assert_close(stats["var"], var, num=x.size)


def test_groups_of_devices_pool_separately():
    x = cases.inputs(SHAPE)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    actual = shard_mapped(
        lambda x: jax.tree.map(
            lambda s: s[None],
            sbn.batch_statistics(x, axis_name="data", axis_index_groups=groups),
        ),
        x,
        check_vma=False,
        out=SHARDED,
    )
    for devices, half in zip(groups, jnp.split(x, 2), strict=True):
        mean, var = samples.moments(half, None)
        for device in devices:
            assert_close(actual.mean[device], mean, num=half.size)
            assert_close(actual.var[device], var, num=half.size)


@pytest.mark.parametrize("name", ["all", "BS", "FS", "BS+VDN", "lattice"])
def test_gradients_through_pooled_statistics_are_those_of_one_device(name):
    sampler, x = SAMPLERS[name], cases.inputs(SHAPE)
    g = cases.inputs(SHAPE, seed=1)

    def loss(x, g):
        y, _ = sbn.batch_norm(x, sampler=sampler, key=KEY, axis_name="data")
        return (y * g).sum(keepdims=True)

    gradient = jax.grad(lambda x: shard_mapped(loss, x, g, out=SHARDED).sum())(x)
    wheres, weights = samples.measured(sampler, SHARD[:-1])
    wheres = [np.tile(where, (DEVICES, 1, 1))[..., None] for where in wheres]
    shares = reference.shares([np.broadcast_to(w, SHAPE) for w in wheres], weights)
    expected, _, _ = reference.backward(x, g, shares, np.ones(3))
    assert_close(gradient, expected, num=x.size)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_pooled_statistics_of_mean_1000_and_deviation_1_are_precise(name):
    x = 1000 + (cases.inputs(SHAPE) - 1) / 2
    running = sbn.Statistics(jnp.full(3, 999.0), jnp.ones(3))
    actual = vmapped(
        lambda x: sbn.batch_statistics(
            x, sampler=cases.SAMPLERS[name], key=KEY, axis_name="data", running=running
        ),
        x,
    )
    mean, var = pooled(np.float64(x), cases.SAMPLERS[name])
    assert_close(actual.mean, mean)
    assert_close(actual.var, var, c=1000)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("pooled", [False, True])
def test_pooling_costs_one_all_reduce_and_nothing_else_communicates(name, pooled):
    def layer(x, key):
        return sbn.batch_norm(
            x,
            sampler=SAMPLERS[name],
            key=key,
            mask=jnp.isfinite(x),
            axis_name="data" if pooled else None,
        )[0]

    sharded = jax.shard_map(
        layer, mesh=mesh(), in_specs=(SHARDED, REPLICATED), out_specs=SHARDED
    )
    found = collectives(sharded, cases.inputs(SHAPE), KEY)
    assert [kind for kind, *_ in found] == ["all-reduce"] * pooled


# Under jit, one stratum for each data shard, or patches of images, are read in place.
LOCAL = [
    sbn.BatchSampling(16, strata=8),
    sbn.CopySampling(2),
    sbn.VirtualSampling(16, strata=8),
    sbn.FeatureSampling(1 / 4),
    sbn.FeatureSampling(1 / 4, groups=1),
    sbn.LatticeSampling(1, min_values=1),
    sbn.MixedSampling(sbn.FeatureSampling(1 / 4), sbn.VirtualSampling(16, strata=8)),
    sbn.MixedSampling(
        sbn.BatchSampling(16, strata=8), sbn.VirtualSampling(16, strata=8)
    ),
]


def on_shards(shape):
    data = NamedSharding(mesh(), SHARDED)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=data)


@pytest.mark.parametrize("sampler", LOCAL, ids=str)
def test_under_jit_values_are_taken_without_communication(sampler):
    def take(x, key):
        parts = sampled_parts(sampler, x.shape[:-1], key)
        return [part.take(x, range(x.ndim - 1)) for part in parts]

    assert collectives(take, on_shards(SHAPE), KEY) == []


@pytest.mark.parametrize("sampler", LOCAL, ids=str)
def test_under_jit_only_sums_of_features_are_communicated(sampler):
    def layer(x, key):
        return sbn.batch_norm(x, sampler=sampler, key=key)[0]

    def gradient(x, key):
        return jax.vjp(lambda x: layer(x, key), x)[1](x)[0]

    forward = collectives(layer, on_shards(SHAPE), KEY)
    # For each part one of its values, as origin, and the sums of both moments.
    assert len(forward) <= 2 * len(sampled_parts(sampler, SHAPE[:-1], KEY))
    for found in (forward, collectives(gradient, on_shards(SHAPE), KEY)):
        assert set().union(*found) <= {"all-reduce", "f32[3]", "f32[1,1,1,3]"}
