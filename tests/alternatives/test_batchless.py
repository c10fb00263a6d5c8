"""Batchless normalization: against the reference, its optimum, starts and layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from flax_sbn.alternatives.batchless import (
    batchless_init,
    batchless_nll,
    batchless_norm,
)
from flax_sbn.linen.batchless import BatchlessNorm
from flax_sbn.nnx.batchless import BatchlessNorm as NnxBatchlessNorm
from flax_sbn.nnx.batchless import initialize_batchless
from flax_sbn.nnx.loss import Loss
from tests import cases
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(5)
# Shape, feature axis.
LAYOUTS = [((16, 3), -1), ((8, 3, 4, 2), 1), ((4, 3, 5, 2), (1, 3))]


# One compiled program for each shape.
compiled = functools.partial(jax.jit, static_argnames=("axis", "epsilon"))
norm, nll, start = map(compiled, (batchless_norm, batchless_nll, batchless_init))
nll_gradients = compiled(jax.grad(batchless_nll, (0, 1, 2)))


def features_last(x, axis):
    """Returns ``(values, features)`` in float64, and the shape of the features."""
    x = np.asarray(x, np.float64)
    axes = [a % x.ndim for a in np.atleast_1d(axis)]
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    features = x.shape[-len(axes) :]
    return x.reshape(-1, np.prod(features)), features


def reference_nll(x, mean, log_scale, epsilon, mask=None):
    """Value, and gradients by ``mean`` and ``log_scale``, of features last."""
    mean, log_scale = (np.asarray(p, np.float64).reshape(-1) for p in (mean, log_scale))
    value, d_mean, d_log = 0.0, np.zeros(len(mean)), np.zeros(len(mean))
    for c in range(len(mean)):
        a = x[:, c] if mask is None else x[mask[:, c], c]
        s2 = np.exp(2 * log_scale[c])
        v = s2 + epsilon
        value += (0.5 * ((a - mean[c]) ** 2 / v + np.log(v))).mean()
        d_mean[c] = ((mean[c] - a) / v).mean()
        d_log[c] = (s2 / v * (1 - (a - mean[c]) ** 2 / v)).mean()
    return value, d_mean, d_log


def reference_norm(x, mean, log_scale, scale, bias, epsilon):
    mean, log_scale, scale, bias = (
        np.asarray(p, np.float64).reshape(-1) for p in (mean, log_scale, scale, bias)
    )
    return scale * (x - mean) / np.sqrt(np.exp(2 * log_scale) + epsilon) + bias


def given(shape, axis, dtype="float32"):
    """Input and four parameters."""
    x = cases.inputs(shape, dtype)
    axes = [a % len(shape) for a in np.atleast_1d(axis)]
    parameters = cases.inputs((4, *(shape[a] for a in axes)), "float32", seed=1)
    return x, parameters[0], parameters[1] / 4, parameters[2], parameters[3]


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        layout=LAYOUTS,
        dtype=["float32", "bfloat16", "float16", "float64"],
        epsilon=[0.0, 1e-5, 0.1],
    ),
)
def test_values_are_those_of_the_reference(case, x64):
    (shape, axis), dtype, epsilon = case["layout"], case["dtype"], case["epsilon"]
    x, *parameters = given(shape, axis, dtype)
    flat, _ = features_last(x, axis)
    options = {"axis": axis, "epsilon": epsilon}

    @jax.jit
    def compiled(x, *parameters):
        y = batchless_norm(x, *parameters, **options)
        narrow = batchless_norm(x, *parameters, dtype="bfloat16", **options)
        return y, narrow, batchless_nll(x, *parameters[:2], **options)

    y, narrow, loss = compiled(x, *parameters)
    wide = jnp.promote_types(dtype, "float32")
    assert (y.shape, y.dtype) == (x.shape, wide)  # the parameters' dtype
    assert (loss.shape, loss.dtype) == ((), wide)
    expected = reference_norm(flat, *parameters, epsilon)
    assert_close(features_last(y, axis)[0], expected)
    assert_close(features_last(narrow, axis)[0], expected, "bfloat16")
    expected, _, _ = reference_nll(flat, *parameters[:2], epsilon)
    assert_close(loss, expected, num=x.size)


def test_functions_need_no_jit():
    x, *parameters = given((8, 3), -1)
    expected = np.asarray(norm(x, *parameters))
    assert_close(batchless_norm(x, *parameters), expected)
    expected = np.asarray(nll(x, *parameters[:2]))
    assert_close(batchless_nll(x, *parameters[:2]), expected, num=x.size)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_gradients_are_those_of_the_reference(shape, axis, epsilon, x64):
    x, *parameters = (p.astype("float64") for p in given(shape, axis))
    flat, features = features_last(x, axis)
    g = cases.inputs(shape, "float64", seed=2)
    options = {"axis": axis, "epsilon": epsilon}

    @jax.jit
    def pullback(x, *parameters):
        function = functools.partial(batchless_norm, **options)
        return jax.vjp(function, x, *parameters)[1](g)

    mean, log_scale, scale, _ = (np.asarray(p).reshape(-1) for p in parameters)
    std = np.sqrt(np.exp(2 * log_scale) + epsilon)
    flat_g, _ = features_last(g, axis)
    close = functools.partial(assert_close, dtype="float64", num=x.size)
    dx, d_mean, d_log, d_scale, d_bias = pullback(x, *parameters)
    close(features_last(dx, axis)[0], flat_g * scale / std)
    assert not d_mean.any()
    assert not d_log.any()
    close(d_scale.reshape(-1), (flat_g * (flat - mean) / std).sum(0))
    close(d_bias.reshape(-1), flat_g.sum(0))

    dx, d_mean, d_log = nll_gradients(x, *parameters[:2], **options)
    _, expected_mean, expected_log = reference_nll(flat, *parameters[:2], epsilon)
    assert not dx.any()
    close(d_mean, expected_mean.reshape(features))
    close(d_log, expected_log.reshape(features))


def test_the_likelihood_has_two_derivatives(x64):
    x, mean, log_scale, *_ = (p.astype("float64") for p in given((6, 2), -1))
    check_grads(
        lambda *parameters: nll(x, *parameters, epsilon=0.1),
        (mean, log_scale),
        2,
        "rev",
    )


def test_the_likelihood_is_largest_at_mean_and_variance(x64):
    x = cases.inputs((32, 3), "float64")
    mean, log_scale = x.mean(0), 0.5 * jnp.log(x.var(0) - 0.1)
    _, *gradients = nll_gradients(x, mean, log_scale, epsilon=0.1)
    assert_close(gradients, np.zeros((2, 3)), "float64", num=x.size)


def test_gradient_descent_finds_mean_and_standard_deviation(x64):
    x = cases.inputs((64, 3), "float64") * jnp.array([[0.25, 0.5, 1.0]])
    parameters = (jnp.zeros(3), jnp.zeros(3))
    tx = optax.sgd(0.05)

    @jax.jit
    def train(parameters):
        def step(carry, _):
            parameters, state = carry
            gradients = jax.grad(lambda p: batchless_nll(x, *p, epsilon=0.0))(
                parameters
            )
            updates, state = tx.update(gradients, state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (parameters, tx.init(parameters)), length=4000)

    (mean, log_scale), _ = train(parameters)[0]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(log_scale), x.std(0), rtol=1e-6)


def test_a_mean_far_from_zero_costs_no_precision():
    x = 1000 + jax.random.normal(KEY, (4096, 2))
    mean, log_scale = start(x)
    expected, _, _ = reference_nll(np.asarray(x, np.float64), mean, log_scale, 1e-5)
    np.testing.assert_allclose(nll(x, mean, log_scale), expected, rtol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_a_start_from_data_is_batch_normalization(shape, axis):
    x, _, _, scale, bias = given(shape, axis)
    mean, log_scale = start(x, axis=axis)
    y = norm(x, mean, log_scale, scale, bias, axis=axis)
    expected, _ = sbn.batch_norm(x, scale, bias, axis=axis)
    assert_close(y, np.asarray(expected), num=x.size)


@pytest.mark.parametrize(
    "x", [jnp.zeros((1, 3)), jnp.full((8, 3), 7.0), jnp.ones((1, 3), "bfloat16")]
)
def test_without_a_variance_the_scale_starts_at_one(x):
    mean, log_scale = start(x)
    np.testing.assert_array_equal(mean, np.asarray(x[0], "float32"))
    assert not log_scale.any()
    gradients = nll_gradients(x, mean, log_scale)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not norm(x, mean, log_scale).any()


def test_features_that_never_vary_stay_finite():
    x, mean = jnp.zeros((4, 4)), jnp.zeros(4)

    @jax.jit
    def train(log_scale):
        def step(log_scale, _):
            return log_scale - 0.1 * jax.grad(batchless_nll, 2)(
                x, mean, log_scale
            ), None

        return jax.lax.scan(step, log_scale, length=2000)[0]

    log_scale = train(jnp.array([-1000.0, -50.0, 0.0, 40.0]))
    assert np.isfinite(log_scale).all()
    assert np.isfinite(nll(x, mean, log_scale))
    assert np.isfinite(norm(x + 1, mean, log_scale)).all()


def test_what_is_masked_is_not_measured():
    x = np.array(cases.inputs((8, 4, 3)))
    mask = np.random.default_rng(0).random((8, 4, 3)) < 0.6
    hidden = jnp.asarray(np.where(mask, x, np.nan))
    mean, log_scale = cases.inputs((2, 3), seed=1)
    flat, flat_mask = x.reshape(-1, 3).astype("float64"), mask.reshape(-1, 3)
    expected = reference_nll(flat, mean, log_scale, 1e-5, flat_mask)
    assert_close(nll(hidden, mean, log_scale, mask=mask), expected[0], num=x.size)
    _, *gradients = nll_gradients(hidden, mean, log_scale, mask=mask)
    assert_close(gradients, np.stack(expected[1:]), num=x.size)
    expected = [flat[flat_mask[:, c], c] for c in range(3)]
    mean, log_scale = start(hidden, mask=mask)
    assert_close(mean, np.stack([a.mean() for a in expected]), num=x.size)
    assert_close(jnp.exp(log_scale), np.stack([a.std() for a in expected]), num=x.size)


def test_a_feature_of_which_nothing_is_left_learns_nothing():
    x = jnp.full((8, 2), jnp.nan).at[:, 0].set(2.0)
    mask = jnp.array([True, False])
    mean, log_scale = jnp.ones(2), jnp.full(2, 0.3)
    assert np.isfinite(nll(x, mean, log_scale, mask=mask))
    _, *gradients = nll_gradients(x, mean, log_scale, mask=mask)
    gradients = np.stack(gradients)
    assert gradients[:, 0].all()
    assert_close(gradients[:, 1], np.zeros(2))
    assert not np.stack(start(x, mask=mask))[:, 1].any()


class Network(nn.Module):
    """Two layers, each normalized."""

    @nn.compact
    def __call__(self, x, train=True):
        for features in (5, 4):
            x = nn.Dense(features)(x)
            x = BatchlessNorm(use_running_average=not train)(x)
            x = nn.tanh(x)
        return x


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.first_norm = NnxBatchlessNorm(5, rngs=rngs)
        self.second = nnx.Linear(5, 4, rngs=rngs)
        self.second_norm = NnxBatchlessNorm(4, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.first_norm(self.first(x)))
        return nnx.tanh(self.second_norm(self.second(x)))


X = cases.inputs((8, 3))


init = jax.jit(Network().init)


def linen_loss(params, x):
    y, updates = Network().apply({"params": params}, x, mutable=["losses"])
    return (y**2).mean() + sum(jax.tree.leaves(updates["losses"]))


def nnx_loss(model, x):
    y, losses = nnx.capture(model, Loss)(x)
    return (y**2).mean() + sum(jax.tree.leaves(losses))


def test_gradients_of_single_rows_average_to_those_of_the_batch(x64):
    x = X.astype("float64")
    params = init(KEY, x[:4])["params"]
    params = jax.tree.map(lambda p: p.astype("float64"), params)

    @jax.jit
    def gradients(params, micro_batches):
        parts = jax.vmap(jax.grad(linen_loss), (None, 0))(params, micro_batches)
        return jax.tree.map(lambda part: part.mean(0), parts)

    whole, rows = gradients(params, x[None]), gradients(params, x[:, None])
    for actual, expected in zip(
        jax.tree.leaves(rows), jax.tree.leaves(whole), strict=True
    ):
        assert_close(actual, np.asarray(expected), "float64", num=x.size)


def test_linen_starts_from_data_layer_by_layer():
    variables = init(KEY, X)
    assert variables.keys() == {"params"}
    params = variables["params"]
    hidden = X
    for i in range(2):
        hidden = hidden @ params[f"Dense_{i}"]["kernel"]
        layer = params[f"BatchlessNorm_{i}"]
        expected = start(hidden)
        assert_close(layer["mean"], np.asarray(expected[0]), num=X.size)
        assert_close(layer["log_scale"], np.asarray(expected[1]), num=X.size)
        hidden = nn.tanh(norm(hidden, layer["mean"], layer["log_scale"]))
    dummy = init(KEY, jnp.zeros((1, 3)))["params"]
    for i in range(2):
        assert not dummy[f"BatchlessNorm_{i}"]["mean"].any()
        assert not dummy[f"BatchlessNorm_{i}"]["log_scale"].any()


def nnx_like(params):
    """An nnx network with the weights, but not the start, of a linen network."""
    model = NnxNetwork(nnx.Rngs(0))
    for i, name in enumerate(["first", "second"]):
        getattr(model, name).kernel[...] = params[f"Dense_{i}"]["kernel"]
    return model


def test_nnx_starts_as_linen_does():
    params = init(KEY, X)["params"]
    model = nnx_like(params)
    y = nnx.jit(initialize_batchless)(model, X)
    assert_close(y, np.asarray(Network().apply({"params": params}, X)), num=X.size)
    assert_close(model(X), np.asarray(y), num=X.size)
    for i, layer in enumerate([model.first_norm, model.second_norm]):
        expected = params[f"BatchlessNorm_{i}"]
        for name in ("mean", "log_scale", "scale", "bias"):
            actual = getattr(layer, name)[...]
            assert_close(actual, np.asarray(expected[name]), num=X.size)


def test_a_start_that_fails_leaves_the_network_as_it_was():
    model = NnxNetwork(nnx.Rngs(0))
    with pytest.raises(TypeError):
        initialize_batchless(model, "no array")
    model(X)
    assert not model.first_norm.mean[...].any()


def test_linen_and_nnx_train_alike():
    params = init(KEY, X)["params"]
    model = nnx_like(params)
    nnx.jit(initialize_batchless)(model, X)
    x = 1 + 2 * X
    value, gradients = jax.jit(jax.value_and_grad(linen_loss))(params, x)
    nnx_value, nnx_gradients = nnx.jit(nnx.value_and_grad(nnx_loss))(model, x)
    assert_close(nnx_value, np.asarray(value), num=X.size)
    for i, name in enumerate(["first_norm", "second_norm"]):
        for parameter, expected in gradients[f"BatchlessNorm_{i}"].items():
            actual = nnx_gradients[name][parameter][...]
            assert_close(actual, np.asarray(expected), num=X.size)


def label(path, _):
    """Names the optimizer of a parameter, in linen and in nnx."""
    names = {getattr(key, "key", None) for key in path}
    return "statistics" if names & {"mean", "log_scale"} else "weights"


TX = optax.multi_transform(
    {"statistics": optax.sgd(0.05), "weights": optax.set_to_zero()},
    lambda params: jax.tree_util.tree_map_with_path(label, params),
)


def test_linen_gives_mean_and_scale_a_learning_rate_of_their_own():
    params = before = init(KEY, X)["params"]
    x, state = 0.5 + X, TX.init(params)

    @jax.jit
    def step(params, state):
        updates, state = TX.update(jax.grad(linen_loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(1000):
        params, state = step(params, state)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        old = functools.reduce(lambda tree, key: tree[key.key], path, before)
        changed = (value != old).any()
        assert changed == (label(path, None) == "statistics")
    hidden = x @ params["Dense_0"]["kernel"]
    layer = params["BatchlessNorm_0"]
    np.testing.assert_allclose(layer["mean"], hidden.mean(0), rtol=1e-3)
    np.testing.assert_allclose(jnp.exp(layer["log_scale"]), hidden.std(0), rtol=1e-3)


def test_nnx_gives_mean_and_scale_a_learning_rate_of_their_own():
    model = NnxNetwork(nnx.Rngs(0))
    initialize_batchless(model, X)
    before = nnx.clone(model)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss)(model, 1 + 2 * X))

    step(model, optimizer)
    for module in ("first_norm", "second_norm"):
        new, old = getattr(model, module), getattr(before, module)
        assert (new.mean[...] != old.mean[...]).any()
        assert (new.log_scale[...] != old.log_scale[...]).any()
        assert (new.scale[...] == old.scale[...]).all()
    assert (model.first.kernel[...] == before.first.kernel[...]).all()


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_evaluation_computes_the_same_and_sows_nothing(api):
    x = cases.inputs((4, 3, 5))
    options = {"axis": 1, "epsilon": 0.1, "dtype": "bfloat16", "use_bias": False}
    if api == "linen":
        layer = BatchlessNorm(**options)
        variables = layer.init(KEY, x, use_running_average=False)
        assert variables["params"].keys() == {"mean", "log_scale", "scale"}
        apply = functools.partial(layer.apply, variables, mutable=["losses"])
        trained, updates = apply(x, use_running_average=False)
        losses = updates["losses"]
        evaluated, updates = apply(x, use_running_average=True)
        assert "losses" not in updates
        mean, log_scale = start(x, axis=1)
    else:
        layer = NnxBatchlessNorm(3, rngs=nnx.Rngs(0), **options)
        trained, losses = nnx.capture(layer, Loss)(x)
        layer.eval()
        evaluated, none = nnx.capture(layer, Loss)(x)
        assert not jax.tree.leaves(none)
        layer.train()
        _, none = nnx.capture(layer, Loss)(x, use_running_average=True)
        assert not jax.tree.leaves(none)
        mean = log_scale = jnp.zeros(3)
    (loss,) = jax.tree.leaves(losses)
    expected = nll(x, mean, log_scale, axis=1, epsilon=0.1)
    assert_close(loss, np.asarray(expected), num=x.size)
    assert trained.dtype == evaluated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        trained.astype("float32"), evaluated.astype("float32")
    )
    expected = norm(x, mean, log_scale, axis=1, epsilon=0.1)
    assert_close(trained, np.asarray(expected), "bfloat16")


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_mask_what_they_measure_and_keep_their_parameters_dtype(api):
    x = cases.inputs((8, 3)).at[5:].set(jnp.nan)
    mask = (jnp.arange(8) < 5)[:, None]
    if api == "linen":
        layer = BatchlessNorm(use_running_average=False, param_dtype="bfloat16")
        variables = layer.init(KEY, x, mask=mask)
        _, updates = layer.apply(variables, x, mask=mask, mutable=["losses"])
        losses, params = updates["losses"], variables["params"]
    else:
        layer = NnxBatchlessNorm(3, param_dtype="bfloat16", rngs=nnx.Rngs(0))
        initialize_batchless(layer, x, mask=mask)
        _, losses = nnx.capture(layer, Loss)(x, mask=mask)
        params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert all(value.dtype == jnp.bfloat16 for value in params.values())
    assert_close(params["mean"], np.asarray(x[:5].mean(0)), "bfloat16")
    expected = nll(x[:5], params["mean"], params["log_scale"])
    assert_close(jax.tree.leaves(losses)[0], np.asarray(expected), num=x.size)


P = jnp.zeros(3)
ERRORS = {
    "mean": (lambda x: batchless_norm(x, jnp.ones(4), P), "mean of shape (4,)", "axis"),
    "log_scale": (lambda x: batchless_nll(x, P, 0.0), "log_scale of shape ()", "axis"),
    "scale": (lambda x: batchless_norm(x, P, P, 1.0), "scale of shape ()", "axis"),
    "axis": (lambda x: batchless_init(x, axis=2), "axis=2", "Features last"),
    "epsilon": (
        lambda x: batchless_norm(x, P, P, epsilon=-1.0),
        "epsilon=-1.0",
        "Try 1e-5",
    ),
    "mask": (
        lambda x: batchless_nll(x, P, P, mask=jnp.ones(5, bool)),
        "mask of shape (5,)",
        "size 1",
    ),
    "nnx": (
        lambda x: NnxBatchlessNorm(4, rngs=nnx.Rngs(0))(x),
        "mean of shape (4,)",
        "axis",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, *message = ERRORS[name]
    message_while_tracing((8, 3), call, ValueError, *message)
