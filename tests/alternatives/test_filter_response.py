"""Filter response normalization and its activation: reference, limits, layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.test_util import check_grads

from flax_sbn.alternatives.filter_response import filter_response_norm, tlu
from flax_sbn.linen import filter_response as linen_layers
from flax_sbn.nnx import filter_response as nnx_layers
from tests import cases
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(0)
SHAPE = (4, 5, 3, 2)
REAL = [dtype for dtype in cases.DTYPES if not dtype.startswith("complex")]


def reference(x, scale=1.0, bias=0.0, epsilon=1e-6):
    """y = scale * x / sqrt(mean over space of x^2 + |epsilon|) + bias, in float64."""
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    space = tuple(range(1, x.ndim - 1))
    square = (x**2).mean(space, keepdims=True)
    return scale * x / np.sqrt(square + np.abs(epsilon)) + bias


def reference_gradients(x, g, scale, epsilon):
    """Gradients of sum(g * y) by x, scale, bias and epsilon, in float64."""
    x, g, scale = (np.asarray(a, np.float64) for a in (x, g, scale))
    space = tuple(range(1, x.ndim - 1))
    s = np.sqrt((x**2).mean(space, keepdims=True) + np.abs(epsilon))
    share = (g * x).mean(space, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return (
        scale * (g - x / s * share / s) / s,
        (g * x / s).sum(rows),
        g.sum(rows),
        (-0.5 * np.sign(epsilon) * scale * g * x / s**3).sum(rows),
    )


def arguments(shape, dtype="float32"):
    """Input, cotangent, scale, bias and an epsilon of either sign."""
    x, g = (cases.inputs(shape, dtype, seed=i) for i in range(2))
    scale, bias, epsilon = cases.inputs((3, shape[-1]), dtype, seed=2)
    return x, g, scale, bias, epsilon


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [*((rank, "float32") for rank in (2, 3, 5)), *((4, dtype) for dtype in REAL)],
)
def test_value_and_gradients_are_those_of_the_equations(rank, dtype, x64):
    x, g, scale, bias, epsilon = arguments(cases.SHAPES[rank], dtype)

    @jax.jit
    def norm(x, scale, bias, epsilon):
        return filter_response_norm(x, scale, bias, epsilon=epsilon)

    y, pullback = jax.vjp(norm, x, scale, bias, epsilon)
    assert y.dtype == dtype
    wide = np.asarray(epsilon, np.float64)
    assert_close(y, reference(x, scale, bias, wide), dtype)
    expected = reference_gradients(x, g, scale, wide)
    for actual, gradient in zip(pullback(g), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, gradient, dtype, num=x.size)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2, 2)])
def test_gradients_are_finite_differences_to_second_order(shape, x64):
    x, _, scale, bias, epsilon = arguments(shape, "float64")

    @jax.jit
    def loss(x, scale, bias, epsilon):
        y = filter_response_norm(x, scale, bias, epsilon=epsilon)
        return jnp.sin(tlu(y, -epsilon)).sum()

    check_grads(loss, (x, scale, bias, epsilon), 2, "rev")


@pytest.mark.parametrize("axis", [1, -2, (1, -1), (0, 2)])
def test_features_may_be_at_any_axis(axis):
    x = cases.inputs((4, 3, 5, 2))
    axes = [a % 4 for a in (axis if isinstance(axis, tuple) else (axis,))]
    others = [a for a in range(4) if a not in axes]
    features = tuple(x.shape[a] for a in axes)
    scale, bias, epsilon = cases.inputs((3, *features), seed=1)

    y = filter_response_norm(x, scale, bias, axis=axis, epsilon=epsilon)
    threshold = cases.inputs(features, seed=2)
    z = tlu(x, threshold, axis=axis)

    order = [*others, *axes]
    last = x.transpose(order).reshape(*(x.shape[a] for a in others), -1)
    flat = [np.asarray(a, np.float64).ravel() for a in (scale, bias, epsilon)]
    for actual, expected in [
        (y, reference(last, *flat)),
        (z, np.maximum(last, threshold.ravel())),
    ]:
        assert_close(actual.transpose(order).reshape(last.shape), expected)


def test_no_row_sees_another():
    x = cases.inputs(SHAPE)
    g = cases.inputs(SHAPE, seed=1)

    @jax.jit
    def both(x, g):
        y, pullback = jax.vjp(filter_response_norm, x)
        return y, *pullback(g)

    whole = both(x, g)
    others = both(x.at[1:].set(jnp.nan), g)
    chex.assert_trees_all_equal(*([a[:1] for a in each] for each in (whole, others)))
    alone = both(x[:1], g[:1])
    chex.assert_trees_all_equal(list(alone), [a[:1] for a in whole])


def test_every_map_has_a_mean_square_of_one_and_keeps_its_direction():
    x = cases.inputs(SHAPE)
    y = filter_response_norm(x, epsilon=0.0)
    assert_close((y**2).mean((1, 2)), np.ones((4, 2)), num=15)
    assert_close(filter_response_norm(1000 * x, epsilon=0.0), np.asarray(y))
    assert_close(filter_response_norm(-x, epsilon=0.0), -np.asarray(y))


def test_a_constant_epsilon_is_the_same_for_all_features():
    x = cases.inputs(SHAPE)
    expected = filter_response_norm(x, epsilon=jnp.full(2, 0.5))
    chex.assert_trees_all_equal(filter_response_norm(x, epsilon=0.5), expected)
    chex.assert_trees_all_equal(filter_response_norm(x, epsilon=-0.5), expected)


@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 2), (4, 1, 1, 2)])
def test_single_values_keep_their_sign_and_with_a_larger_epsilon_more(shape):
    x = cases.inputs(shape)
    sign = filter_response_norm(x, epsilon=1e-12)
    assert_close(sign, np.sign(x))
    y = filter_response_norm(x, epsilon=4.0)
    assert_close(y, np.asarray(x, np.float64) / np.sqrt(np.float64(x) ** 2 + 4))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("shape", [SHAPE, (1, 2)])
def test_zeros_become_the_bias_with_finite_gradients(shape, dtype, x64):
    scale, bias = cases.inputs((2, 2), dtype)

    def loss(x, scale, bias, epsilon):
        y = filter_response_norm(x, scale, bias, epsilon=epsilon)
        return tlu(y, jnp.zeros(2, dtype)).sum(), y

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    for epsilon in 1e-6, 0.0, -1e-4:
        given = jnp.zeros(shape, dtype), scale, bias, jnp.full(2, epsilon, dtype)
        gradients, y = grad(*given)
        chex.assert_trees_all_equal(y, jnp.broadcast_to(bias, shape))
        chex.assert_tree_all_finite(gradients)
        if epsilon == 0:
            assert (gradients[0] == 0).all()


def test_values_and_gradients_are_finite_near_zero_without_an_epsilon():
    g, zero = cases.inputs(SHAPE, seed=1), jnp.zeros(2)

    @jax.jit
    def both(x):
        y, pullback = jax.vjp(lambda x, e: filter_response_norm(x, epsilon=e), x, zero)
        return y, pullback(g)

    for size in np.logspace(-30, 0, 31):
        x = jnp.float32(size) * cases.inputs(SHAPE).at[0].set(0)
        y, gradients = both(x)
        chex.assert_tree_all_finite((y, gradients))
        square = np.square(x, dtype=np.float64).mean((1, 2), keepdims=True)
        expected = reference(x, epsilon=np.where(square < 1e-24, np.inf, 0))
        assert_close(y, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_squares_are_taken_in_float32(dtype, size):
    # In float16 they would overflow, or vanish.
    x = (size * cases.inputs((4, 16, 16, 2))).astype(dtype)
    assert_close(filter_response_norm(x, epsilon=1e-12), reference(x, epsilon=0), dtype)


def test_results_have_the_promoted_or_the_given_dtype():
    x, scale = cases.inputs(SHAPE, "bfloat16"), jnp.ones(2)
    assert filter_response_norm(x).dtype == "bfloat16"
    assert filter_response_norm(x, epsilon=scale).dtype == "bfloat16"
    assert filter_response_norm(x, scale).dtype == "float32"
    assert filter_response_norm(x, scale, dtype="float16").dtype == "float16"
    assert filter_response_norm(jnp.ones(SHAPE, int)).dtype == "float32"
    assert tlu(x, scale).dtype == "float32"
    assert tlu(x, scale, dtype="bfloat16").dtype == "bfloat16"


def test_the_threshold_gets_the_gradient_of_what_it_cuts_off():
    x, threshold = jnp.array([[-2.0, 1.0], [3.0, 0.5]]), jnp.array([-1.0, 2.0])
    y, pullback = jax.vjp(tlu, x, threshold)
    assert y.tolist() == [[-1.0, 2.0], [3.0, 2.0]]
    dx, dthreshold = pullback(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    assert dx.tolist() == [[0.0, 0.0], [3.0, 0.0]]
    assert dthreshold.tolist() == [1.0, 6.0]
    chex.assert_trees_all_equal(tlu(x, jnp.zeros(2)), jax.nn.relu(x))


OPTIONS = {
    "default": {},
    "learned": {"learn_epsilon": True},
    "learned-from": {"learn_epsilon": True, "epsilon_init": 0.5},
    "epsilon": {"epsilon": 0.3},
    "first": {"axis": 1},
    "plain": {"use_scale": False, "use_bias": False},
    "half": {"dtype": jnp.bfloat16, "param_dtype": jnp.float16},
    "inits": {
        "scale_init": jax.nn.initializers.normal(),
        "bias_init": jax.nn.initializers.constant(2.0),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_are_the_function_with_their_parameters(name):
    options = OPTIONS[name]
    x = cases.inputs((4, 3, 5, 3))
    layer = linen_layers.FilterResponseNorm(**options)
    variables = layer.init(KEY, jnp.zeros((1, *x.shape[1:])))
    twin = nnx_layers.FilterResponseNorm(3, **options, rngs=nnx.Rngs(0))

    assert set(variables) <= {"params"}
    params = variables.get("params", {})
    expected = set() if name == "plain" else {"scale", "bias"}
    expected |= {"epsilon"} if "learn_epsilon" in options else set()
    pure = nnx.to_pure_dict(nnx.state(twin))
    assert set(params) == set(pure) == expected
    for value in jax.tree.leaves((params, pure)):
        assert value.shape == (3,)
        assert value.dtype == options.get("param_dtype", jnp.float32)
    if "epsilon" in expected:
        start = jnp.full(3, options.get("epsilon_init", 1e-4))
        chex.assert_trees_all_equal(params["epsilon"], pure["epsilon"], start)

    # The same numbers in both, other than those they start from.
    params = {key: value + i + 1 for i, (key, value) in enumerate(params.items())}
    nnx.update(twin, params)
    rest = {"epsilon": options.get("epsilon", 1e-6), **params}
    y = filter_response_norm(
        x, **rest, axis=options.get("axis", -1), dtype=options.get("dtype")
    )
    applied = layer.apply({"params": params} if params else {}, x)
    chex.assert_trees_all_equal(applied, twin(x), y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1},
        {"threshold_init": jax.nn.initializers.constant(0.5)},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.float16},
    ],
    ids=["defaults", "axis", "init", "dtypes"],
)
def test_the_layers_of_the_activation_are_the_function_with_its_threshold(options):
    x = cases.inputs((4, 3, 5, 3))
    layer = linen_layers.TLU(**options)
    variables = layer.init(KEY, jnp.zeros((1, *x.shape[1:])))
    threshold = variables["params"].pop("threshold")
    assert not variables["params"]
    twin = nnx_layers.TLU(3, **options, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(twin.threshold[...], threshold)
    assert threshold.dtype == options.get("param_dtype", jnp.float32)
    y = tlu(x, threshold, axis=options.get("axis", -1), dtype=options.get("dtype"))
    applied = layer.apply({"params": {"threshold": threshold}}, x)
    chex.assert_trees_all_equal(applied, twin(x), y)


def test_evaluation_is_training():
    twin = nnx_layers.FilterResponseNorm(2, learn_epsilon=True, rngs=nnx.Rngs(0))
    x = cases.inputs(SHAPE)
    y = twin(x)
    twin.eval()
    chex.assert_trees_all_equal(twin(x), y)
    assert not nnx.state(twin, nnx.BatchStat)


class Network(nn.Module):
    """Maps, then single values."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = linen_layers.TLU()(linen_layers.FilterResponseNorm()(x))
        x = nn.Dense(4)(x.mean((1, 2)))
        x = linen_layers.FilterResponseNorm(learn_epsilon=True)(x)
        return nn.Dense(1)(linen_layers.TLU()(x))


def test_a_network_learns_from_one_row():
    x = cases.inputs((1, 4, 4, 2))

    @jax.jit
    def step(params):
        loss, gradient = jax.value_and_grad(
            lambda params: ((Network().apply(params, x) - 3) ** 2).sum()
        )(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), loss

    params = jax.jit(Network().init)(KEY, jnp.zeros_like(x))
    losses = []
    for _ in range(100):
        params, loss = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.01 * losses[0]


def layer_of(cls, num_features, **options):
    return lambda x: cls(num_features, rngs=nnx.Rngs(0), **options)(x)


ERRORS = {
    "scale": (
        lambda x: filter_response_norm(x, jnp.ones(3)),
        "scale of shape (3,)",
        "feature axis?",
    ),
    "bias": (
        lambda x: filter_response_norm(x, bias=jnp.ones(1)),
        "bias of shape (1,)",
        "feature axis?",
    ),
    "epsilon": (
        lambda x: filter_response_norm(x, epsilon=jnp.ones(5)),
        "epsilon of shape (5,)",
        "feature axis?",
    ),
    "axis": (lambda x: filter_response_norm(x, axis=4), "axis=4", "axis=-1"),
    "threshold": (
        lambda x: tlu(x, jnp.zeros(())),
        "threshold of shape ()",
        "feature axis?",
    ),
    "tlu-axis": (lambda x: tlu(x, jnp.zeros(2), axis=-5), "axis=-5", "axis=-1"),
    "linen-axis": (
        lambda x: linen_layers.FilterResponseNorm(axis=4).init(KEY, x),
        "axis=4",
        "axis=-1",
    ),
    "linen-tlu": (
        lambda x: linen_layers.TLU(axis=4).init(KEY, x),
        "axis=4",
        "axis=-1",
    ),
    "nnx-features": (
        layer_of(nnx_layers.FilterResponseNorm, 3),
        "scale of shape (3,)",
        "feature axis?",
    ),
    "nnx-tlu": (layer_of(nnx_layers.TLU, 3), "threshold of shape (3,)", "axis?"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_given_and_how_to_mend_it(name):
    call, given, fix = ERRORS[name]
    message = message_while_tracing(SHAPE, call, ValueError, given, fix)
    assert message.startswith("Expected")
