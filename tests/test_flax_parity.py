"""Without a sampler the layers are flax's to the bit; checkpoints load both ways."""

import dataclasses
import inspect

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_close, eps

pytestmark = pytest.mark.optimized

SHAPE = (4, 6, 5, 3)
KEY = jax.random.key(0)

SHARED = {
    "x": ["float32", "bfloat16", "float16", "complex64"],
    "masked": [False, True],
    "dtype": [None, "float32", "bfloat16", "float16"],
    "axis_name": [None, "device"],
    "param_dtype": ["float32", "bfloat16"],
    "use_scale": [True, False],
    "use_bias": [True, False],
    "use_fast_variance": [True, False],
    "momentum": [0.99, 0.8],
    "epsilon": [1e-5, 1e-2],
}
LINEN = {"axis": [-1, 1, (1, 3)], "force_float32_reductions": [True, False]}
# flax's nnx layer has no place for a complex mean.
NNX = {"axis": [-1, 1], "x": SHARED["x"][:3]}


def rows(**options):
    """Every two options together, compiled; and every fourth time uncompiled."""
    every = cases.pairwise(**options)
    return [{"jit": True, **row} for row in every] + [
        {"jit": False, **row} for row in every[::4]
    ]


def name(row):
    return "-".join(map(str, row.values()))


def setting(row):
    """The input, mask and call of a row, and what remains: the layer's options."""
    options = dict(row)
    x = cases.inputs(SHAPE, options.pop("x"))
    mask = np.random.default_rng(1).random(SHAPE) < 0.7
    mask = mask if options.pop("masked") else None
    if jnp.iscomplexobj(x):
        options["dtype"] = None  # nothing complex fits into the others
    return x, mask, jax.jit if options.pop("jit") else lambda f: f, options


def square(y):
    """A real loss of any output."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return (jnp.abs(y) ** 2 * cases.inputs(y.shape, seed=2)).sum()


def split_call(call, axis_name):
    """Calls on two halves of the rows where the layer names an axis of devices."""
    if axis_name is None:
        return call

    def halves(x, mask):
        split = [None if a is None else jnp.stack(jnp.split(a, 2)) for a in (x, mask)]
        return jax.vmap(call, axis_name=axis_name)(*split)

    return halves


def run_linen(cls, row):
    """Output, updated statistics, gradients and evaluation of a linen layer."""
    x, mask, transform, options = setting(row)
    layer = cls(**options)
    variables = layer.init(KEY, x, use_running_average=True)
    variables = jax.tree.map(
        lambda v: v + cases.inputs(v.shape, seed=3).astype(v.dtype) ** 2, variables
    )

    def apply(variables, x, train=True):
        def call(x, mask):
            return layer.apply(
                variables,
                x,
                use_running_average=not train,
                mask=mask,
                mutable=["batch_stats"],
            )

        y, updated = split_call(call, layer.axis_name)(x, mask)
        return square(y), (y, updated)

    gradient = transform(jax.grad(apply, (0, 1), has_aux=True))
    gradients, (y, updated) = gradient(variables, x)
    evaluated, _ = apply(variables, x, train=False)[1]
    return {"y": y, "stats": updated, "grads": gradients, "evaluated": evaluated}


def run_nnx(cls, row):
    """Output, updated statistics, gradients and evaluation of an nnx layer."""
    x, mask, transform, options = setting(row)
    layer = cls(SHAPE[options["axis"]], rngs=nnx.Rngs(0), **options)
    graph, *state = nnx.split(layer, nnx.Param, nnx.BatchStat)
    params, stats = jax.tree.map(
        lambda v: v + cases.inputs(v.shape, seed=3).astype(v.dtype) ** 2, state
    )

    def apply(params, x, train=True):
        def call(x, mask):
            layer = nnx.merge(graph, params, stats, copy=True)
            y = layer(x, use_running_average=not train, mask=mask)
            return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        y, updated = split_call(call, layer.axis_name)(x, mask)
        return square(y), (y, updated)

    gradient = transform(jax.grad(apply, (0, 1), has_aux=True))
    (by_params, by_x), (y, updated) = gradient(params, x)
    gradients = nnx.to_pure_dict(by_params), by_x
    evaluated, _ = apply(params, x, train=False)[1]
    return {"y": y, "stats": updated, "grads": gradients, "evaluated": evaluated}


def assert_same(ours, theirs, row):
    """Asserts equality to the bit, but for how XLA fuses the check for empty masks.

    It does so only where ``vmap`` stands for several devices.
    """
    stats = ours.pop("stats"), theirs.pop("stats")
    chex.assert_trees_all_equal(ours, theirs, strict=True)
    if row["jit"] and row["masked"] and row["axis_name"]:
        chex.assert_trees_all_close(*stats, rtol=2 * eps("float32"))
    else:
        chex.assert_trees_all_equal(*stats, strict=True)


@pytest.mark.parametrize("row", rows(**SHARED | LINEN), ids=name)
def test_linen_without_a_sampler_is_flax_to_the_bit(row):
    assert_same(run_linen(sbn.linen.BatchNorm, row), run_linen(nn.BatchNorm, row), row)


@pytest.mark.parametrize("row", rows(**SHARED | NNX), ids=name)
def test_nnx_without_a_sampler_is_flax_to_the_bit(row):
    assert_same(run_nnx(sbn.nnx.BatchNorm, row), run_nnx(nnx.BatchNorm, row), row)


@pytest.mark.parametrize(
    "row",
    cases.pairwise(
        dtype=["float32", "bfloat16", "float16", "complex64"],
        axis=[-1, 1, (1, 3)],
        fast=[True, False],
        masked=[True, False],
        epsilon=[1e-5, 1e-2],
    ),
    ids=name,
)
def test_the_function_without_a_sampler_is_flax_to_rounding(row):
    x = cases.inputs(SHAPE, row["dtype"])
    mask = np.random.default_rng(1).random(SHAPE) < 0.7 if row["masked"] else None
    options = {"axis": row["axis"], "epsilon": row["epsilon"]}
    layer = nn.BatchNorm(
        use_running_average=False,
        momentum=0.0,
        use_fast_variance=row["fast"],
        **options,
    )
    variables = layer.init(KEY, x)
    expected, updated = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    actual, statistics = sbn.batch_norm(
        x, **variables["params"], mask=mask, use_fast_variance=row["fast"], **options
    )
    # The sums are divided in another place, which rounds otherwise.
    chex.assert_type(actual, expected.dtype)
    assert_close(actual, expected, row["dtype"])
    for name, statistic in updated["batch_stats"].items():
        assert_close(getattr(statistics, name), statistic)


LINEN_FIELDS = [
    "use_running_average",
    "axis",
    "momentum",
    "epsilon",
    "dtype",
    "param_dtype",
    "use_bias",
    "use_scale",
    "bias_init",
    "scale_init",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "force_float32_reductions",
]
NNX_ARGUMENTS = [
    "num_features",
    *LINEN_FIELDS[:-1],
    "promote_dtype",
    "rngs",
    "bias_metadata",
    "scale_metadata",
]


def fields(cls):
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]


def arguments(cls):
    return {*inspect.signature(cls.__init__).parameters} - {"self"}


def test_flax_linen_has_no_new_option():
    assert fields(nn.BatchNorm) == LINEN_FIELDS
    ours = ["sampler", "running_weight", "ghost_groups", "rng_collection"]
    assert fields(sbn.linen.BatchNorm) == [*LINEN_FIELDS, *ours]


def test_flax_nnx_has_no_new_option():
    assert arguments(nnx.BatchNorm) == set(NNX_ARGUMENTS)
    ours = {"sampler", "running_weight", "ghost_groups", "rng_collection"}
    assert arguments(sbn.nnx.BatchNorm) == {"num_features", *ours, "rngs", "options"}


class LinenNet(nn.Module):
    norm: type
    options: dict

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = self.norm(use_running_average=not train, **self.options)(nn.Dense(4)(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs, **options):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = norm(4, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(self.dense(x))


OURS = [{}, {"sampler": sbn.BatchSampling(4)}]


@pytest.mark.parametrize("options", OURS, ids=str)
def test_linen_checkpoints_load_both_ways(options):
    x = cases.inputs((8, 3))
    ours, theirs = LinenNet(sbn.linen.BatchNorm, options), LinenNet(nn.BatchNorm, {})
    variables, expected = (
        ours.init(KEY, x, True),
        theirs.init(jax.random.key(1), x, True),
    )
    assert "BatchNorm_1" in variables["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, expected)
    for a, b in [(variables, expected), (expected, variables)]:
        loaded = flax.serialization.from_bytes(a, flax.serialization.to_bytes(b))
        chex.assert_trees_all_equal(loaded, b)
        chex.assert_trees_all_equal(
            ours.apply(loaded, x, False), theirs.apply(loaded, x, False)
        )


@pytest.mark.parametrize("options", OURS, ids=str)
def test_nnx_checkpoints_load_both_ways(options):
    x = cases.inputs((8, 3))
    ours = NnxNet(sbn.nnx.BatchNorm, nnx.Rngs(0), **options)
    theirs = NnxNet(nnx.BatchNorm, nnx.Rngs(1))
    for a, b in [(ours, theirs), (theirs, ours)]:
        saved = nnx.state(b, (nnx.Param, nnx.BatchStat))
        assert nnx.to_pure_dict(saved).keys() == {"dense", "norm"}
        nnx.update(a, saved)
        chex.assert_trees_all_equal(nnx.state(a, (nnx.Param, nnx.BatchStat)), saved)
        chex.assert_trees_all_equal(
            nnx.view(a, use_running_average=True)(x),
            nnx.view(b, use_running_average=True)(x),
        )
        b.dense.kernel[...] = 2 * b.dense.kernel[...]


@pytest.mark.parametrize("shape", [(0, 3), (3,), (4, 0, 3)])
def test_the_function_without_a_sampler_takes_what_flax_takes(shape):
    x = cases.inputs(shape)
    theirs = nn.BatchNorm(use_running_average=False)
    variables = theirs.init(jax.random.key(0), jnp.ones((2, 3)))
    expected, updates = theirs.apply(variables, x, mutable=["batch_stats"])
    y, statistics = sbn.batch_norm(x)
    chex.assert_trees_all_equal(y, expected)
    start = sbn.Statistics(jnp.zeros(3), jnp.ones(3))
    running = sbn.update_running(start, statistics, 0.99)._asdict()
    chex.assert_trees_all_close(running, updates["batch_stats"])


@pytest.mark.parametrize("shape", [(2, 0, 8, 3), (0, 8, 8, 3), (8, 8, 3)])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_folded_layers_evaluate_what_flax_convolves(api, shape):
    x = cases.inputs(shape)
    if api == "linen":
        layer = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True)
        variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        y, kernel = layer.apply(variables, x), variables["params"]["conv"]["kernel"]
    else:
        layer = sbn.nnx.ConvNorm(3, 4, (3, 3), epsilon=1e-5, rngs=nnx.Rngs(0))
        layer.eval()
        y, kernel = layer(x), layer.conv.kernel[...]
    plain = nn.Conv(4, (3, 3), use_bias=False)
    expected = plain.apply({"params": {"kernel": kernel}}, x)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-5)
