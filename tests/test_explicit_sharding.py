"""Meshes with explicit axis types: the numbers of one device, and what is sent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_trees_close
from tests.devices import collectives
from tests.samples import KEY

SAMPLERS = {
    "all": None,
    **cases.SAMPLERS,
}
SHAPE = (32, 8, 8, 3)
KERNEL = cases.inputs((3, 3, 3, 4), seed=2)
MESH = ((4, 2), ("data", "model"), (AxisType.Explicit, AxisType.Auto))


def on_images(x):
    """Lays an array out over a mesh with an explicit axis."""
    return jax.device_put(x, NamedSharding(jax.make_mesh(*MESH), P("data")))


def on_mesh(function, x, *args):
    """Runs a function of images that lie on several devices; all have the rest."""
    mesh = jax.make_mesh(*MESH)
    args = jax.device_put(args, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        return function(on_images(x), *args)


def norm(x, kernel, key, sampler, mask=None):
    return sbn.batch_norm(x, sampler=sampler, key=key, mask=mask)


def conv(x, kernel, key, sampler, mask=None):
    if mask is not None:
        mask = mask[..., :1]
    return sbn.conv_norm(
        x,
        kernel,
        sampler=sampler,
        key=key,
        mask=mask,
        activation=jax.nn.relu,
        dtype=x.dtype,
    )


def dense(x, kernel, key, sampler, mask=None):
    return sbn.dense_norm(
        x,
        kernel[0, 0],
        sampler=sampler,
        key=key,
        residual=x[..., :1] + jnp.zeros((1, 1, 1, 4)),
        dtype=x.dtype,
    )


def with_gradients(function, sampler, masked):
    def loss(x, kernel, key):
        mask = x > 0.5 if masked else None
        y, statistics = function(x, kernel, key, sampler, mask)
        return (y.astype(jnp.float32) ** 2).mean(), (y, statistics)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


CASES = cases.pairwise(
    name=list(SAMPLERS),
    function=[norm, conv, dense],
    dtype=["float32", "bfloat16"],
    masked=[False, True],
)


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(getattr(v, "__name__", str(v)) for v in case.values()),
)
def test_results_and_gradients_are_those_of_one_device(case):
    dtype, x = case["dtype"], cases.inputs(SHAPE, case["dtype"])
    run = with_gradients(case["function"], SAMPLERS[case["name"]], case["masked"])
    sharded = on_mesh(run, x, KERNEL, KEY)
    (dx, _), (y, statistics) = sharded
    for array in (y, dx):
        assert array.dtype == dtype
        assert jax.typeof(array).sharding.spec[0] == "data"
    for array in statistics:
        assert jax.typeof(array).sharding.spec[0] is None
    assert_trees_close(sharded, run(x, KERNEL, KEY), dtype=dtype, num=x.size)


@pytest.mark.parametrize("name", ["FS", "VDN", "BS", "lattice"])
def test_arrays_tell_their_mesh_outside_jit(name):
    x = cases.inputs(SHAPE)
    y, _ = norm(on_images(x), None, KEY, SAMPLERS[name])
    assert_trees_close(y, norm(x, None, KEY, SAMPLERS[name])[0], num=x.size)


def linen_layer(norm_cls):
    layer = sbn.linen.ConvNorm(
        4,
        (3, 3),
        norm_cls=getattr(sbn.linen, norm_cls),
        sampler=sbn.FeatureSampling(1 / 4),
        use_running_average=False,
    )
    variables = layer.init(KEY, jnp.zeros((1, *SHAPE[1:])))
    return jax.jit(
        lambda x: layer.apply(
            variables, x, mutable=["batch_stats"], rngs={"sampling": KEY}
        )
    )


def nnx_layer(norm_cls):
    layer = sbn.nnx.ConvNorm(
        3,
        4,
        (3, 3),
        norm_cls=getattr(sbn.nnx, norm_cls),
        sampler=sbn.FeatureSampling(1 / 4),
        rngs=nnx.Rngs(0),
    )

    @nnx.jit
    def run(layer, x):
        y = layer(x)
        return y, (layer.norm.mean[...], layer.norm.var[...])

    return lambda x: run(nnx.clone(layer), x)


@pytest.mark.parametrize("norm_cls", ["BatchNorm", "BatchRenorm", "L1BatchNorm"])
@pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
def test_layers_train(layer, norm_cls):
    run, x = layer(norm_cls), cases.inputs(SHAPE)
    assert_trees_close(on_mesh(run, x), run(x), num=x.size)


def with_virtual(x):
    images = sbn.append_virtual(x, sbn.virtual_samples(KEY, 4, x.shape[1:]), strata=4)
    return images, sbn.drop_virtual(images, 4, strata=4)


def repeated(x):
    return sbn.repeat_examples(x, 2)


@pytest.mark.parametrize("change", [with_virtual, repeated])
def test_images_are_added_and_dropped_where_they_lie(change):
    x = cases.inputs(SHAPE)
    for actual, expected in zip(
        jax.tree.leaves(on_mesh(jax.jit(change), x)),
        jax.tree.leaves(change(x)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)
        assert jax.typeof(actual).sharding.spec[0] == "data"
    assert on_mesh(functools.partial(collectives, change), x) == []


@pytest.mark.parametrize(
    "sampler",
    [
        sbn.BatchSampling(8, strata=4),
        sbn.FeatureSampling(1 / 4),
        sbn.FeatureSampling(1 / 4, groups=None),
        sbn.VirtualSampling(8, strata=4),
        sbn.LatticeSampling(2, min_values=1),
    ],
    ids=str,
)
def test_only_sums_of_features_are_communicated(sampler):
    def layer(x, key):
        return norm(x, None, key, sampler)[0]

    found = on_mesh(functools.partial(collectives, layer), cases.inputs(SHAPE), KEY)
    assert found
    assert set().union(*found) <= {"all-reduce", "f32[3]", "f32[1,1,1,3]"}
