"""Virtual images: their distribution and dtype, where they go, and their gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from tests import cases, samples

KEY = jax.random.key(0)


@pytest.mark.parametrize("strata", [1, 2, 4])
@pytest.mark.parametrize("image", [(), (3,), (4, 2, 3)])
def test_dropping_undoes_appending(image, strata):
    x, virtual = cases.inputs((12, *image)), cases.inputs((8, *image), seed=1)
    both = sbn.append_virtual(x, virtual, strata)
    chex.assert_trees_all_equal(sbn.drop_virtual(both, 8, strata), x)


@pytest.mark.parametrize("strata", [1, 2, 4])
def test_virtual_images_end_each_stratum_where_virtual_sampling_looks(strata):
    both = sbn.append_virtual(jnp.zeros((12, 2)), jnp.ones((8, 2)), strata)
    (where,), _ = samples.measured(sbn.VirtualSampling(8, strata), (20,))
    chex.assert_trees_all_equal(np.asarray(both[:, 0] == 1), where)


def test_images_keep_their_order_in_strata():
    both = sbn.append_virtual(jnp.arange(6), -jnp.arange(1, 5), 2)
    assert both.tolist() == [0, 1, 2, -1, -2, 3, 4, 5, -3, -4]


def test_dropping_nothing_changes_nothing():
    x = jnp.arange(6)
    chex.assert_trees_all_equal(sbn.drop_virtual(x, 0), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_virtual_images_take_the_dtype_of_the_batch(dtype):
    both = sbn.append_virtual(cases.inputs((4, 3), dtype), jnp.ones((2, 3)))
    assert both.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_virtual_samples_have_the_given_shape_and_dtype(dtype):
    chex.assert_shape(sbn.virtual_samples(KEY, 5, (4, 3), dtype=dtype), (5, 4, 3))
    assert sbn.virtual_samples(KEY, 5, (4, 3), dtype=dtype).dtype == dtype


def test_virtual_samples_have_the_given_moments_in_each_channel():
    mean, std, num = np.array([-2.0, 0.0, 3.0]), np.array([0.5, 1.0, 4.0]), 40_000
    x = np.asarray(sbn.virtual_samples(KEY, num // 4, (2, 2, 3), mean, std), np.float64)
    normal = ((x - mean) / std).reshape(-1, 3)
    # Five standard errors of the moments of normal noise.
    assert (abs(normal.mean(0)) < 5 / num**0.5).all()
    assert (abs(normal.var(0) - 1) < 5 * (2 / num) ** 0.5).all()
    assert abs((normal**4).mean() - 3) < 5 * (96 / (3 * num)) ** 0.5
    assert abs(np.corrcoef(normal.T) - np.eye(3)).max() < 5 / num**0.5


def test_the_same_key_gives_the_same_virtual_data_set_and_another_another():
    a, b, c = (sbn.virtual_samples(jax.random.key(seed), 2, (3,)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(a, b)
    assert (a != c).all()


@pytest.mark.parametrize("strata", [1, 2])
def test_gradients_pass_to_real_and_virtual_images(strata):
    x, virtual = cases.inputs((4, 3)), cases.inputs((2, 3), seed=1)
    g = cases.inputs((6, 3), seed=2)

    def appended(x, virtual):
        return (sbn.append_virtual(x, virtual, strata) * g).sum()

    to_x, to_virtual = jax.grad(appended, (0, 1))(x, virtual)
    chex.assert_trees_all_equal(sbn.append_virtual(to_x, to_virtual, strata), g)
    (dropped,) = jax.vjp(lambda y: sbn.drop_virtual(y, 2, strata), g)[1](x)
    chex.assert_trees_all_equal(
        dropped, sbn.append_virtual(x, jnp.zeros((2, 3)), strata)
    )
