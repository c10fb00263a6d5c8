"""Blocks of each entry of a leading axis: as NumPy takes them, in every direction."""

import warnings

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from flax_sbn.xla.batched_slice import batched_slice
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


def put_back(blocks, name):
    """Zeros with the blocks where they are from, by NumPy."""
    x, index = np.zeros(SHAPE, blocks.dtype), places(name)
    x.flat[index[index >= 0]] = np.asarray(blocks)[index >= 0]
    return x


def slice_of(x, name):
    return batched_slice(x, *block_arguments(name))


@pytest.mark.parametrize("dtype", ["float32", "bool", "int8", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_what_indexing_takes_and_zero_outside(name, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 99, SHAPE), dtype)
    actual = jax.jit(lambda x: slice_of(x, name))(x)
    chex.assert_trees_all_equal(np.asarray(actual), taken(x, name), strict=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_go_where_the_blocks_are_from(name):
    x = cases.inputs(SHAPE)
    g = cases.inputs(taken(x, name).shape, seed=1)
    pullback = jax.jit(lambda g: jax.vjp(lambda x: slice_of(x, name), x)[1](g)[0])
    chex.assert_trees_all_equal(pullback(g), jnp.asarray(put_back(g, name)))


@pytest.mark.parametrize("name", ["sticking-out", "longer-and-narrower"])
def test_both_modes_and_second_order(name, x64):
    def function(x):
        return jnp.sin(slice_of(x, name)) ** 2

    x = cases.inputs(SHAPE, "float64") / 4
    check_grads(jax.jit(function), (x,), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ["inside", "sticking-out"])
def test_vmap_of_values_and_gradients(name, dims):
    starts, axes, sizes = block_arguments(name)
    starts = jnp.stack(starts)
    x = cases.inputs(SHAPE)

    def function(x, starts):
        return batched_slice(x, list(starts), axes, sizes)

    def gradient(x, starts):
        return jax.grad(lambda x: (function(x, starts) ** 3).sum())(x)

    pairs = [(x, starts), (2 * x, starts[:, ::-1])]
    pairs[1] = tuple(
        one if dim is None else other
        for one, other, dim in zip(*pairs, dims, strict=True)
    )
    mapped = [
        one if dim is None else jnp.stack([one, other], dim)
        for one, other, dim in zip(*pairs, dims, strict=True)
    ]
    for call in map(jax.jit, (function, gradient)):
        each = [call(*pair) for pair in pairs]
        chex.assert_trees_all_close(
            jax.jit(jax.vmap(call, dims))(*mapped), jnp.stack(each), rtol=1e-6
        )


def squares(x):
    """A loss of the array and of its blocks."""
    return (x**2).sum() + (slice_of(x, "sticking-out") ** 2).sum()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_scatter_is_left_in_the_gradient(platform):
    exported = jax.export.export(jax.jit(jax.grad(squares)), platforms=[platform])
    program = exported(jnp.ones(SHAPE)).mlir_module()
    assert "stablehlo.gather" in program
    assert "stablehlo.scatter" not in program


def test_only_a_tpu_is_warned_of_patches_and_not_of_rows(monkeypatch):
    x = jnp.ones(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slice_of(x, "inside")
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        slice_of(x, "one-axis")
    with pytest.warns(UserWarning, match=r"Use LatticeSampling\(\)"):
        slice_of(x, "inside")


def test_sharded_along_the_leading_axis_it_moves_nothing():
    axes, sizes, starts = BLOCKS["sticking-out"]
    starts = [jnp.array(start * 2, jnp.int32) for start in starts]

    def take(x, *starts):
        return batched_slice(x, starts, axes, sizes)

    def gradient(x):
        y, pullback = jax.vjp(lambda x: take(x, *starts), x)
        return pullback(y)

    sharding = NamedSharding(mesh(), P("data"))
    x = jax.ShapeDtypeStruct((8, *SHAPE[1:]), jnp.float32, sharding=sharding)
    assert collectives(gradient, x) == []

    x = cases.inputs((8, *SHAPE[1:]))
    mapped = jax.shard_map(take, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    chex.assert_trees_all_equal(mapped(x, *starts), take(x, *starts))
