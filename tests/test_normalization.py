"""Normalized values against NumPy: samplers, dtypes, scale and bias, options."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from tests import cases, reference, samples
from tests.closeness import assert_close
from tests.samples import KEY

SHAPE = cases.SHAPES[4]


def affine(features, dtype="float32"):
    scale, bias = cases.inputs((2, features), seed=9)
    return scale.astype(dtype), bias.astype(dtype)


@pytest.mark.parametrize(("name", "rank", "dtype"), cases.SAMPLER_CASES)
def test_everything_is_normalized_with_the_statistics_of_the_sample(name, rank, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = cases.inputs(cases.SHAPES[rank], dtype, seed=rank)
        scale, bias = affine(x.shape[-1], "float32" if "complex" in dtype else dtype)
        y, _ = samples.batch_norm(x, scale, bias, sampler=cases.SAMPLERS[name], key=KEY)
        chex.assert_type(y, dtype)
        mean, var = samples.moments(x, cases.SAMPLERS[name])
        expected = reference.normalize(x, mean, var, scale, bias)
        assert_close(y, expected, dtype, num=x.size if y.itemsize > 2 else 1)


@pytest.mark.parametrize("rank", cases.SHAPES)
def test_the_whole_batch_is_measured_without_a_sampler(rank):
    x = cases.inputs(cases.SHAPES[rank])
    y, statistics = samples.batch_norm(x)
    expected = reference.normalize(x, *samples.moments(x, None), 1, 0)
    assert_close(y, expected, num=x.size)
    assert_close(y.mean(range(rank - 1)), np.zeros(x.shape[-1]), num=x.size)
    assert_close(y.var(range(rank - 1)), np.ones(x.shape[-1]), num=x.size, c=40)
    chex.assert_trees_all_equal(statistics, samples.batch_statistics(x))


@pytest.mark.parametrize("axis", [-1, 0, 1, (1, 3), (-1, 0)])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_given_statistics_apply_along_the_feature_axes(axis, epsilon):
    x = cases.inputs((5, 4, 3, 2))
    features = sorted(a % 4 for a in np.atleast_1d(axis))
    shape = [n if a in features else 1 for a, n in enumerate(x.shape)]
    mean, var, scale, bias = (
        cases.inputs([n for n in shape if n > 1], seed=i) for i in range(4)
    )
    y = sbn.normalize(
        x, sbn.Statistics(mean, var**2), scale, bias, axis=axis, epsilon=epsilon
    )
    mean, var, scale, bias = (a.reshape(shape) for a in (mean, var, scale, bias))
    expected = reference.normalize(x, mean, var**2, scale, bias, epsilon)
    assert_close(y, expected, c=16)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scale_and_bias_are_one_and_zero_unless_given(with_scale, with_bias):
    x, (scale, bias) = cases.inputs(SHAPE), affine(3)
    actual = sbn.batch_norm(
        x, scale if with_scale else None, bias if with_bias else None
    )
    expected = sbn.batch_norm(
        x, scale if with_scale else jnp.ones(3), bias if with_bias else jnp.zeros(3)
    )
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(
    ("x", "parameters", "dtype", "result"),
    [
        ("float32", None, None, "float32"),
        ("bfloat16", None, None, "bfloat16"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", None, "float32"),
        ("float32", "bfloat16", None, "float32"),
        ("float16", "float32", "float16", "float16"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("complex64", "float32", None, "complex64"),
        ("int32", None, None, "float32"),
    ],
)
def test_the_result_has_the_given_dtype_or_that_of_the_arguments(
    x, parameters, dtype, result
):
    parameters = () if parameters is None else affine(3, parameters)
    y, _ = jax.eval_shape(
        lambda x: sbn.batch_norm(x, *parameters, dtype=dtype),
        jax.ShapeDtypeStruct(SHAPE, x),
    )
    assert y.dtype == result


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_data_of_mean_1000_and_deviation_1_normalizes(name):
    x = 1000 + (cases.inputs(SHAPE) - 1) / 2
    y, _ = samples.batch_norm(x, sampler=cases.SAMPLERS[name], key=KEY)
    mean, var = samples.moments(x, cases.SAMPLERS[name])
    # The mean is rounded at its own size, relative to the deviation of one.
    assert_close(y, reference.normalize(x, mean, var, 1, 0), c=1000)


@pytest.mark.parametrize("name", ["BS", "FS", "BS+VDN"])
def test_masked_positions_are_not_measured_but_normalized(name):
    mask = np.random.default_rng(0).random(SHAPE) < 0.5
    x, sampler = cases.inputs(SHAPE), cases.SAMPLERS[name]
    y, _ = samples.batch_norm(x, sampler=sampler, key=KEY, mask=mask)
    mean, var = samples.moments(x, sampler, mask)
    assert_close(y, reference.normalize(x, mean, var, 1, 0), num=x.size)


def test_half_precision_is_measured_and_normalized_in_float32():
    x = (300 + cases.inputs(SHAPE)).astype(jnp.bfloat16)
    y, _ = samples.batch_norm(x, sampler=cases.SAMPLERS["BS"], key=KEY)
    mean, var = samples.moments(x, cases.SAMPLERS["BS"])
    assert_close(y, reference.normalize(x, mean, var, 1, 0), "bfloat16", c=1)
