"""Blocks of each entry of a leading axis: as NumPy takes them, in every direction."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from flax_sbn import batched_slice as module
from flax_sbn import tpu_blocks
from flax_sbn.batched_slice import batched_slice, fork
from tests import cases
from tests.devices import collectives, mesh

pytestmark = pytest.mark.optimized

SHAPE = (4, 4, 5, 3)
# Axes, sizes, and for each axis the four starts.
BLOCKS = {
    "inside": ((1, 2), (2, 2), [[0, 2, 1, 2], [1, 3, 0, 2]]),
    "one-axis": ((2,), (3,), [[2, 0, 1, 2]]),
    "last-axis": ((3,), (2,), [[0, 1, 1, 0]]),
    "axes-apart": ((1, 3), (3, 1), [[1, 0, 1, 0], [2, 0, 1, 2]]),
    "sticking-out": ((1, 2), (3, 2), [[-2, 2, 3, -1], [-1, 4, 2, -1]]),
    "outside": ((1, 2), (2, 2), [[-2, 4, 9, -7], [0, 5, -2, 40]]),
    "larger": ((1, 2), (9, 7), [[-2, 0, -5, 1], [-1, -2, 0, -2]]),
    "larger-outside": ((2,), (8,), [[-9, 6, -8, 3]]),
    "longer-and-narrower": ((1, 2), (6, 2), [[-1, -2, 3, 0], [4, -1, 2, 3]]),
    "all-axes": ((1, 2, 3), (3, 4, 2), [[0, -1, 2, 1], [1, 3, -2, 0], [1, 2, -1, 0]]),
}


def block_arguments(name):
    axes, sizes, starts = BLOCKS[name]
    return [jnp.array(start, jnp.int32) for start in starts], axes, sizes


def places(name, shape=SHAPE):
    """The flat position that each value of the blocks has, and -1 where it has none."""
    axes, sizes, starts = BLOCKS[name]
    index = np.arange(np.prod(shape)).reshape(shape)
    blocks = []
    for g, entry in enumerate(index):
        for axis, size, start in zip(axes, sizes, starts, strict=True):
            place = np.arange(start[g], start[g] + size)
            inside = (place >= 0) & (place < entry.shape[axis - 1])
            entry = np.take(entry, np.where(inside, place, 0), axis - 1)
            where = inside.reshape(-1, *[1] * (entry.ndim - axis))
            entry = np.where(where, entry, -1)
        blocks.append(entry)
    return np.stack(blocks)


def taken(x, name):
    """The blocks, by NumPy."""
    index = places(name)
    return np.where(index >= 0, np.asarray(x).flat[index], np.zeros((), x.dtype))


def added(x, blocks, name):
    """The array with the blocks added where they are from, by NumPy."""
    x, index = np.array(x), places(name)
    np.add.at(x.reshape(-1), index[index >= 0], np.asarray(blocks)[index >= 0])
    return x


def tpu_slice(unrolled, x, starts, axes, sizes):
    """What a TPU runs instead of a gather."""
    return tpu_blocks.sliced(x, *starts, axes=axes, sizes=sizes, unrolled=unrolled)


DTYPES = ["float32", "bool", "int8", "bfloat16", "complex64"]
WAYS = {
    "gathered": (batched_slice, DTYPES),
    "tpu-one-by-one": (functools.partial(tpu_slice, True), DTYPES[:2]),
    "tpu-together": (functools.partial(tpu_slice, False), DTYPES[:2]),
}


@pytest.mark.parametrize(
    ("way", "dtype"), [(way, dtype) for way in WAYS for dtype in WAYS[way][1]]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_what_indexing_takes_and_zero_outside(name, dtype, way):
    function, _ = WAYS[way]
    x = jnp.asarray(np.random.default_rng(0).integers(0, 99, SHAPE), dtype)
    actual = jax.jit(lambda x: function(x, *block_arguments(name)))(x)
    chex.assert_trees_all_equal(np.asarray(actual), taken(x, name), strict=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_fork_gives_the_array_and_its_blocks(name):
    x = cases.inputs(SHAPE)
    actual = fork(x, *block_arguments(name))
    chex.assert_trees_all_equal(actual, (x, jnp.asarray(taken(x, name))))


def gradients(function, x, g):
    return jax.vjp(function, x)[1](g)[0]


@pytest.mark.parametrize("used", ["slice", "blocks", "array", "both"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_go_where_the_blocks_are_from(name, used):
    x = cases.inputs(SHAPE)
    starts, axes, sizes = block_arguments(name)
    g, g_blocks = cases.inputs(SHAPE, seed=1), cases.inputs(taken(x, name).shape)

    @jax.jit
    def gradient(x):
        if used == "slice":
            return gradients(
                lambda x: batched_slice(x, starts, axes, sizes), x, g_blocks
            )
        if used == "both":
            return gradients(lambda x: fork(x, starts, axes, sizes), x, (g, g_blocks))
        which, one = {"array": (0, g), "blocks": (1, g_blocks)}[used]
        return gradients(lambda x: fork(x, starts, axes, sizes)[which], x, one)

    expected = jnp.zeros_like(x) if used in ("slice", "blocks") else g
    if used != "array":
        expected = added(expected, g_blocks, name)
    chex.assert_trees_all_close(gradient(x), expected, rtol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_slice_is_its_own_transpose_at_the_negated_start(name):
    x = cases.inputs(SHAPE)
    starts, axes, sizes = block_arguments(name)
    g = cases.inputs(taken(x, name).shape, seed=1)
    back = batched_slice(g, [-s for s in starts], axes, [SHAPE[axis] for axis in axes])
    chex.assert_trees_all_equal(
        gradients(lambda x: batched_slice(x, starts, axes, sizes), x, g), back
    )


@pytest.mark.parametrize("unrolled", [True, False], ids=["one-by-one", "together"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_tpu_adds_blocks_to_the_array(name, dtype, unrolled):
    x = cases.inputs(SHAPE, dtype)
    starts, axes, _ = block_arguments(name)
    blocks = cases.inputs(taken(x, name).shape, dtype, seed=1)
    update = functools.partial(tpu_blocks.updated, axes=axes, unrolled=unrolled)
    actual = jax.jit(update)(x, blocks, *starts)
    other = jax.jit(functools.partial(module._join, axes=axes))(x, blocks, *starts)
    # The same single addition in float32, and one rounding.
    chex.assert_trees_all_equal(actual, other, strict=True)
    if dtype == "float32":
        chex.assert_trees_all_close(actual, added(x, blocks, name), rtol=1e-6)


@pytest.mark.parametrize("unrolled", [True, False], ids=["one-by-one", "together"])
def test_a_tpu_takes_blocks_of_arrays_with_axes_of_one(unrolled):
    x = cases.inputs((4, 1, 5, 1))
    starts, axes, sizes = block_arguments("one-axis")
    blocks = tpu_slice(unrolled, x, starts, axes, sizes)
    chex.assert_trees_all_equal(blocks, batched_slice(x, starts, axes, sizes))
    actual = tpu_blocks.updated(x, blocks, *starts, axes=axes, unrolled=unrolled)
    chex.assert_trees_all_equal(actual, module._join(x, blocks, *starts, axes=axes))


@pytest.mark.parametrize("name", ["sticking-out", "longer-and-narrower"])
def test_both_modes_and_second_order(name, x64):
    arguments = block_arguments(name)

    def function(x):
        whole, blocks = fork(x, *arguments)
        return jnp.sin(batched_slice(x, *arguments)) ** 2, whole**3, jnp.tanh(blocks)

    x = cases.inputs(SHAPE, "float64") / 4
    check_grads(jax.jit(function), (x,), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ["inside", "sticking-out"])
def test_vmap_of_values_and_gradients(name, dims):
    starts, axes, sizes = block_arguments(name)
    starts = jnp.stack(starts)
    x = cases.inputs(SHAPE)

    def function(x, starts):
        return *fork(x, list(starts), axes, sizes), batched_slice(
            x, starts, axes, sizes
        )

    def gradient(x, starts):
        return jax.grad(lambda x: sum((y**3).sum() for y in function(x, starts)))(x)

    pairs = [(x, starts), (2 * x, starts[:, ::-1])]
    pairs[1] = tuple(
        one if dim is None else other
        for one, other, dim in zip(*pairs, dims, strict=True)
    )
    mapped = [
        one if dim is None else jnp.stack([one, other], dim)
        for one, other, dim in zip(*pairs, dims, strict=True)
    ]
    for call in (function, gradient):
        each = [call(*pair) for pair in pairs]
        chex.assert_trees_all_close(
            jax.vmap(call, dims)(*mapped),
            jax.tree.map(lambda *parts: jnp.stack(parts), *each),
            rtol=1e-6,
        )


def test_vmap_of_starts_alone_gives_one_gradient_each():
    x = cases.inputs(SHAPE)
    starts, axes, sizes = block_arguments("inside")
    shifted = [jnp.stack([start, start[::-1]]) for start in starts]

    def loss(x):
        blocks = jax.vmap(lambda *s: fork(x, s, axes, sizes)[1])(*shifted)
        return (blocks**2).sum()

    def expected(x):
        each = [batched_slice(x, [s[i] for s in shifted], axes, sizes) for i in (0, 1)]
        return sum((blocks**2).sum() for blocks in each)

    chex.assert_trees_all_close(jax.grad(loss)(x), jax.grad(expected)(x), rtol=1e-6)


def squares(x):
    """A loss of the array and of its blocks."""
    return sum((y**2).sum() for y in fork(x, *block_arguments("sticking-out")))


GATHERED = (["gather"], ["scatter", "dynamic_slice"])
SLICED = (["dynamic_slice", "dynamic_update_slice"], ["gather", "scatter"])
TOGETHER = (["gather", "scatter"], ["dynamic_slice", "dynamic_update_slice"])


def assert_lowered(gradient, x, platform, expected):
    """What is in the program for a platform, and what is not."""
    exported = jax.export.export(jax.jit(gradient), platforms=[platform])
    program = exported(x).mlir_module()
    present, absent = expected
    for name in present:
        assert f'"stablehlo.{name}"' in program or f" stablehlo.{name} " in program
    for name in absent:
        assert f"stablehlo.{name}" not in program


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", GATHERED), ("cuda", GATHERED), ("tpu", SLICED)]
)
def test_no_scatter_is_left_in_the_gradient(platform, expected):
    assert_lowered(jax.grad(squares), jnp.ones(SHAPE), platform, expected)


def test_a_tpu_takes_many_blocks_together():
    axes, sizes, starts = BLOCKS["sticking-out"]
    starts = [jnp.array(start * 5, jnp.int32) for start in starts]

    def loss(x):
        return sum((y**2).sum() for y in fork(x, starts, axes, sizes))

    x = jnp.ones((5 * SHAPE[0], *SHAPE[1:]))
    assert_lowered(jax.grad(loss), x, "tpu", TOGETHER)


@pytest.mark.parametrize(
    ("mapped", "expected"),
    [((), TOGETHER), (("data",), TOGETHER), (("data", "model"), SLICED)],
    ids=str,
)
def test_tpus_slice_one_by_one_only_what_xla_need_not_divide(mapped, expected):
    # Every device would have to gather the rows of all.
    devices = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(devices, P("data"))
    gradient, rows = jax.grad(squares), SHAPE[0]
    if mapped:
        gradient = jax.shard_map(
            gradient,
            mesh=devices,
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names=set(mapped),
        )
        rows *= 2
    x = jax.ShapeDtypeStruct((rows, *SHAPE[1:]), jnp.float32, sharding=sharding)
    assert_lowered(gradient, x, "tpu", expected)


@pytest.mark.parametrize("used", ["slice", "update"])
def test_blocks_that_a_tpu_takes_together_stay_on_their_device(used):
    sharding = NamedSharding(mesh(), P("data"))
    axes, sizes, starts = BLOCKS["sticking-out"]
    starts = [jnp.array(start * 2, jnp.int32) for start in starts]
    x = jax.ShapeDtypeStruct((8, *SHAPE[1:]), jnp.float32, sharding=sharding)
    blocks = x.update(shape=tpu_blocks.block_shape(x.shape, axes, sizes))
    if used == "slice":
        sent = collectives(lambda x: tpu_slice(False, x, starts, axes, sizes), x)
    else:
        update = functools.partial(tpu_blocks.updated, axes=axes, unrolled=False)
        sent = collectives(lambda x, blocks: update(x, blocks, *starts), x, blocks)
    assert sent == []


def test_sharded_along_the_leading_axis_it_moves_nothing():
    sharding = NamedSharding(mesh(), P("data"))
    axes, sizes, starts = BLOCKS["sticking-out"]
    starts = [jnp.array(start * 2, jnp.int32) for start in starts]

    def gradient(x):
        whole, blocks = fork(x, starts, axes, sizes)
        (dx,) = jax.vjp(lambda x: fork(x, starts, axes, sizes), x)[1]((whole, blocks))
        return dx

    x = jax.ShapeDtypeStruct((8, *SHAPE[1:]), jnp.float32, sharding=sharding)
    assert collectives(gradient, x) == []

    x = cases.inputs((8, *SHAPE[1:]))
    mapped = jax.shard_map(
        lambda x, *starts: fork(x, starts, axes, sizes)[1],
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    chex.assert_trees_all_equal(
        mapped(x, *starts), batched_slice(x, starts, axes, sizes)
    )
