"""Outputs before and after a change of a model: what counts as the same."""

import jax.numpy as jnp
import pytest

from flax_sbn.modules.same_outputs import check_same_outputs

X = jnp.array([1.0, -8.0])


@pytest.mark.parametrize("error", [0.0, 8e-4])
def test_rounding_is_no_difference(error):
    check_same_outputs(lambda x: x, lambda x: x * (1 + error / 8), (X,))


def test_zeros_are_the_same_as_zeros():
    check_same_outputs(jnp.zeros_like, jnp.zeros_like, (X,))


@pytest.mark.parametrize("after", [lambda x: 1.001 * x, lambda x: x * jnp.nan])
def test_more_is_one(after):
    with pytest.raises(ValueError, match="where the largest is 8"):
        check_same_outputs(lambda x: x, after, (X,))
