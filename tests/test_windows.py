"""Blocks of positions: taken as NumPy's indexing takes them, drawn from a tiling."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_sbn.windows import EVERYTHING, Part, Windows, random_tiles
from tests import samples

pytestmark = pytest.mark.optimized

KEYS = jax.random.split(jax.random.key(0), 400)


def array(*values):
    return jnp.array(values, jnp.int32)


# Extent of the measured axes, and windows in it, one after the other.
WINDOWS = {
    "images": ((12,), [Windows(1, (8,), (4,))]),
    "images-at-random": ((12,), [Windows(1, (jnp.int32(3),), (4,))]),
    "images-of-strata": ((12, 2), [Windows(3, (1, 0), (2, 2))]),
    "images-of-strata-at-random": ((12, 2), [Windows(3, (jnp.int32(2), 0), (2, 2))]),
    "images-by-stratum": ((12, 2), [Windows(3, (array(0, 2, 1), 0), (2, 2))]),
    "patch": ((6, 5, 4), [Windows(1, (0, jnp.int32(2), 1), (6, 3, 2))]),
    "patches": ((6, 5, 4), [Windows(2, (0, array(2, 0), array(1, 2)), (3, 3, 2))]),
    "patch-by-image": ((3, 5), [Windows(3, (0, array(4, 0, 2)), (1, 1))]),
    "many-patches": ((40, 3), [Windows(20, (0, array(*[0, 1] * 10)), (2, 2))]),
    "volumes": ((4, 2, 3, 4), [Windows(2, (0, 1, array(1, 0), 0), (2, 1, 2, 4))]),
    "patches-in-images": (
        (8, 6),
        [Windows(1, (0, 0), (6, 6)), Windows(3, (0, array(4, 0, 2)), (2, 2))],
    ),
    "patches-in-images-of-strata": (
        (8, 6),
        [Windows(2, (0, 0), (3, 6)), Windows(3, (0, array(4, 0, 2)), (2, 2))],
    ),
    "images-in-images-of-strata": (
        (8, 2),
        [Windows(2, (1, 0), (3, 2)), Windows(2, (jnp.int32(1), 0), (2, 2))],
    ),
}


def indices(name):
    """The flat positions that the windows hold, by NumPy."""
    extent, windows = WINDOWS[name]
    index = np.arange(math.prod(extent)).reshape(extent)
    for window in windows:
        index = samples.take(window, index)
    return index


def part_of(name):
    extent, windows = WINDOWS[name]
    return extent, Part(1.0, tuple(windows))


# Compiled with any dtype, and uncompiled with one.
@pytest.mark.parametrize(
    ("dtype", "transform"),
    [
        pytest.param("float32", lambda f: f, id="float32-eager"),
        *(
            pytest.param(dtype, jax.jit, id=f"{dtype}-jit")
            for dtype in ("float32", "bool", "int8", "complex64")
        ),
    ],
)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_take_what_indexing_takes(name, dtype, transform):
    extent, part = part_of(name)
    x = np.random.default_rng(0).integers(0, 99, (*extent, 3)).astype(dtype)
    taken = transform(lambda x: part.take(x, range(len(extent))))(jnp.asarray(x))
    expected = x.reshape(-1, 3)[indices(name)]
    chex.assert_trees_all_equal(np.asarray(taken), expected)
    assert part.num_values(extent) == indices(name).size


@pytest.mark.parametrize("place", ["first", "middle", "both"])
@pytest.mark.parametrize("name", WINDOWS)
def test_feature_axes_may_be_anywhere(name, place):
    extent, part = part_of(name)
    features = {"first": [0], "middle": [1], "both": [0, len(extent) + 1]}[place]
    num = len(features)
    axes = [a for a in range(len(extent) + num) if a not in features]
    first = np.arange(2**num * math.prod(extent)).reshape(*[2] * num, *extent)
    x = jnp.asarray(np.moveaxis(first, range(num), features))
    taken = jax.jit(lambda x: part.take(x, axes))(x)
    expected = first.reshape(*[2] * num, -1)[..., indices(name)]
    chex.assert_trees_all_equal(
        np.moveaxis(np.asarray(taken), features, range(num)), np.int32(expected)
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_go_to_the_positions_taken(name):
    extent, part = part_of(name)
    index = indices(name)
    g = jnp.arange(1.0, 1 + index.size).reshape(index.shape)
    x = jnp.zeros(extent)

    def take(x):
        return part.take(x, range(len(extent)))

    expected = np.zeros(math.prod(extent), np.float32)
    expected[index] = np.asarray(g)
    pullback = jax.jit(lambda g: jax.vjp(take, x)[1](g)[0])
    chex.assert_trees_all_equal(pullback(g), jnp.asarray(expected.reshape(extent)))
    # And again: the gradient's own gradient and tangent are those of a linear map.
    chex.assert_trees_all_equal(
        jax.vjp(pullback, g)[1](jnp.asarray(expected.reshape(extent)))[0], g
    )
    chex.assert_trees_all_equal(
        jax.jvp(pullback, (0 * g,), (g,))[1], jnp.asarray(expected.reshape(extent))
    )


@pytest.mark.parametrize("name", [name for name in WINDOWS if "in-images" not in name])
def test_what_is_below_is_what_is_taken(name):
    extent, part = part_of(name)
    (windows,) = part.windows
    x = jnp.arange(2.0 * math.prod(extent)).reshape(*extent, 2)

    @jax.jit
    def both(x):
        actual, pullback = jax.vjp(windows.below, x)
        expected, taken_pullback = jax.vjp(
            lambda x: part.take(x, range(len(extent))), x
        )
        return (actual, pullback(actual)), (expected, taken_pullback(expected))

    chex.assert_trees_all_equal(*both(x))


OUTSIDE = {
    "low": (2, (0, array(-2, 0), array(-1, 2))),
    "high": (2, (0, array(4, 2), array(1, 3))),
    "both": (3, (0, array(-1, 5, 0), array(3, -1, 7))),
    "images": (3, (array(1, -1, 0), 0, array(0, -1, 2))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_windows_that_stick_out_read_zeros(name):
    runs, starts = OUTSIDE[name]
    windows = Windows(runs, starts, (2, 5, 2) if name == "images" else (2, 3, 2))
    x = np.arange(6 * 5 * 4 * 2.0, dtype=np.float32).reshape(6, 5, 4, 2)
    # The same among zeros, which stay in each run of images.
    padded = np.pad(x.reshape(runs, -1, 5, 4, 2), [(0, 0), *[(9, 9)] * 3, (0, 0)])
    inside = Windows(runs, tuple(start + 9 for start in starts), windows.sizes)
    expected = samples.take(inside, padded.reshape(-1, *padded.shape[2:]))
    take = jax.jit(lambda x: windows.take(x, (0, 1, 2)))
    chex.assert_trees_all_equal(np.asarray(take(x)), expected)
    chex.assert_trees_all_equal(np.asarray(jax.jit(windows.below)(x)), expected)
    features_first = jax.jit(lambda x: windows.take(x, (1, 2, 3)))
    chex.assert_trees_all_equal(
        np.asarray(features_first(np.moveaxis(x, -1, 0))), np.moveaxis(expected, -1, 0)
    )


def test_below_a_block_at_one_place_may_stick_out():
    x = jnp.arange(12.0).reshape(4, 3)
    for start in (-1, jnp.int32(-1)):
        block = Windows(1, (2, start), (2, 3)).below(x)
        chex.assert_trees_all_equal(block, jnp.array([[0.0, 6, 7], [0, 9, 10]]))


@pytest.mark.parametrize("mapped", ["x", "starts", "both"])
def test_windows_may_be_mapped(mapped):
    x = jnp.arange(2 * 6 * 5.0).reshape(2, 6, 5)
    starts = array(*[0, 3, 2], *[1, 0, 3]).reshape(2, 3)

    def take(x, starts):
        return Windows(3, (0, starts), (2, 2)).take(x, (0, 1))

    in_axes = (0 if mapped != "starts" else None, 0 if mapped != "x" else None)
    args = (x if mapped != "starts" else x[0], starts if mapped != "x" else starts[0])
    actual = jax.vmap(take, in_axes)(*args)
    expected = jnp.stack(
        [
            take(x[i if mapped != "starts" else 0], starts[i if mapped != "x" else 0])
            for i in range(2)
        ]
    )
    chex.assert_trees_all_equal(actual, expected)


def test_a_part_without_windows_is_everything():
    x = jnp.arange(6).reshape(2, 3)
    assert EVERYTHING.take(x, (0,)) is x
    assert EVERYTHING.num_values((2, 5)) == 10


@pytest.mark.parametrize("x64", [False, True])
def test_windows_take_under_float64_as_well(x64):
    with jax.enable_x64(x64):
        for name in ("images-at-random", "patch", "patches"):
            extent, part = part_of(name)
            x = jnp.arange(math.prod(extent), dtype=float).reshape(extent)
            taken = part.take(x, range(len(extent)))
            chex.assert_trees_all_equal(np.asarray(taken), 1.0 * indices(name))


@pytest.mark.parametrize(
    ("length", "size", "starts"),
    [
        (12, 3, [0, 3, 6, 9]),
        (12, 5, [0, 5, 7]),
        (12, 7, [0, 5]),
        (12, 1, list(range(12))),
        (12, 12, [0]),
    ],
)
def test_tiles_cover_an_axis_and_the_last_one_moves_inwards(length, size, starts):
    (drawn,) = jax.vmap(lambda key: jnp.asarray(random_tiles(key, [length], [size])))(
        KEYS
    ).T
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == starts
    share = 1 / len(starts)
    deviation = (share * (1 - share) / len(KEYS)) ** 0.5
    assert (abs(counts / len(KEYS) - share) <= 5 * deviation).all()


def test_each_of_several_tiles_is_as_random_as_one():
    starts = jax.vmap(lambda key: jnp.stack(random_tiles(key, [8, 4], [1, 1], 5)))(KEYS)
    for rows, columns in np.moveaxis(starts, 0, -1).swapaxes(0, 1):
        counts = np.histogram2d(rows, columns, bins=(8, 4))[0]
        deviation = (len(KEYS) * (1 / 32) * (31 / 32)) ** 0.5
        assert (abs(counts - len(KEYS) / 32) < 5 * deviation).all()


@pytest.mark.parametrize("lengths", [[16], [8, 8], [4, 16], [7, 9], [4, 4, 4], [1, 64]])
@pytest.mark.parametrize("rounds", [1, 3])
def test_several_tiles_reach_each_place_equally_often(lengths, rounds):
    tiles = math.prod(lengths)
    starts = random_tiles(KEYS[0], lengths, [1] * len(lengths), rounds * tiles)
    index = np.ravel_multi_index(
        [np.broadcast_to(start, rounds * tiles) for start in starts], lengths
    )
    assert (np.bincount(index, minlength=tiles) == rounds).all()
    assert len(set(index[:tiles].tolist())) == tiles


@pytest.mark.parametrize(
    "lengths", [[64], [8, 8], [14, 14], [56, 56], [112, 112], [7, 40], [16, 16, 16]]
)
@pytest.mark.parametrize("count", [8, 32])
def test_a_few_tiles_are_far_apart(lengths, count):
    starts = random_tiles(KEYS[0], lengths, [1] * len(lengths), count)
    places = np.stack(starts, -1) / lengths
    gaps = abs(places[:, None] - places)
    gaps = np.minimum(gaps, 1 - gaps)  # around the border
    distances = np.square(gaps).sum(-1) ** 0.5 + np.eye(count)
    # A square lattice would have 1; half of independent draws are below 0.1 to 0.25.
    assert distances.min() * count ** (1 / len(lengths)) > 0.3


SEEDS = np.arange(4096)
BASE = jax.random.key(0)


@pytest.mark.parametrize(
    "keys",
    [
        jax.vmap(jax.random.key)(SEEDS),
        jax.vmap(jax.random.PRNGKey)(SEEDS),
        jax.vmap(lambda seed: jax.random.key(seed, impl="rbg"))(SEEDS),
        jax.vmap(lambda seed: jax.random.fold_in(BASE, seed))(SEEDS),
        jax.random.split(BASE, len(SEEDS)),
    ],
    ids=["seeds", "raw-seeds", "rbg-seeds", "folded", "split"],
)
def test_tiles_are_uniform_and_independent_whatever_the_keys(keys):
    starts = np.asarray(
        jax.vmap(lambda key: jnp.stack(random_tiles(key, [7, 8], [1, 1])))(keys)
    )
    rows, columns = starts.T
    for one, other in (
        (rows, columns),  # axes
        (rows[:-1], rows[1:]),  # keys
    ):
        counts = np.histogram2d(one, other, bins=(one.max() + 1, other.max() + 1))[0]
        expected = len(one) / counts.size
        chi_square = ((counts - expected) ** 2).sum() / expected
        # Its mean is its degrees of freedom, its variance twice that.
        freedom = counts.size - 1
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_a_whole_axis_needs_no_draw():
    starts = random_tiles(jax.random.key(0), [5, 4], [5, 2], 3)
    assert starts[0] == 0
    chex.assert_shape(starts[1], (3,))
