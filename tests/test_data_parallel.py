"""A network on eight devices in three ways: one device's numbers, and what is sent."""

import functools
import math
import operator
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_trees_close
from tests.devices import collectives
from tests.networks import LAYERS, SHAPE, Norm, batch, linen_step, nnx_step
from tests.samples import KEY

SHARDS = 8


def gradients(loss, *args):
    """Returns loss and statistics, and the gradients of the parameters."""
    return jax.value_and_grad(loss, has_aux=True)(*args)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((SHARDS,), ("data",), axis_types=(kind,))


def by_jit(kind):
    """Returns how to run on arrays that lie on several devices."""

    def run(loss, params, state, x, labels, key, lower=False):
        rows, everywhere = (NamedSharding(mesh(kind), p) for p in (P("data"), P()))
        args = (
            *jax.device_put((params, state), everywhere),
            *jax.device_put((x, labels), rows),
            jax.device_put(key, everywhere),
        )
        with jax.set_mesh(mesh(kind)):
            function = functools.partial(gradients, loss)
            return collectives(function, *args) if lower else jax.jit(function)(*args)

    return run


def by_shard_map(loss, *args, lower=False, synchronized=True):
    """Runs on each device's images; averages the loss, but not the statistics."""

    def shard(*args):
        def mean_loss(*args):
            value, updates = loss(*args)
            return jax.lax.pmean(value, "data"), updates

        (value, updates), grads = gradients(mean_loss, *args)
        if not synchronized:
            updates = jax.tree.map(lambda u: u[None], updates)
        return (value, updates), grads

    step = jax.shard_map(
        shard,
        mesh=mesh(),
        in_specs=(P(), P(), P("data"), P("data"), P()),
        # P() is an error where the devices' results may differ.
        out_specs=((P(), P() if synchronized else P("data")), P()),
    )
    return collectives(step, *args) if lower else jax.jit(step)(*args)


# What a device measures, and the same of the whole batch on one device. Of patches, all
# images share one place: else it depends on the image's place in the batch.
PATCH = sbn.FeatureSampling(1 / 4, groups=1)
LATTICE = sbn.LatticeSampling(2, min_values=1)  # 8 of 64 positions
SAMPLERS = {
    "all": (None, None),
    "BS": (sbn.BatchSampling(2), sbn.BatchSampling(16, strata=8)),
    "FS": (PATCH, PATCH),
    "VDN": (sbn.VirtualSampling(2), sbn.VirtualSampling(16, strata=8)),
    "FS+VDN": (
        sbn.MixedSampling(PATCH, sbn.VirtualSampling(1)),
        sbn.MixedSampling(PATCH, sbn.VirtualSampling(8, strata=8)),
    ),
    "lattice": (LATTICE, LATTICE),
}
WAYS = {
    "jit": by_jit(AxisType.Auto),
    "explicit": by_jit(AxisType.Explicit),
    "shard_map": by_shard_map,
}


def pairs(**options):
    """Makes a test of cases in which every two options meet."""
    return pytest.mark.parametrize(
        "case",
        cases.pairwise(**options),
        ids=lambda case: "-".join(
            getattr(v, "__name__", str(v)) for v in case.values()
        ),
    )


@pairs(
    name=list(SAMPLERS),
    way=list(WAYS),
    folded=[False, True],
    step=[linen_step, nnx_step],
)
def test_a_step_is_that_of_one_device(case):
    per_device, of_all = SAMPLERS[case["name"]]
    mapped = case["way"] == "shard_map"
    norm = Norm(of_all, folded=case["folded"])
    there = Norm(per_device, "data", case["folded"]) if mapped else norm
    params, state, alone = case["step"](norm)
    args = (params, state, *batch(), KEY)
    expected = jax.jit(functools.partial(gradients, alone))(*args)
    *_, loss = case["step"](there)
    actual = WAYS[case["way"]](loss, *args)
    assert_trees_close(actual, expected, num=SHAPE[0] * SHAPE[1] * SHAPE[2])


def sent(way, norm, step=linen_step):
    params, state, loss = step(norm)
    run = WAYS[way]
    if way == "shard_map":
        run = functools.partial(run, synchronized=norm.axis_name is not None)
    return run(loss, params, state, *batch(), KEY, lower=True)


LOCAL = [sampler for sampler, _ in SAMPLERS.values()] + [
    sbn.NaiveSampling(2),
    sbn.FeatureSampling(1 / 4),
    sbn.CopySampling(2),
]


@pytest.mark.parametrize("step", [linen_step, nnx_step])
def test_without_a_norm_only_loss_and_gradients_are_sent(step):
    found = sent("shard_map", Norm(none=True), step)
    assert [kind for kind, *_ in found] == ["all-reduce"]


@pairs(sampler=LOCAL, folded=[False, True], step=[linen_step, nnx_step])
def test_statistics_of_each_device_send_nothing_more(case):
    norm = Norm(case["sampler"], None, case["folded"])
    found = sent("shard_map", norm, case["step"])
    assert [kind for kind, *_ in found] == ["all-reduce"]


@pairs(
    sampler=[None, sbn.BatchSampling(2), sbn.FeatureSampling(1 / 4)],
    way=["jit", "explicit"],
    step=[linen_step, nnx_step],
)
def test_a_group_for_each_device_sends_nothing_more_under_jit(case):
    norm = Norm(case["sampler"], ghost_groups=SHARDS)
    found = sent(case["way"], norm, case["step"])
    assert [kind for kind, *_ in found] == ["all-reduce"]


@pytest.mark.parametrize("way", ["jit", "explicit"])
def test_groups_of_images_have_the_numbers_of_one_device(way):
    norm = Norm(sbn.FeatureSampling(1 / 4), ghost_groups=SHARDS)
    params, state, loss = linen_step(norm)
    args = (params, state, *batch(), KEY)
    expected = jax.jit(functools.partial(gradients, loss))(*args)
    assert_trees_close(WAYS[way](loss, *args), expected, num=math.prod(SHAPE[:3]))


def assert_sums_of_features(found, forward, times=1):
    """Asserts how much is sent: kernels' gradients, and small sums in each layer."""
    assert {kind for kind, *_ in found} == {"all-reduce"}
    rounds = LAYERS * (forward + 1)  # and one in the backward pass
    assert len(found) <= rounds + 1
    floats = sum(
        math.prod(map(int, re.findall(r"\d+", shape.split("[")[1])))
        for _, *shapes in found
        for shape in shapes
    )
    params, *_ = linen_step(Norm())
    gradients = sum(param.size for param in jax.tree.leaves(params))
    assert floats <= 1 + times * gradients + rounds * 8 * 4  # of 4 features


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("sampler", LOCAL, ids=str)
def test_synchronized_statistics_send_one_sum_a_layer(sampler, folded):
    found = sent("shard_map", Norm(sampler, "data", folded))
    assert_sums_of_features(found, forward=1)


@pairs(name=list(SAMPLERS), folded=[False, True], way=["jit", "explicit"])
def test_a_batch_on_many_devices_sends_sums_only(case):
    name, folded = case["name"], case["folded"]
    found = sent(case["way"], Norm(SAMPLERS[name][1], folded=folded))
    # One to know a value to shift by, one for each part's moments about it.
    parts = {"all": 0, "FS+VDN": 2}.get(name, 1)
    # XLA adds up the gradients of a folded kernel and of each part's one by one.
    assert_sums_of_features(found, 1 + parts, times=1 + parts * folded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folded_kernels_gradient_is_sent_in_the_computations_dtype(dtype):
    """Its value is that of one device; what is sent is that of a layer not folded."""
    kernel = cases.inputs((3, 3, 3, 4), seed=1)
    x = cases.inputs(SHAPE).astype(dtype)

    def loss(kernel, x):
        sampler = sbn.FeatureSampling(1 / 4, groups=1)
        y, _ = sbn.conv_norm(x, kernel, sampler=sampler, key=KEY, dtype=dtype)
        return (y.astype("float32") ** 3).mean()

    def shard(kernel, x):
        return jax.grad(lambda *args: jax.lax.pmean(loss(*args), "data"))(kernel, x)

    step = jax.jit(
        jax.shard_map(shard, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())
    )
    lowered = step.lower(kernel, x).as_text()
    sums = re.findall(r"stablehlo\.all_reduce.*?-> tensor<(.*?)>", lowered, re.DOTALL)
    assert [kind for kind in sums if kind.startswith("3x3")] == [
        {"float32": "3x3x3x4xf32", "bfloat16": "3x3x3x4xbf16"}[dtype]
    ]
    images = SHAPE[0] // SHARDS
    alone = [
        jax.grad(loss)(kernel, x[i : i + images]) for i in range(0, len(x), images)
    ]
    expected = functools.reduce(operator.add, alone) / SHARDS
    difference = jnp.abs(step(kernel, x) - expected).max() / jnp.abs(expected).max()
    assert difference < {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
