"""Gradients against the backward formula and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import flax_sbn as sbn
from tests import cases, reference, samples
from tests.closeness import assert_close
from tests.samples import KEY

SAMPLERS = {"all": None, **cases.SAMPLERS}
SHAPE = (8, 4, 3, 2)


def gradients(x, g, scale, bias, sampler, mask=None):
    """Gradients of ``sum(g * y)`` by x, scale and bias."""

    def loss(x, scale, bias):
        y, _ = sbn.batch_norm(x, scale, bias, sampler=sampler, key=KEY, mask=mask)
        return (y * g).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_are_those_of_the_formula(name, masked, x64):
    x, g = (cases.inputs(SHAPE, "float64", seed=i) for i in range(2))
    scale, bias = cases.inputs((2, 2), "float64", seed=2)
    mask = np.random.default_rng(3).random(SHAPE) < 0.6 if masked else None
    actual = gradients(x, g, scale, bias, SAMPLERS[name], mask)
    shares = samples.shares(SAMPLERS[name], SHAPE, True if mask is None else mask)
    for a, e in zip(
        actual, reference.backward(x, g, shares, np.asarray(scale)), strict=True
    ):
        assert_close(a, e, "float64", num=x.size)


@pytest.mark.parametrize("name", ["VDN", "VDN-strata"])
def test_real_images_are_only_scaled_back_where_virtual_images_are_measured(name):
    x, g = (cases.inputs(SHAPE, seed=i) for i in range(2))
    scale, bias = cases.inputs((2, 2), seed=2)
    dx, _, _ = gradients(x, g, scale, bias, SAMPLERS[name])
    (virtual,), _ = samples.measured(SAMPLERS[name], SHAPE[:-1])
    _, var = samples.moments(x, SAMPLERS[name])
    expected = (np.asarray(scale) * np.asarray(g) / np.sqrt(var + 1e-5))[~virtual]
    assert_close(dx[~virtual], expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_shift_of_everything_has_no_gradient(name, x64):
    x, g = (cases.inputs(SHAPE, "float64", seed=i) for i in range(2))
    dx, _, _ = gradients(x, g, jnp.ones(2), jnp.zeros(2), SAMPLERS[name])
    assert_close(dx.mean((0, 1, 2)), np.zeros(2), "float64")


@pytest.mark.parametrize("name", ["BS-strata", "FS", "FS+VDN"])
def test_gradients_agree_with_finite_differences_to_second_order(name, x64):
    shape = cases.SHAPES[3]
    x = cases.inputs(shape, "float64")
    scale, bias = cases.inputs((2, shape[-1]), "float64", seed=1)
    # Every other sampler with a mask, whose gradients the formula above checks, too.
    masked = list(SAMPLERS).index(name) % 2
    mask = np.arange(x.size).reshape(shape) % 5 > 0 if masked else None

    @jax.jit
    def function(x, scale, bias):
        y, statistics = sbn.batch_norm(
            x, scale, bias, sampler=SAMPLERS[name], key=KEY, mask=mask
        )
        return jnp.tanh(y), statistics

    check_grads(function, (x, scale, bias), order=2, modes=["fwd", "rev"])
