"""Blocks without normalization: their variance, their gradients, and training them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.test_util import check_grads

from flax_sbn.alternatives.norm_free import expected_std, norm_free_residual
from flax_sbn.alternatives.weight_standardization import scaled
from flax_sbn.linen.norm_free import NormFreeBlock
from flax_sbn.linen.weight_standardization import WSConv
from flax_sbn.nnx.norm_free import NormFreeBlock as NnxNormFreeBlock
from tests import cases, teaching
from tests.closeness import assert_close

KEY = jax.random.key(0)
ONES = nn.initializers.ones


def some_params(module, x):
    """Returns parameters of a linen module, far from their initialization."""
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    return jax.tree.map(lambda p: cases.inputs(p.shape, seed=p.size), shapes)


def test_deviations_grow_by_a_branch_a_block_and_start_anew_in_each_stage():
    found = expected_std([3, 1, 2], alpha=0.5)
    variances = [1, 1.25, 1.5, 1.75, 1.25, 1.25]
    np.testing.assert_allclose(np.square(found), variances, rtol=1e-12)
    assert expected_std([1]) == (1.0,)
    assert expected_std([2])[1] == pytest.approx(1.04**0.5)
    with pytest.raises(ValueError, match=r"at least one block.*\[2, 0\]"):
        expected_std([2, 0])


def reference_relu(x):
    return np.maximum(x, 0) * np.sqrt(2 / (1 - 1 / np.pi))


@pytest.mark.parametrize("projects", [False, True])
def test_the_residual_is_that_of_the_reference(projects, x64):
    x, kernel, other = (cases.inputs((4, 4), "float64", seed=i) for i in range(3))

    def residual(x, kernel, other, skip_gain):
        shortcut = (lambda z: z @ other) if projects else None
        return norm_free_residual(
            x,
            lambda z: z @ kernel,
            shortcut,
            skip_gain=skip_gain,
            activation=scaled(jax.nn.relu),
            beta=1.5,
            alpha=0.3,
        )

    z = reference_relu(np.asarray(x) / 1.5)
    skipped = z @ np.asarray(other) if projects else np.asarray(x)
    expected = skipped + 0.3 * 0.7 * z @ np.asarray(kernel)
    given = (x, kernel, other, jnp.asarray(0.7))
    assert_close(residual(*given), expected, "float64", num=4)
    check_grads(jax.jit(residual), given, 2, "rev")


def test_without_its_gain_a_block_is_the_identity_and_only_the_gain_learns():
    x = cases.inputs((4, 3))

    def loss(kernel, skip_gain):
        y = norm_free_residual(x, lambda z: z @ kernel, skip_gain=skip_gain)
        return jnp.square(y).sum(), y

    kernel = cases.inputs((3, 3), seed=1)
    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(kernel, 0.0)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(gradients[0], np.zeros((3, 3)))
    assert gradients[1] != 0


def test_a_gain_in_float32_leaves_half_precision_as_it_is():
    x = cases.inputs((4, 3), "bfloat16")
    y = norm_free_residual(x, jnp.sin, skip_gain=jnp.ones(()), beta=1.1)
    assert y.dtype == jnp.bfloat16


def test_a_branch_of_another_shape_is_refused():
    teaching.message_while_tracing(
        (2, 8, 4),
        lambda x: norm_free_residual(x, lambda z: z[:, ::2]),
        ValueError,
        "(2, 4, 4)",
        "Give a shortcut of the same strides",
    )


BLOCKS = {
    "plain": (4, {}),
    "wider": (8, {"beta": 1.1, "alpha": 0.5}),
    "strided": (4, {"strides": 2, "activation": jax.nn.silu}),
    "a stage's start": (8, {"strides": (2, 1), "kernel_size": (3, 1), "beta": 1.4}),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_same_in_linen_and_nnx_and_as_described(name):
    features, options = BLOCKS[name]
    x = cases.inputs((2, 6, 6, 4))
    block = NormFreeBlock(features, **options)
    params = some_params(block, x)
    module = nnx.eval_shape(
        lambda: NnxNormFreeBlock(4, features, **options, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(module)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert shapes == jax.tree.map(jnp.shape, params)
    projects = {"shortcut"} if name != "plain" else set()
    assert set(params) == {"conv1", "conv2", "skip_gain"} | projects

    def in_linen(params):
        return block.apply({"params": params}, x)

    def in_nnx(params):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    def as_described(params):
        def conv(name, window, strides):
            layer = WSConv(features, window, strides=strides)
            return lambda z: layer.apply({"params": params[name]}, z)

        window, strides = options.get("kernel_size", (3, 3)), options.get("strides", 1)
        activation = scaled(options.get("activation", jax.nn.relu))
        z = activation(x / options.get("beta", 1.0))
        y = activation(conv("conv1", window, strides)(z))
        y = conv("conv2", window, 1)(y)
        skipped = conv("shortcut", (1, 1), strides)(z) if projects else x
        return skipped + options.get("alpha", 0.2) * params["skip_gain"] * y

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, params):
        y, pullback = jax.vjp(function, params)
        return y, pullback(jnp.cos(y))

    expected = jax.tree.leaves(value_and_gradients(as_described, params))
    for function in (in_linen, in_nnx):
        found = jax.tree.leaves(value_and_gradients(function, params))
        for a, e in zip(found, expected, strict=True):
            assert_close(a, np.asarray(e), num=36)


def test_blocks_start_as_identities_from_a_row_of_zeros():
    block = NormFreeBlock(3)
    variables = jax.jit(block.init)(KEY, jnp.zeros((1, 5, 5, 3)))
    x = cases.inputs((2, 5, 5, 3))
    np.testing.assert_array_equal(jax.jit(block.apply)(variables, x), x)
    make = functools.partial(NnxNormFreeBlock, 3, 3)
    y = jax.jit(lambda x: make(rngs=nnx.Rngs(0))(x))(x)
    np.testing.assert_array_equal(y, x)


def test_the_convolutions_take_any_option():
    conv = functools.partial(WSConv, dtype=jnp.bfloat16, use_bias=False)
    block = NormFreeBlock(4, conv=conv, skip_gain_init=ONES)
    x = cases.inputs((2, 4, 4, 4), "bfloat16")
    y, variables = jax.eval_shape(block.init_with_output, KEY, x)
    assert y.dtype == jnp.bfloat16
    assert "bias" not in variables["params"]["conv1"]


def test_zero_kernels_and_inputs_stay_finite():
    block = NormFreeBlock(4, strides=2, skip_gain_init=ONES)
    x = jnp.zeros((2, 4, 4, 3))
    params = jax.tree.map(jnp.zeros_like, some_params(block, x))

    def loss_fn(params):
        return jnp.square(block.apply({"params": params}, x) - 1).sum()

    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(params)
    for leaf in (loss, *jax.tree.leaves(gradients)):
        assert np.isfinite(leaf).all()


def test_the_variance_follows_the_analytic_one():
    stages, width = (20, 16), 128
    conv = functools.partial(WSConv, padding="CIRCULAR")  # which has no border

    @functools.partial(jax.jit, static_argnames="strides")
    def apply(key, x, beta, strides):
        block = NormFreeBlock(
            width, (3,), strides, beta=beta, conv=conv, skip_gain_init=ONES
        )
        return block.init_with_output(key, x)[0], jnp.square(x).mean()

    x = jax.random.normal(KEY, (16, 32, width))
    expected, squares = expected_std(stages), []
    for index, beta in enumerate(expected):
        strides = 2 if index == stages[0] else 1
        x, square = apply(jax.random.fold_in(KEY, index), x, beta, strides)
        squares.append(square)
    np.testing.assert_allclose(np.sqrt(squares), expected, rtol=0.1)
    assert squares[19] > 1.5 > 1.2 > squares[21]  # it does grow, and starts anew


class Network(nn.Module):
    """A stem, three blocks, and a head."""

    @nn.compact
    def __call__(self, x):
        x = WSConv(8, (3,))(x)
        for index, beta in enumerate(expected_std([2, 1])):
            x = NormFreeBlock(8, (3,), strides=1 + index // 2, beta=beta)(x)
        x = scaled(jax.nn.relu)(x).mean(1)
        return nn.Dense(3, name="head")(x)


def clipped(params):
    """Says what to clip: the kernels, but not those of the last layer."""

    def one(path, param):
        return path[0].key != "head" and jnp.ndim(param) > 1

    return jax.tree.map_with_path(one, params)


def test_adaptive_gradient_clipping_bounds_all_kernels_but_the_last_layer_s():
    params = some_params(Network(), jnp.zeros((1, 6, 3)))
    clip = optax.masked(optax.adaptive_grad_clip(0.01), clipped)
    gradients = jax.tree.map(lambda p: 100 + p, params)
    updates, _ = clip.update(gradients, clip.init(params), params)

    def check(path, update, gradient, param):
        if path[0].key == "head" or param.ndim < 2:
            np.testing.assert_array_equal(update, gradient)
            return
        squares = [np.square(a).reshape(-1, 8).sum(0) for a in (update, param)]
        np.testing.assert_allclose(squares[0] / squares[1], 0.01**2, rtol=1e-4)

    jax.tree.map_with_path(check, updates, gradients, params)


def test_a_network_trains_with_adaptive_gradient_clipping():
    labels = np.arange(48) % 3
    x = cases.inputs((48, 6, 3)) + np.eye(3, dtype="float32")[labels][:, None]
    network = Network()
    clip = optax.masked(optax.adaptive_grad_clip(0.02), clipped)
    optimizer = optax.chain(clip, optax.sgd(0.1, momentum=0.9))

    def loss_fn(params):
        logits = network.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(network.init)(KEY, x[:1])["params"]
    state, losses = optimizer.init(params), []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    gains = [params[f"NormFreeBlock_{i}"]["skip_gain"] for i in range(3)]
    assert all(abs(gain) > 1e-3 for gain in gains)
