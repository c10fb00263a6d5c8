"""Binarization: against the reference, its gradients, and a network made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_sbn.alternatives.binarization import binarize, binarize_kernel
from harness.methods import Method
from models.binary_resnet import BinaryResNet, BinaryUnit
from models.linen_units import LinenUnits
from tests import cases
from tests.closeness import assert_close

KEY = jax.random.key(0)
KINDS = ("flax", "batch", "group", "norm_free", "none")


def reference(kernel):
    """Binarizes one output feature at a time."""
    kernel = np.asarray(kernel, np.float64)
    y = np.empty_like(kernel)
    for feature in range(kernel.shape[-1]):
        weights = kernel[..., feature]
        y[..., feature] = np.abs(weights).mean() * np.where(weights < 0, -1, 1)
    return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4, 3)], ids=str)
def test_kernels_are_those_of_the_reference(shape, dtype, x64):
    kernel = cases.inputs(shape, dtype)
    y = jax.jit(binarize_kernel)(kernel)
    assert (y.shape, y.dtype) == (shape, kernel.dtype)
    assert_close(y, reference(kernel), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_a_clip(dtype):
    x = jnp.array([-2, -1.01, -1, -0.3, -0.0, 0, 1e-30, 0.7, 1, 1.01, 3], dtype)
    inside = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    y, pullback = jax.vjp(binarize, x)
    g = cases.inputs(x.shape, dtype)
    (dx,) = pullback(g)
    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y), np.where(np.asarray(x) < 0, -1, 1))
    np.testing.assert_array_equal(np.asarray(dx), np.asarray(g) * inside)
    _, dy = jax.jvp(binarize, (x,), (g,))
    np.testing.assert_array_equal(np.asarray(dy), np.asarray(dx))


def test_the_scale_of_a_kernel_is_a_constant_and_not_in_the_gradient():
    kernel = 0.5 * cases.inputs((4, 3))
    g = cases.inputs((4, 3), seed=1)
    (dx,) = jax.vjp(binarize_kernel, kernel)[1](g)
    np.testing.assert_array_equal(dx, g * (abs(kernel) <= 1))
    assert (dx == 0).any()
    assert (dx != 0).any()


def test_zeros_and_integers_binarize():
    np.testing.assert_array_equal(binarize(0), 1.0)
    y = binarize(np.array([-3, 0, 2]))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, [-1, 1, 1])
    zero = jnp.zeros((3, 2))
    value, gradient = jax.value_and_grad(lambda w: binarize_kernel(w).sum())(zero)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.ones((3, 2)))


def test_a_kernel_without_inputs_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*Use binarize"):
        binarize_kernel(jnp.ones(3))


def units(kind, dtype=jnp.float32):
    return LinenUnits(Method(kind, kind), train=True, dtype=dtype)


def apply(module, params, x):
    return module.apply({"params": params}, x, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_makes_logits_and_every_weight_has_a_gradient(kind):
    network = BinaryResNet(units(kind), num_classes=3, blocks=1, width=4)
    x = jax.random.normal(KEY, (8, 8, 8, 1))
    variables = jax.jit(network.init)(KEY, jnp.zeros((1, 8, 8, 1)))
    assert ("batch_stats" in variables) == (kind in ("flax", "batch"))
    # The gain from zero lets nothing through in the first step.
    params = jax.tree.map_with_path(
        lambda path, p: p + 0.5 * (path[-1].key == "skip_gain"), variables["params"]
    )
    gains = sum(
        path[-1].key == "skip_gain" for path, _ in jax.tree.leaves_with_path(params)
    )
    assert gains == (6 if kind == "norm_free" else 0)

    def loss(params):
        logits = apply(network, params, x)
        return -jax.nn.log_softmax(logits)[:, 0].mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (logits.shape, logits.dtype) == ((8, 3), jnp.float32)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient) != 0).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", ["batch", "norm_free"])
def test_the_network_computes_in_half_precision(kind):
    unit = BinaryUnit(units(kind, jnp.bfloat16), features=8, strides=2, beta=1.1)
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
    y, variables = jax.eval_shape(unit.init_with_output, KEY, x)
    assert (y.shape, y.dtype) == ((2, 4, 4, 8), jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


def test_without_a_norm_the_mean_and_variance_of_the_branch_are_known():
    unit = BinaryUnit(units("norm_free"), features=64, strides=1, beta=2.0)
    x = 2 * jax.random.normal(KEY, (8, 12, 12, 64))
    params = jax.jit(unit.init)(KEY, x[:1])["params"]
    np.testing.assert_array_equal(apply(unit, params, x), x)
    y = apply(unit, {**params, "skip_gain": jnp.ones(())}, x)
    branch = (y - x)[:, 1:-1, 1:-1]  # the border sees zeros, which are not binary
    assert float(branch.std()) == pytest.approx(0.2, rel=0.05)
    assert float(branch.mean()) == pytest.approx(0, abs=0.01)
