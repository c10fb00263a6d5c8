"""Moments of samples against NumPy: samplers, axes, masks, precision, averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.moments import Moments, mean_and_var, pool_moments
from tests import cases, reference, samples
from tests.closeness import assert_close, tolerance
from tests.samples import KEY

SAMPLERS = {"all": None, **cases.SAMPLERS}
SHAPE = cases.SHAPES[4]

# True at what is measured; each leaves something of every feature in every sample.
MASKS = {
    "rows": np.arange(16).reshape(-1, 1, 1, 1) % 2 == 0,
    "pixels": np.arange(24).reshape(6, 4, 1) % 3 > 0,
    "values": np.random.default_rng(5).random(SHAPE) < 0.7,
}


@pytest.mark.parametrize(("name", "rank", "dtype"), cases.SAMPLER_CASES)
def test_statistics_are_the_moments_of_the_sample(name, rank, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = cases.inputs(cases.SHAPES[rank], dtype)
        actual = samples.batch_statistics(x, sampler=cases.SAMPLERS[name], key=KEY)
        mean, var = samples.moments(x, cases.SAMPLERS[name])
        real = "float64" if dtype == "float64" else "float32"
        chex.assert_type(actual.mean, "complex64" if dtype == "complex64" else real)
        chex.assert_type(actual.var, real)
        assert_close(actual.mean, mean, real, x.size)
        assert_close(actual.var, var, real, x.size)


@pytest.mark.parametrize(
    ("axis", "name"),
    [(axis, name) for axis in (0, (1, 3)) for name in SAMPLERS]
    + [(axis, name) for axis in (1, -2, (-1, 0)) for name in ("all", "BS-strata")],
)
def test_the_feature_axes_may_be_any(name, axis):
    features = [a % 4 for a in np.atleast_1d(axis)]
    order = [a for a in range(4) if a not in features] + sorted(features)
    x = cases.inputs((16, 12, 8, 16))
    last = x.transpose(order)
    last = last.reshape(*last.shape[: -len(features)], -1)
    actual = samples.batch_statistics(x, sampler=SAMPLERS[name], key=KEY, axis=axis)
    mean, var = samples.moments(last, SAMPLERS[name])
    shape = tuple(x.shape[a] for a in sorted(features))
    assert_close(actual.mean, mean.reshape(shape), num=x.size)
    assert_close(actual.var, var.reshape(shape), num=x.size)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_masked_values_are_not_measured(name, mask):
    sampler, where = SAMPLERS[name], np.broadcast_to(MASKS[mask], SHAPE)
    x = jnp.where(where, cases.inputs(SHAPE), jnp.nan)
    actual = samples.batch_statistics(x, sampler=sampler, key=KEY, mask=MASKS[mask])
    mean, var = samples.moments(np.nan_to_num(x), sampler, where)
    assert_close(actual.mean, mean, num=x.size)
    assert_close(actual.var, var, num=x.size)


@pytest.mark.parametrize(
    ("name", "mask", "fast"),
    [
        *((name, "values", True) for name in SAMPLERS),
        *(("all", mask, fast) for mask in MASKS for fast in (True, False)),
    ],
)
def test_masked_values_get_no_gradient_and_no_nan(name, mask, fast):
    sampler, where = SAMPLERS[name], np.broadcast_to(MASKS[mask], SHAPE)
    x = jnp.where(where, cases.inputs(SHAPE), jnp.nan)
    on_mean, on_var = np.asarray(cases.inputs((2, SHAPE[-1]), seed=1))

    def loss(x):
        mean, var = sbn.batch_statistics(
            x,
            sampler=sampler,
            key=KEY,
            mask=MASKS[mask],
            use_fast_variance=fast,
        )
        return (on_mean * mean + on_var * var).sum()

    shares, finite = samples.shares(sampler, SHAPE, where), np.nan_to_num(x)
    mean = (shares * finite).sum((0, 1, 2))
    expected = shares * (on_mean + 2 * on_var * (finite - mean))
    gradient = jax.jit(jax.grad(loss))(x)
    assert_close(gradient, expected, num=x.size)
    chex.assert_trees_all_equal(gradient[~where], jnp.zeros((~where).sum()))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("running", [None, (-3.0, 5.0)])
def test_an_empty_mask_gives_the_running_statistics_or_zero_and_one(name, running):
    x = jnp.full(SHAPE, jnp.nan)
    if running is not None:
        running = sbn.Statistics(*(jnp.full(3, r) for r in running))
    actual = samples.batch_statistics(
        x, sampler=SAMPLERS[name], key=KEY, mask=False, running=running
    )
    chex.assert_trees_all_equal(
        actual, running or sbn.Statistics(jnp.zeros(3), jnp.ones(3))
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_feature_that_is_masked_out_leaves_the_others(name):
    where = np.array([True, False, True])
    x = jnp.where(where, cases.inputs(SHAPE), jnp.nan)
    actual = samples.batch_statistics(x, sampler=SAMPLERS[name], key=KEY, mask=where)
    mean, var = samples.moments(cases.inputs(SHAPE), SAMPLERS[name])
    assert_close(actual.mean, np.where(where, mean, 0), num=x.size)
    assert_close(actual.var, np.where(where, var, 1), num=x.size)


@pytest.mark.parametrize("name", ["BS+VDN", "FS+VDN", "lattice+VDN"])
@pytest.mark.parametrize("kept", ["real", "virtual"])
def test_a_part_that_is_masked_out_leaves_its_weight_to_the_other(name, kept):
    x, sampler = cases.inputs(SHAPE), cases.SAMPLERS[name]
    virtual, *_ = samples.measured(sampler.virtual, SHAPE[:-1], None)[0]
    where = np.broadcast_to((virtual == (kept == "virtual"))[..., None], SHAPE)
    shares = samples.shares(sampler, SHAPE, where)
    np.testing.assert_allclose(shares.sum((0, 1, 2)), 1)
    actual = samples.batch_statistics(
        jnp.where(where, x, jnp.nan), sampler=sampler, key=KEY, mask=where
    )
    assert_close(actual.mean, (shares * x).sum((0, 1, 2)), num=x.size)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_samples_of_mean_1000_and_deviation_1_are_measured_precisely(name):
    x = 1000 + (cases.inputs(SHAPE) - 1) / 2
    actual = samples.batch_statistics(x, sampler=cases.SAMPLERS[name], key=KEY)
    mean, var = samples.moments(x, cases.SAMPLERS[name])
    assert_close(actual.mean, mean)
    # To the rounding of the mean; the rounding of its square would be 0.06.
    assert_close(actual.var, var, c=1000)


@pytest.mark.parametrize("mean", [10, 30, 300])
def test_bfloat16_is_measured_more_precisely_than_it_is_rounded(mean):
    x = mean + np.random.default_rng(0).standard_normal((64, 16, 16, 3))
    x = jnp.asarray(x, jnp.bfloat16)
    measured = sbn.batch_statistics(x, sampler=sbn.NaiveSampling(64))
    exact = np.float64(x)
    # Values are at least 2^-8 of them apart, and the error is uniform in between.
    rounding = (mean * 2**-8) ** 2 / 12
    assert np.abs(measured.var - exact.var((0, 1, 2))).max() < rounding
    assert np.abs(measured.mean - exact.mean((0, 1, 2))).max() < rounding**0.5

    # What GPUs do, whose sums are pairwise, as NumPy's are along the last axis.
    values = np.float32(x).reshape(-1, 3).T.copy()
    var = np.square(values).mean(-1) - values.mean(-1) ** 2
    assert np.abs(var - exact.var((0, 1, 2))).max() < rounding


def test_the_slow_variance_of_the_whole_batch_is_precise():
    x = 1000 + (cases.inputs(SHAPE) - 1) / 2
    actual = samples.batch_statistics(x, use_fast_variance=False)
    assert_close(actual.var, samples.moments(x, None)[1], num=x.size)


@pytest.mark.parametrize(
    "sampler",
    [
        sbn.NaiveSampling(16),
        sbn.BatchSampling(16),
        sbn.BatchSampling(16, strata=16),
        sbn.FeatureSampling(1.0),
        sbn.FeatureSampling(1e-3, min_values=10**6, groups=1),
        sbn.VirtualSampling(16, strata=4),
    ],
    ids=str,
)
def test_a_sample_of_everything_gives_the_statistics_of_the_batch(sampler):
    x = cases.inputs(SHAPE)
    actual = samples.batch_statistics(x, sampler=sampler, key=KEY)
    expected = samples.batch_statistics(x, use_fast_variance=False)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [0.25, 0.75], [0.2, 0.5, 0.3], [0.0, 1.0]])
def test_mixed_statistics_are_those_of_the_mixed_population(weights, x64):
    each = [cases.inputs((2, 5), "float64", seed=i) ** 2 for i in range(len(weights))]
    actual = sbn.mix_statistics([sbn.Statistics(*s) for s in each], weights)
    mean, var = reference.mix([np.asarray(s) for s in each], weights)
    assert_close(actual.mean, mean, "float64")
    assert_close(actual.var, var, "float64")


def test_weights_of_a_mixture_may_differ_by_feature(x64):
    low, high = (sbn.Statistics(jnp.full(2, m), jnp.ones(2)) for m in (-1.0, 1.0))
    weights = [jnp.array([1.0, 0.5]), jnp.array([0.0, 0.5])]
    actual = sbn.mix_statistics([low, high], weights)
    chex.assert_trees_all_equal(
        actual, sbn.Statistics(jnp.array([-1.0, 0.0]), jnp.array([1.0, 2.0]))
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 1.0])
def test_running_statistics_are_an_exponential_average(momentum, x64):
    old, new = (cases.inputs((2, 5), "float64", seed=i) for i in range(2))
    actual = sbn.update_running(sbn.Statistics(*old), sbn.Statistics(*new), momentum)
    assert_close(actual, reference.running(old, new, momentum), "float64")


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.999])
def test_running_statistics_do_not_change_by_what_they_are(momentum):
    same = sbn.Statistics(*cases.inputs((2, 1000)))
    chex.assert_trees_all_equal(sbn.update_running(same, same, momentum), same)


def test_deviations_of_complex_values_are_averaged_as_real_ones():
    old, new = (
        sbn.Statistics(jnp.full(2, mean, "complex64"), jnp.full(2, var))
        for mean, var in ((1 + 2j, 4.0), (3 + 0j, 16.0))
    )
    updated = sbn.update_running(old, new, 0.5, std_epsilon=0.0)
    assert updated.var.dtype == "float32"
    np.testing.assert_array_equal(updated.mean, np.full(2, 2 + 1j))
    np.testing.assert_array_equal(updated.var, np.full(2, 9.0))


def test_running_statistics_carry_no_gradient():
    def loss(new):
        old = sbn.Statistics(jnp.zeros(3), jnp.ones(3))
        return sum(s.sum() for s in sbn.update_running(old, new, 0.5))

    new = sbn.Statistics(jnp.ones(3), jnp.ones(3))
    chex.assert_trees_all_equal(jax.grad(loss)(new), jax.tree.map(jnp.zeros_like, new))


@pytest.mark.parametrize("mean", [0, 1e3])
def test_pooling_many_batches_is_as_exact_as_measuring_all(mean):
    sizes = 16 + np.arange(200) % 7
    x = mean + np.float64(cases.inputs((sizes.sum(), 3)))
    pooled = Moments(*[jnp.zeros(3)] * 3)
    for batch in np.split(x, sizes.cumsum()[:-1]):
        measured = len(batch), batch.mean(0), batch.var(0)
        pooled = jax.jit(pool_moments)(pooled, Moments(*map(jnp.float32, measured)))
    np.testing.assert_array_equal(pooled.num, [len(x)] * 3)
    rounding = np.spacing(np.float32(mean + 1)) / 2
    atol = rounding * len(sizes) ** 0.5  # one rounding a batch
    np.testing.assert_allclose(pooled.mean, x.mean(0), rtol=0, atol=atol)
    atol = tolerance(x.var(0), num=len(sizes))
    np.testing.assert_allclose(pooled.var, x.var(0), rtol=0, atol=atol)


@pytest.mark.parametrize("empty_first", [False, True])
def test_pooling_with_no_values_changes_nothing(empty_first):
    some = mean_and_var(cases.inputs((8, 3)), (0,), None, False)
    both = [Moments(*[jnp.zeros(3)] * 3), some]
    for actual, expected in zip(
        pool_moments(*(both if empty_first else both[::-1])), some, strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
