"""Batch norm preconditioning: against explicit matrices, and in linen and nnx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax import lax

from flax_sbn.linen.input_statistics import apply_with_inputs
from flax_sbn.nnx.input_statistics import call_with_inputs
from flax_sbn.optim.preconditioning import (
    InputStatistics,
    batch_norm_preconditioning,
    input_statistics,
    precondition_gradients,
)
from tests import cases
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(0)
WINDOWS = [(), (3,), (3, 2)]


def matrix(mean, var, window=(), bias=True, relative=1e-2, epsilon=1e-4):
    """Returns P, which takes the normalized layer's (bias, kernel) to the layer's."""
    mean, var = (
        np.tile(np.asarray(a, np.float64), int(np.prod(window))) for a in (mean, var)
    )
    if not bias:
        var = var + mean**2
    std = np.sqrt(var + relative * var.max() + epsilon)
    if not bias:
        return np.diag(1 / std)
    p = np.diag(1 / np.concatenate([[1], std]))
    p[0, 1:] = -mean / std
    return p


def reference(kernel, bias, mean, var, num, **options):
    """Returns the preconditioned gradients of kernel and bias."""
    kernel = np.asarray(kernel, np.float64)
    p = matrix(mean, var, kernel.shape[:-2], bias is not None, **options)
    g = kernel.reshape(-1, kernel.shape[-1])
    n = len(g)
    if bias is not None:
        g = np.concatenate([np.asarray(bias, np.float64)[None], g])
    d = p @ p.T @ g / max(n / num, 1)
    dkernel = d[-n:].reshape(kernel.shape)
    return (dkernel, None) if bias is None else (dkernel, d[0])


def population(batches, decay):
    """Returns mean, variance and weight of all examples, by age of their batch."""
    weights = [
        np.full(len(x), decay**age)
        for x, age in zip(batches, reversed(range(len(batches))), strict=True)
    ]
    weights = np.concatenate(weights)
    x = np.concatenate([np.asarray(x, np.float64) for x in batches])
    mean = np.average(x, 0, weights)
    return mean, np.average((x - mean) ** 2, 0, weights), weights.sum()


def moments(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.mean(0), x.var(0), len(x)


def initial(model, x):
    """Returns random parameters, without compiling what would draw them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, x)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype),
        shapes["params"],
    )
    if "batch_stats" not in shapes:
        return {"params": params}
    fresh = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    return {"params": params, "batch_stats": {"norm": fresh}}


def gradients(window=(), features=(5, 4), dtype="float32"):
    return (
        cases.inputs((*window, *features), dtype, seed=1),
        cases.inputs(features[1:], dtype, seed=2),
    )


def statistics(features=5, num=64, dtype="float32"):
    mean = 3 * cases.inputs((features,), dtype, seed=3)
    var = cases.inputs((features,), dtype, seed=4) ** 2
    return InputStatistics(mean, var, jnp.asarray(num, dtype))


@pytest.mark.parametrize(
    ("dtype", "num"), [("float64", 1), ("float32", 7), ("bfloat16", 1000)]
)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_are_multiplied_by_the_matrix(window, has_bias, num, dtype, x64):
    kernel, bias = gradients(window, dtype=dtype)
    bias = bias if has_bias else None
    inputs = statistics(num=num, dtype="float64" if dtype == "float64" else "float32")
    options = {"relative_epsilon": 0.05, "epsilon": 0.3}
    function = functools.partial(precondition_gradients, **options)
    actual = jax.jit(function)(kernel, bias, inputs)
    expected = reference(kernel, bias, *inputs, relative=0.05, epsilon=0.3)
    assert_close(actual[0], expected[0], dtype, num=kernel.size)
    assert actual[0].dtype == dtype
    if has_bias:
        assert_close(actual[1], expected[1], dtype, num=kernel.size)
        assert actual[1].dtype == dtype
    else:
        assert actual[1] is None


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_step_is_one_of_the_network_with_normalized_inputs(window, has_bias, x64):
    x = cases.inputs((16, *(6 for _ in window), 3), "float64")
    kernel, bias = gradients(window, (3, 4), "float64")
    bias = bias if has_bias else None

    def layer(x, kernel, bias):
        y = _convolve(x, kernel) if window else x @ kernel
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)

    def stepped(x, kernel, bias, precondition):
        """Returns the output after a step of gradient descent on any loss."""

        def loss(parameters):
            return jnp.square(jnp.sin(layer(x, *parameters))).mean()

        parameters = kernel, bias
        updates = precondition(*jax.grad(loss)(parameters))
        return layer(x, *jax.tree.map(lambda p, u: p - 0.3 * u, parameters, updates))

    @jax.jit
    def outputs(x, kernel, bias):
        mean, var, _ = inputs = input_statistics(x)
        if bias is None:
            mean, var = jnp.zeros(3), var + mean**2
        std = jnp.sqrt(var + 1e-2 * var.max() + 1e-4)
        hat_bias = bias
        hat_kernel = kernel * jnp.broadcast_to(std[:, None], kernel.shape)
        if bias is not None:
            hat_bias = bias + jnp.tensordot(mean, kernel.sum(range(len(window))), 1)
        normalized = (x - jnp.broadcast_to(mean, x.shape)) / jnp.broadcast_to(
            std, x.shape
        )
        return (
            layer(x, kernel, bias),
            layer(normalized, hat_kernel, hat_bias),
            stepped(x, kernel, bias, lambda *g: precondition_gradients(*g, inputs)),
            stepped(normalized, hat_kernel, hat_bias, lambda *g: g),
        )

    before, normalized_before, after, normalized_after = outputs(x, kernel, bias)
    assert_close(before, np.asarray(normalized_before), "float64", num=x.size)
    assert_close(after, np.asarray(normalized_after), "float64", num=x.size)
    assert abs(after - before).max() > 0.01


def _convolve(x, kernel):
    rank = x.ndim - 2
    axes = (0, rank + 1, *range(1, rank + 1))
    numbers = lax.ConvDimensionNumbers(axes, (rank + 1, rank, *range(rank)), axes)
    return lax.conv_general_dilated(
        x, kernel, (1,) * rank, "VALID", dimension_numbers=numbers
    )


def regression(scales=(1.0, 2.0, 5.0, 10.0), mean=50.0):
    rng = np.random.default_rng(0)
    x = mean + rng.standard_normal((512, len(scales))) * scales
    y = (x - mean) @ rng.standard_normal((len(scales), 1)) + 3
    return x, y, np.concatenate([np.ones((len(x), 1)), x], 1)


def test_the_condition_number_of_a_linear_regression_falls():
    x, _, design = regression()
    hessian = design.T @ design / len(x)
    before = np.linalg.cond(hessian)
    mean, var, _ = moments(x)
    p = matrix(mean, var)
    assert before > 1e6
    assert np.linalg.cond(p.T @ hessian @ p) < 3


def test_gradient_descent_converges_where_it_would_not(x64):
    x, y, design = regression()
    best = np.linalg.lstsq(design, y, rcond=None)[0]
    optimum = np.square(design @ best - y).mean()
    model = nn.Dense(1, param_dtype="float64")

    def excess(tx):
        params = initial(model, x)["params"]
        state = tx.init(params)

        def loss(params):
            prediction, inputs = apply_with_inputs(model, {"params": params}, x)
            return jnp.square(prediction - y).mean(), inputs

        @jax.jit
        def step(params, state):
            grads, inputs = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, inputs=inputs)
            return optax.apply_updates(params, updates), state

        for _ in range(30):
            params, state = step(params, state)
        return loss(params)[0] - optimum

    eigenvalues = np.linalg.eigvalsh(2 * design.T @ design / len(x))
    fastest = optax.sgd(2 / (eigenvalues[0] + eigenvalues[-1]))
    plain = optax.with_extra_args_support(fastest)
    preconditioned = optax.chain(batch_norm_preconditioning(), optax.sgd(0.5))
    assert excess(plain) > 1
    assert excess(preconditioned) < 1e-12


@pytest.mark.parametrize("shape", [(3,), (1, 3), (16, 3), (8, 5, 3), (8, 5, 4, 3)])
def test_statistics_are_those_of_the_input(shape):
    x = 1000 + cases.inputs(shape)
    actual, expected = jax.jit(input_statistics)(x), moments(x)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, num=x.size)
    assert actual.mean.dtype == actual.var.dtype == actual.num.dtype == "float32"


def test_statistics_of_half_precision_are_measured_in_float32():
    x = cases.inputs((64, 3), "bfloat16")
    for a, e in zip(input_statistics(x), moments(x), strict=True):
        assert a.dtype == "float32"
        assert_close(a, e, num=x.size)


def tree(inputs):
    return {"layer": {"kernel": inputs}}


def grads_tree(window=()):
    kernel, bias = gradients(window)
    return {"layer": {"kernel": kernel, "bias": bias}}


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("images", [(1, 1, 1, 1), (8, 8, 8), (8, 3, 16, 1)], ids=str)
def test_running_statistics_are_those_of_all_images_so_far(images, decay):
    tx = batch_norm_preconditioning(decay)
    grads = grads_tree()
    update = jax.jit(tx.update)
    state = tx.init(grads)
    batches = []
    for i, n in enumerate(images):
        batches.append(30 + np.asarray(cases.inputs((n, 5), seed=i)) * (i + 1))
        inputs = tree(jax.jit(input_statistics)(batches[-1]))
        updates, state = update(grads, state, inputs=inputs)
        running = state.running["layer"]["kernel"]
        expected = population(batches, decay)
        for a, e in zip(running, expected, strict=True):
            assert_close(a, e, num=100)
        mean, var, _ = running  # rounding of the variance is no concern here
        dkernel, dbias = reference(*gradients(), mean, var, n)
        assert_close(updates["layer"]["kernel"], dkernel, num=100)
        assert_close(updates["layer"]["bias"], dbias, num=100)


def test_the_first_step_uses_its_own_statistics():
    x = cases.inputs((8, 5))
    tx = batch_norm_preconditioning()
    _, state = tx.update(
        grads_tree(), tx.init(grads_tree()), inputs=tree(input_statistics(x))
    )
    for a, e in zip(state.running["layer"]["kernel"], input_statistics(x), strict=True):
        np.testing.assert_array_equal(a, e)


def test_gradients_without_statistics_pass():
    grads = {
        "measured": {"kernel": jnp.ones((3, 2))},
        "other": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "embedding": jnp.ones((4, 2)),
        "kernel": jnp.ones(3),
    }
    tx = batch_norm_preconditioning()
    state = tx.init(grads)
    assert set(state.running) == {"measured", "other"}
    inputs = {
        "measured": {"kernel": statistics(3)},
        "absent": {"kernel": statistics(7)},
    }
    updates, after = tx.update(grads, state, inputs=inputs)
    dkernel, _ = reference(np.ones((3, 2)), None, *statistics(3))
    assert_close(updates.pop("measured")["kernel"], dkernel)
    del grads["measured"]
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    other = "other", "kernel"
    for a, e in zip(
        *(s.running[other[0]][other[1]] for s in (after, state)), strict=True
    ):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("images", [1, 8])
def test_constant_inputs_and_no_gradient_stay_finite(images, has_bias):
    model = nn.Dense(4, use_bias=has_bias)
    params = initial(model, jnp.zeros((images, 5)))["params"]
    tx = batch_norm_preconditioning()
    state = tx.init(params)

    @jax.jit
    def step(state, fill, weight):
        def loss(params):
            x = jnp.full((images, 5), fill)
            y, inputs = apply_with_inputs(model, {"params": params}, x)
            return weight * jnp.sin(y).sum(), inputs

        grads, inputs = jax.grad(loss, has_aux=True)(params)
        return tx.update(grads, state, inputs=inputs)

    for fill, weight in [(0.0, 1.0), (7.0, 0.0), (7.0, 1.0)]:
        updates, state = step(state, fill, weight)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        assert any(leaf.any() for leaf in jax.tree.leaves(updates)) == bool(
            weight and (fill or has_bias)
        )


def test_momentum_masks_and_checkpoints():
    params = grads_tree((3,))
    params["head"] = params["layer"]
    mask = {"layer": True, "head": False}
    inputs = {name: {"kernel": statistics()} for name in mask}
    tx = optax.chain(
        optax.masked(batch_norm_preconditioning(), mask), optax.sgd(1.0, momentum=0.5)
    )

    @jax.jit
    def step(state):
        return tx.update(params, state, params, inputs=inputs)

    first, state = step(tx.init(params))
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    second, after = step(restored)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(first["head"][name], -params["head"][name])
        assert_close(second["layer"][name], 1.5 * first["layer"][name], num=100)
    dkernel, dbias = reference(*gradients((3,)), *statistics())
    assert_close(first["layer"]["kernel"], -dkernel, num=100)
    assert_close(first["layer"]["bias"], -dbias, num=100)


def test_an_optimizer_inside_sees_the_normalized_gradients():
    """Adam's first step is the sign of what it sees; only then comes P."""
    grads, inputs = grads_tree((3,)), statistics()
    tx = batch_norm_preconditioning(inner=optax.adam(0.1, 0.5, 0.5, eps=0))
    updates, state = tx.update(grads, tx.init(grads), grads, inputs=tree(inputs))
    kernel, bias = (np.asarray(a, np.float64) for a in gradients((3,)))
    stacked = np.concatenate([bias[None], kernel.reshape(-1, 4)])
    p = matrix(*inputs[:2], (3,))
    expected = p @ (-0.1 * np.sign(p.T @ stacked))
    assert_close(updates["layer"]["bias"], expected[0], num=100)
    assert_close(updates["layer"]["kernel"], expected[1:].reshape(3, 5, 4), num=100)
    assert state.inner[0].count == 1


def test_a_frozen_bias_counts_as_none():
    tx = optax.masked(
        batch_norm_preconditioning(), {"layer": {"kernel": True, "bias": False}}
    )
    grads = grads_tree()
    updates, _ = tx.update(grads, tx.init(grads), inputs=tree(statistics()))
    dkernel, _ = reference(grads["layer"]["kernel"], None, *statistics())
    assert_close(updates["layer"]["kernel"], dkernel, num=20)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"Expected decay in \[0, 1\), got decay="):
        batch_norm_preconditioning(decay)


def test_statistics_of_another_width_are_refused():
    def update(kernel):
        grads = {"layer": {"kernel": kernel}}
        tx = batch_norm_preconditioning()
        return tx.update(grads, tx.init(grads), inputs=tree(statistics(3)))

    given = "mean.shape=(3,)"
    fix = "Measure the input of this very layer"
    message = message_while_tracing((5, 4), update, ValueError, given, fix)
    assert "shape (5,) for layer/kernel" in message
    function = functools.partial(
        precondition_gradients, bias=None, inputs=statistics(3)
    )
    for shape in [(5, 4), (3,)]:
        message_while_tracing(shape, function, ValueError, given, fix)


@pytest.mark.parametrize("inputs", [{}, {"params": tree(statistics())}], ids=str)
def test_statistics_of_another_tree_are_refused(inputs):
    tx = batch_norm_preconditioning()
    state = tx.init(grads_tree())
    with pytest.raises(ValueError, match=r"for kernels \['layer/kernel'\]"):
        tx.update(grads_tree(), state, inputs=inputs)


class LinenNet(nn.Module):
    """Convolutions, one without a bias and called twice; a norm; a dense layer."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, use_running_average=False):
        x = nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average, name="norm")(x)
        point = nn.Conv(4, (1, 1), use_bias=False, name="point")
        x = nn.relu(point(point(x)))
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        return dense(3, name="dense")(x.mean((1, 2)))


class NNXNet(nnx.Module):
    """The same."""

    def __init__(self, rngs, transform=lambda function: function):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.point = nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.unused = nnx.Linear(4, 3, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        x = self.norm(self.conv(x))
        x = nnx.relu(self.point(self.point(x)))
        call = self.transform(lambda layer, x: layer(x))
        return call(self.dense, x.mean((1, 2)))


IMAGES = cases.inputs((8, 6, 6, 2))


@functools.cache
def linen_net(remat=False):
    model = LinenNet(remat)
    return model, initial(model, IMAGES)


def nnx_net(variables, **options):
    model = NNXNet(nnx.Rngs(0), **options)
    for name, params in variables["params"].items():
        for leaf, value in params.items():
            getattr(getattr(model, name), leaf)[...] = value
    return model


@functools.cache
def flax_net():
    """Returns what flax computes: outputs, running statistics, and layers' inputs."""
    model, variables = linen_net()
    apply = functools.partial(
        model.apply,
        mutable=["intermediates", "batch_stats"],
        capture_intermediates=True,
    )
    y, updates = jax.jit(apply)(variables, IMAGES)
    outputs = updates["intermediates"]
    (norm,), points = (outputs[name]["__call__"] for name in ("norm", "point"))
    expected = {
        "conv": moments(IMAGES),
        "point": moments(jnp.stack([norm, points[0]])),
        "dense": moments(nn.relu(points[1]).mean((1, 2))),
    }
    return y, updates["batch_stats"], expected


def assert_all_close(actual, expected):
    """Compares what flax_net returns."""
    y, updates, inputs = actual
    assert_close(y, np.asarray(expected[0]), num=100)
    for name in ("mean", "var"):
        a, e = (tree["norm"][name] for tree in (updates, expected[1]))
        assert_close(a, np.asarray(e), num=300)
    assert set(inputs) == set(expected[2])
    for name in inputs:
        for a, e in zip(inputs[name]["kernel"], expected[2][name], strict=True):
            assert_close(a, e, num=300)


@pytest.mark.parametrize("remat", [False, True])
def test_linen_measures_the_inputs_and_changes_nothing(remat):
    model, variables = linen_net(remat)
    apply = functools.partial(apply_with_inputs, model, mutable=["batch_stats"])
    (y, updates), inputs = jax.jit(apply)(variables, IMAGES)
    assert_all_close((y, updates["batch_stats"], inputs), flax_net())


@pytest.mark.parametrize("mutable", [False, True, [], "batch_stats", nn.DenyList("a")])
def test_linen_returns_what_apply_does(mutable):
    model, variables = linen_net()
    evaluate = mutable in (False, [])
    options = {"mutable": mutable, "use_running_average": evaluate}
    call = variables, IMAGES
    result, inputs = jax.eval_shape(
        functools.partial(apply_with_inputs, model, **options), *call
    )
    assert result == jax.eval_shape(functools.partial(model.apply, **options), *call)
    assert set(inputs) == {"conv", "point", "dense"}


def test_linen_passes_rngs_methods_and_keywords():
    class Net(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)
            self.dropout = nn.Dropout(0.5)

        def encode(self, x, *, deterministic):
            return self.dropout(self.dense(inputs=x), deterministic=deterministic)

    x = cases.inputs((8, 4))
    options = {"method": "encode", "deterministic": False, "rngs": {"dropout": KEY}}
    variables = Net().init(
        {"params": KEY, "dropout": KEY}, x, method="encode", deterministic=True
    )
    y, inputs = apply_with_inputs(Net(), variables, x, **options)
    np.testing.assert_array_equal(y, Net().apply(variables, x, **options))
    assert inputs["dense"]["kernel"].num == 8
    nothing = apply_with_inputs(nn.Dropout(0.5, deterministic=True), {}, x)
    assert nothing[1] == {}


@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat, nnx.jit])
def test_nnx_measures_the_same_and_leaves_the_model_as_it_was(transform):
    net = nnx_net(linen_net()[1], transform=transform)
    before = nnx.graphdef(net)
    y, inputs = nnx.jit(call_with_inputs)(net, IMAGES)
    assert nnx.graphdef(net) == before
    running = {"norm": {"mean": net.norm.mean[...], "var": net.norm.var[...]}}
    assert_all_close((y, running, inputs), flax_net())


def test_nnx_leaves_the_model_as_it_was_also_after_an_error():
    net = nnx_net(linen_net()[1])
    before = nnx.graphdef(net)
    with pytest.raises(ValueError, match="feature dimension"):
        call_with_inputs(net, jnp.ones((8, 6, 6, 3)))
    assert nnx.graphdef(net) == before
    with pytest.raises(Exception, match="Cannot mutate"):
        jax.jit(lambda x: call_with_inputs(net, x))(IMAGES)
    assert nnx.graphdef(net) == before
    assert type(net.dense) is nnx.Linear


@pytest.mark.parametrize("padding", ["SAME", "CAUSAL"])
def test_padding_is_not_measured(padding):
    x = cases.inputs((4, 9, 3))
    linen = nn.Conv(2, (3,), padding=padding)
    module = nnx.Conv(3, 2, (3,), padding=padding, rngs=nnx.Rngs(0))
    inputs = jax.jit(lambda x: apply_with_inputs(linen, linen.init(KEY, x), x)[1])(x)
    found = nnx.jit(lambda module, x: call_with_inputs(module, x)[1])(module, x)
    for measured in (inputs["kernel"], found["kernel"]):
        for a, e in zip(measured, moments(x), strict=True):
            assert_close(a, e, num=x.size)


def linen_left_out():
    class Dense(nn.Dense):
        pass

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    dense = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **axes)
    grouped = nn.Conv(6, (1,), feature_group_count=3)
    for model in (Dense(2), dense(2), grouped, nn.DenseGeneral((2, 2))):
        yield lambda x, m=model: apply_with_inputs(m, m.init(KEY, x), x)


def nnx_left_out():
    class Linear(nnx.Linear):
        pass

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))
            self.layers = make(jax.random.split(rngs()))

        def __call__(self, x):
            call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
            return call(self.layers, x)

    for make in (
        functools.partial(Linear, 3, 2),
        functools.partial(nnx.Conv, 3, 6, (1,), feature_group_count=3),
        functools.partial(nnx.LinearGeneral, 3, (2, 2)),
        Stacked,
    ):
        yield lambda x, m=make: call_with_inputs(m(rngs=nnx.Rngs(0)), x)


@pytest.mark.parametrize("call", [*linen_left_out(), *nnx_left_out()])
def test_layers_of_which_nothing_is_known_are_left_out(call):
    x = jax.ShapeDtypeStruct((2, 4, 3), "float32")
    assert jax.eval_shape(call, x)[1] == {}


def test_statistics_carry_no_gradient():
    x = cases.inputs((8, 3))
    model = nn.Dense(2)
    variables = initial(model, x)

    def total(x):
        _, inputs = apply_with_inputs(model, variables, x)
        return sum(leaf.sum() for leaf in jax.tree.leaves(inputs))

    assert not jax.grad(total)(x).any()


def mlp(x):
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    return model, initial(model, x)


TRAINED = {
    "conv": optax.chain(batch_norm_preconditioning(0.9), optax.sgd(0.05, momentum=0.9)),
    "mlp": batch_norm_preconditioning(0.9, inner=optax.adam(0.05)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_linen_and_nnx_train_alike(name):
    labels = (IMAGES.mean((1, 2))[:, 0] > 1).astype(int)
    tx = TRAINED[name]
    if name == "conv":
        x = IMAGES
        model, variables = linen_net()
        module = nnx_net(variables)
        del module.unused
    else:
        x = 20 + IMAGES.mean((1, 2))
        model, variables = mlp(x)
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(2, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs)]
        for i in (0, 2):
            params = variables["params"][f"layers_{i}"]
            layers[i].kernel[...], layers[i].bias[...] = (
                params["kernel"],
                params["bias"],
            )
        module = nnx.Sequential(*layers)

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def linen_step(variables, state):
        def loss(params):
            (y, updates), inputs = apply_with_inputs(
                model, {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return cross_entropy(y), (updates, inputs)

        params = variables["params"]
        (value, (updates, inputs)), grads = jax.value_and_grad(loss, has_aux=True)(
            params
        )
        change, state = tx.update(grads, state, params, inputs=inputs)
        return value, {"params": optax.apply_updates(params, change), **updates}, state

    @nnx.jit
    def nnx_step(module, optimizer):
        def loss(module):
            y, inputs = call_with_inputs(module, x)
            return cross_entropy(y), inputs

        (value, inputs), grads = nnx.value_and_grad(loss, has_aux=True)(module)
        optimizer.update(module, grads, inputs=inputs)
        return value

    state = tx.init(variables["params"])
    nnx_optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    losses = []
    for step in range(40):
        value, variables, state = linen_step(variables, state)
        other = nnx_step(module, nnx_optimizer)
        if step < 3:
            assert_close(other, np.asarray(value), num=1000)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
