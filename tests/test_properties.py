"""Any sampler on any input: a clear error, or a finite result of the right form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_sbn as sbn
from tests import samples

KEY = jax.random.key(0)

# Few distinct extents, so that few programs are compiled.
extents = st.tuples(st.sampled_from([1, 2, 6, 8])).flatmap(
    lambda rows: st.lists(st.sampled_from([1, 3, 4]), max_size=3).map(
        lambda space: (*rows, *space)
    )
)
counts = st.sampled_from([1, 2, 3, 4, 8])
strata = st.sampled_from([1, 1, 2, 4])
rows = st.one_of(
    st.builds(sbn.NaiveSampling, counts),
    st.builds(sbn.BatchSampling, counts, strata),
    st.builds(sbn.CopySampling, counts),
)
patches = st.builds(
    sbn.FeatureSampling,
    st.floats(0.01, 1),
    min_values=st.sampled_from([1, 8, 32]),
    groups=st.sampled_from([1, 2, 8]),
)
virtual = st.builds(sbn.VirtualSampling, counts, strata)
mixed = st.builds(sbn.MixedSampling, st.one_of(rows, patches), virtual, st.floats(0, 1))
samplers = st.one_of(st.none(), rows, patches, virtual, mixed)
dtypes = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])
seeds = st.integers(0, 2**32 - 1)

modest = settings(deadline=None, derandomize=True, max_examples=20, database=None)


def inputs(extent, dtype, seed, features=2):
    """Values of any size that half precision can square."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*extent, features)) * 10 ** rng.uniform(-3, 1, features)
    if dtype == "complex64":
        x = x * np.exp(1j * x)
    return jnp.asarray(x + rng.choice([0, 10]), dtype)


def attempt(call):
    """What a call returns, or what its ValueError says."""
    try:
        return call(), "Expected"
    except ValueError as error:
        return None, str(error)


def num_measured(extent, sampler):
    """How many values are measured; None if the sampler does not fit."""
    num, message = attempt(lambda: sbn.num_measured(sampler, extent))
    assert message.startswith("Expected")
    return num


@modest
@given(extents, samplers, dtypes, st.sampled_from([None, 0.0, 0.3, 1.0]), seeds)
def test_the_result_is_finite_and_of_the_inputs_form_or_an_error_tells_why(
    extent, sampler, dtype, unmasked, seed
):
    x, key = inputs(extent, dtype, seed), jax.random.key(seed)
    mask = None
    if unmasked is not None:
        mask = np.random.default_rng(seed).random(x.shape) < unmasked

    def call():
        return sbn.batch_norm(x, sampler=sampler, key=key, mask=mask)

    result, message = attempt(call)
    assert message.startswith("Expected")
    assert (result is None) == (num_measured(extent, sampler) is None)
    if result is None:
        return
    y, statistics = result
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    chex.assert_shape(list(statistics), (2,))
    chex.assert_tree_all_finite((y, statistics))
    assert (statistics.var >= 0).all()
    chex.assert_trees_all_equal(result, call())


@modest
@given(extents, samplers, seeds)
def test_what_was_measured_is_normalized(extent, sampler, seed):
    if num_measured(extent, sampler) is None:
        return
    x = inputs(extent, "float32", seed)
    y, statistics = sbn.batch_norm(
        x, sampler=sampler, key=samples.KEY, use_fast_variance=False
    )
    shares = samples.shares(sampler, x.shape)
    axes = tuple(range(len(extent)))
    mean, var = (shares * y).sum(axes), (shares * y**2).sum(axes)
    variance = np.asarray(statistics.var, np.float64)
    deviation = np.sqrt(variance + 1e-5)
    # The mean is rounded at its own size, and normalized by the deviation.
    rounding = 1e-6 * (1 + abs(np.asarray(statistics.mean)) / deviation)
    assert (abs(mean) < 10 * rounding).all()
    assert (abs(var - variance / deviation**2) < 100 * rounding).all()


@settings(modest, max_examples=15)  # compiles the most
@given(extents, samplers, seeds)
def test_gradients_are_finite(extent, sampler, seed):
    if num_measured(extent, sampler) is None:
        return
    x = inputs(extent, "float32", seed)

    def loss(x):
        y, statistics = sbn.batch_norm(x, sampler=sampler, key=KEY)
        return (y**3).sum() + statistics.var.sum()

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(x))


@modest
@given(extents, samplers)
def test_as_much_is_measured_as_the_sampler_was_told(extent, sampler):
    num = num_measured(extent, sampler)
    if num is None:
        return
    space = int(np.prod(extent[1:]))
    if sampler is None:
        assert num == extent[0] * space
    elif isinstance(sampler, sbn.FeatureSampling):
        asked = max(sampler.fraction * extent[0] * space, sampler.min_values)
        assert min(asked, extent[0] * space) - 1e-6 <= num <= extent[0] * space
    elif isinstance(sampler, sbn.CopySampling):
        assert num == extent[0] // sampler.num_copies * space
    elif isinstance(sampler, sbn.VirtualSampling):
        assert num == sampler.num_virtual * space
    elif isinstance(sampler, sbn.MixedSampling):
        assert sampler.virtual.num_virtual * space < num <= extent[0] * space
    else:
        assert num == sampler.num_samples * space
