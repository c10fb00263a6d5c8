"""Which positions samplers choose, how many, and how well their means estimate."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.sampling import needs_key, sampled_parts
from tests import cases, samples

KEY = jax.random.key(0)
FS = functools.partial(sbn.FeatureSampling, min_values=1)


@functools.partial(jax.jit, static_argnames=("sampler", "extent", "num"))
def draw(sampler, extent, num):
    """The positions of ``num`` samples, a list of parts ``(num, values)``."""
    index = jnp.arange(math.prod(extent)).reshape(extent)

    def one(key):
        parts = sampled_parts(sampler, extent, key)
        return [part.take(index, range(len(extent))).ravel() for part in parts]

    return jax.vmap(one)(jax.random.split(KEY, num))


@pytest.mark.parametrize(("name", "rank"), cases.SAMPLER_RANKS)
def test_positions_are_distinct_and_in_range(name, rank):
    extent = cases.SHAPES[rank][:-1]
    for positions in draw(cases.SAMPLERS[name], extent, 20):
        ordered = np.sort(positions, axis=1)
        assert ordered.min() >= 0
        assert ordered.max() < math.prod(extent)
        assert (np.diff(ordered, axis=1) > 0).all()


@pytest.mark.parametrize(("name", "rank"), cases.SAMPLER_RANKS)
def test_num_measured_counts_the_values(name, rank):
    extent = cases.SHAPES[rank][:-1]
    wheres, _ = samples.measured(cases.SAMPLERS[name], extent)
    counted = sum(int(where.sum()) for where in wheres)
    assert sbn.num_measured(cases.SAMPLERS[name], extent) == counted


def test_num_measured_without_a_sampler_is_everything():
    assert sbn.num_measured(None, (4, 3, 2)) == 24


@pytest.mark.parametrize(
    ("sampler", "extent"),
    [
        (sbn.BatchSampling(4), (16, 4)),
        (sbn.BatchSampling(4, strata=2), (16, 4)),
        (FS(1 / 4, groups=1), (4, 8, 4)),
        (FS(1 / 4), (4, 8, 4)),
        (FS(1 / 8, groups=2), (4, 8)),
        (FS(1 / 8, groups=2), (2, 2, 4, 8)),
    ],
    ids=str,
)
def test_sampled_means_average_to_the_full_mean_exactly(sampler, extent):
    # Sums of integers, and divisions by powers of two, are exact.
    x = np.random.default_rng(0).integers(0, 1000, math.prod(extent)).astype(float)
    (positions,) = draw(sampler, extent, 500)
    runs = sampled_parts(sampler, extent, KEY)[0].windows[0].runs
    if isinstance(sampler, sbn.BatchSampling):
        runs = 1  # all strata share one draw
    tiles = [
        np.unique(run, axis=0) for run in np.split(np.asarray(positions), runs, axis=1)
    ]
    assert np.mean([x[run].mean(1).mean() for run in tiles]) == x.mean()
    assert sum(run.size for run in tiles) == x.size


@pytest.mark.parametrize(
    ("sampler", "extent"),
    [
        (sbn.BatchSampling(5), (16, 2)),
        (sbn.BatchSampling(6, strata=2), (16, 2)),
        (FS(1 / 4, groups=1), (2, 7, 5)),
        (FS(1 / 4), (2, 7, 5)),
        (FS(1 / 5), (2, 3, 4, 3)),
    ],
    ids=str,
)
def test_every_position_is_reached_where_sizes_do_not_divide(sampler, extent):
    (positions,) = draw(sampler, extent, 500)
    assert set(np.asarray(positions).ravel().tolist()) == set(range(math.prod(extent)))


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_another_key_looks_elsewhere_and_the_same_key_looks_there_again(name):
    sampler, extent = cases.SAMPLERS[name], cases.SHAPES[4][:-1]
    again = draw(sampler, extent, 8)
    chex.assert_trees_all_equal(draw(sampler, extent, 8), again)
    different = len(np.unique(np.concatenate(again, axis=1), axis=0))
    assert (different > 1) == sampler.needs_key


def test_naive_sampling_takes_the_last_images():
    (where,), _ = samples.measured(sbn.NaiveSampling(3), (8, 2))
    assert where[:, 0].tolist() == [False] * 5 + [True] * 3
    assert where[:, 1].tolist() == where[:, 0].tolist()


@pytest.mark.parametrize("strata", [1, 2, 4])
def test_virtual_sampling_takes_the_last_images_of_each_stratum(strata):
    (where,), _ = samples.measured(sbn.VirtualSampling(4, strata), (16,))
    virtual = 4 // strata
    run = [False] * (16 // strata - virtual) + [True] * virtual
    assert where.tolist() == run * strata


@pytest.mark.parametrize("strata", [1, 2, 4])
def test_batch_sampling_takes_one_run_at_the_same_offset_of_each_stratum(strata):
    for sample in draw(sbn.BatchSampling(4, strata), (16,), 50)[0]:
        images = np.asarray(sample).reshape(strata, -1)
        offset = images - 16 // strata * np.arange(strata)[:, None]
        assert (offset == images[0, 0] + np.arange(4 // strata)).all()
        assert offset.max() < 16 // strata


@pytest.mark.parametrize("name", ["FS+VDN", "BS+VDN", "lattice+VDN"])
def test_mixed_sampling_shows_the_real_images_alone_to_the_real_sampler(name):
    sampler, extent = cases.SAMPLERS[name], cases.SHAPES[4][:-1]
    virtual, real = draw(sampler, extent, 100)
    (expected,) = draw(sampler.virtual, extent, 1)
    chex.assert_trees_all_equal(virtual, jnp.repeat(expected, 100, axis=0))
    assert not set(np.unique(virtual)) & set(np.unique(real))
    weights = [part.weight for part in sampled_parts(sampler, extent, KEY)]
    assert weights == [sampler.virtual_weight, 1 - sampler.virtual_weight]


@pytest.mark.parametrize(
    ("sampler", "extent", "block"),
    [
        # fraction of the patch, anisotropic maps
        (FS(1 / 4, groups=1), (2, 8, 8), (2, 4, 4)),
        (FS(1 / 64, groups=1), (2, 32, 32), (2, 4, 4)),
        (FS(1 / 4, groups=1), (2, 16, 4), (2, 8, 2)),
        (FS(1 / 4, groups=1), (2, 100, 1), (2, 25, 1)),
        (FS(1 / 16, groups=1), (2, 2, 32), (2, 1, 4)),
        (FS(1 / 8, groups=1), (2, 4, 4, 4), (2, 2, 2, 2)),
        (FS(1 / 1000, groups=1), (2, 10, 10, 10), (2, 1, 1, 1)),
        (FS(1 / 64, groups=1), (2, 7, 7), (2, 1, 1)),
        (FS(1, groups=1), (2, 7, 5), (2, 7, 5)),
        # grown to the least number of values
        (FS(1 / 64, min_values=32, groups=1), (2, 8, 8), (2, 4, 4)),
        (FS(1 / 64, min_values=32, groups=1), (64, 8, 8), (64, 1, 1)),
        (FS(1 / 64, min_values=1000, groups=1), (2, 8, 8), (2, 8, 8)),
        # groups: the largest divisor of the images, at most one an image
        (FS(1 / 4), (16, 8, 8), (1, 4, 4)),
        (FS(1 / 4, groups=8), (16, 8, 8), (2, 4, 4)),
        (FS(1 / 4, groups=8), (12, 8, 8), (2, 4, 4)),
        (FS(1 / 4, groups=8), (13, 8, 8), (13, 4, 4)),
        (FS(1 / 4, groups=8), (7, 8, 8), (1, 4, 4)),
        (FS(1 / 4, groups=99), (16, 8, 8), (1, 4, 4)),
        (FS(1 / 4, groups=5), (16, 8, 8), (4, 4, 4)),
    ],
    ids=str,
)
def test_feature_sampling_takes_patches_of_these_sizes(sampler, extent, block):
    (part,) = sampled_parts(sampler, extent, KEY)
    (windows,) = part.windows
    assert windows.sizes == block
    assert windows.runs == extent[0] // block[0]


@pytest.mark.parametrize("fraction", [0.9, 1 / 2, 1 / 3, 1 / 10, 1 / 64])
@pytest.mark.parametrize("extent", [(7,), (31,), (8, 8), (5, 9), (56, 3), (3, 4, 5)])
@pytest.mark.parametrize("images", [1, 8])
def test_patches_are_at_least_as_large_as_asked_and_not_much_larger(
    fraction, extent, images
):
    sampler, space = sbn.FeatureSampling(fraction, min_values=16), math.prod(extent)
    asked = min(1.0, max(fraction, 16 / (images * space)))
    (part,) = sampled_parts(sampler, (images, *extent), KEY)
    sides = part.windows[0].sizes[1:]
    assert math.prod(sides) >= asked * space - 1e-6
    # One less on any axis, in a patch of about the map's proportions, is too little.
    smaller = math.prod(max(1, side - 1) for side in sides)
    assert smaller < asked * space or math.prod(sides) == 1


@pytest.mark.parametrize("name", cases.LAYER_SHAPES)
def test_samples_of_real_layers_are_small(name):
    extent = cases.layer_shape(name, 128)[:-1]
    sampler = FS(1 / 32) if len(extent) > 1 else sbn.BatchSampling(4)
    measured = sbn.num_measured(sampler, extent)
    assert 1 / 32 <= measured / math.prod(extent) < 1 / 12
    if len(extent) > 1:
        measured = sbn.num_measured(sbn.LatticeSampling(), extent)
        assert 7 <= measured / extent[0] <= 28


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_samplers_are_values(name):
    sampler = cases.SAMPLERS[name]
    twin = dataclasses.replace(sampler)
    assert twin is not sampler
    assert twin == sampler
    assert len({sampler, twin, *cases.SAMPLERS.values()}) == len(cases.SAMPLERS)
    assert eval(repr(sampler), vars(sbn)) == sampler
    assert needs_key(sampler) == (name[:2] in ("BS", "FS", "co"))
    assert isinstance(sampler, sbn.Sampler)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.needs_key_ = True


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_an_equal_sampler_does_not_trace_again(name):
    traces = []

    @functools.partial(jax.jit, static_argnames="sampler")
    def measure(x, sampler):
        traces.append(sampler)
        return x

    measure(1.0, cases.SAMPLERS[name])
    measure(1.0, dataclasses.replace(cases.SAMPLERS[name]))
    assert len(traces) == 1


def mean_variance(mean_of_key, num=4000):
    """Variance of a mean over keys, and the standard error of that variance."""
    means = jax.jit(jax.vmap(mean_of_key))(jax.random.split(KEY, num))
    centred = np.asarray(means, np.float64) - np.mean(means)
    return (centred**2).mean(), (centred**2).std() / num**0.5


@pytest.mark.parametrize("num_samples", [2, 4, 8, 16])
def test_images_without_replacement_have_the_textbook_variance(num_samples):
    values = jnp.asarray(np.random.default_rng(0).gamma(2.0, size=32), jnp.float32)

    def mean(key):
        order, place = jax.random.split(key)
        images = jax.random.permutation(order, values)[:, None]
        sampler = sbn.BatchSampling(num_samples)
        return sbn.batch_statistics(images, sampler=sampler, key=place).mean[0]

    variance, error = mean_variance(mean)
    expected = values.var(ddof=1) / num_samples * (1 - num_samples / 32)
    assert abs(variance - expected) < 4 * error


@pytest.mark.parametrize(
    ("sampler", "extent"),
    [
        (sbn.VirtualSampling(2), (8,)),
        (sbn.VirtualSampling(4, strata=2), (8,)),
        (FS(1 / 4, groups=1), (2, 4, 4)),
        (FS(1 / 4), (4, 4, 4)),
    ],
    ids=str,
)
def test_independent_values_have_a_mean_of_variance_one_by_their_number(
    sampler, extent
):
    def mean(key):
        noise, place = jax.random.split(key)
        x = jax.random.normal(noise, (*extent, 1))
        return sbn.batch_statistics(x, sampler=sampler, key=place).mean[0]

    variance, error = mean_variance(mean)
    assert abs(variance - 1 / sbn.num_measured(sampler, extent)) < 4 * error


@pytest.mark.parametrize(
    ("groups", "most"), [(1, 1.0), (2, 0.5), (4, 0.1), (8, 0.05), (None, 0.03)]
)
def test_groups_spread_so_that_the_noise_of_the_place_averages_out(groups, most):
    # Independent places would leave 1 / groups of it.
    image = np.random.default_rng(0).normal(size=(1, 4, 4, 1))
    x = jnp.asarray(np.broadcast_to(image, (16, 4, 4, 1)), jnp.float32)
    sampler = FS(1 / 4, groups=groups)

    def mean(key):
        return sbn.batch_statistics(x, sampler=sampler, key=key).mean[0]

    variance, error = mean_variance(mean)
    tiles = image.reshape(2, 2, 2, 2).mean((1, 3))
    assert variance < most * tiles.var() + 4 * error


@pytest.mark.parametrize("images", [6, 24])
@pytest.mark.parametrize("num_copies", [1, 2, 3])
def test_copy_sampling_takes_one_image_of_every_run_in_its_whole_extent(
    num_copies, images
):
    (positions,) = draw(sbn.CopySampling(num_copies), (images, 5), 200)
    chosen = np.asarray(positions).reshape(200, images // num_copies, 5)
    assert (chosen % 5 == np.arange(5)).all()
    chosen = chosen[..., 0] // 5
    assert (chosen // num_copies == np.arange(images // num_copies)).all()
    assert set(np.unique(chosen)) == set(range(images))


def test_copies_are_drawn_independently_of_each_other():
    # Each pair of runs meets in every combination, in equal shares.
    num = 4000
    (positions,) = draw(sbn.CopySampling(3), (12,), num)
    copy = np.asarray(positions) % 3
    for i, j in [(0, 1), (1, 2), (0, 3)]:
        shares = np.bincount(3 * copy[:, i] + copy[:, j], minlength=9) / num
        assert (abs(shares - 1 / 9) < 5 * (8 / 81 / num) ** 0.5).all()


def test_one_of_each_run_has_the_textbook_variance():
    x = np.random.default_rng(0).gamma(2.0, size=(8, 4))
    images = jnp.asarray(x.reshape(32, 1), jnp.float32)

    def mean(key):
        return sbn.batch_statistics(images, sampler=sbn.CopySampling(4), key=key).mean[
            0
        ]

    variance, error = mean_variance(mean)
    assert abs(variance - x.var(axis=1).sum() / 8**2) < 4 * error


def test_copy_sampling_sees_real_images_alone_where_virtual_ones_follow():
    sampler = sbn.MixedSampling(sbn.CopySampling(3), sbn.VirtualSampling(4, strata=2))
    virtual, real = draw(sampler, (28,), 20)  # 12 real images in each stratum
    assert {image % 14 for image in np.unique(virtual)} == {12, 13}
    real = np.sort(np.asarray(real), axis=1)
    order = np.delete(np.arange(28), np.unique(virtual))
    assert (np.searchsorted(order, real) // 3 == np.arange(8)).all()
