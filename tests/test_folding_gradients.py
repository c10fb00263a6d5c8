"""Second-order gradients of the folded form, and the ReLU that stays fused."""

import copy
import functools
import pickle

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import flax_sbn as sbn
from tests import cases, unfolded
from tests.closeness import assert_same_to_rounding
from tests.samples import KEY

CONVOLUTION = functools.partial(
    sbn.conv_norm, strides=2, padding=((2, -1),), kernel_dilation=2
)
DILATED = functools.partial(
    sbn.conv_norm, padding=((0, 3),), input_dilation=3, feature_group_count=2
)
LAYERS = {
    "BS": (CONVOLUTION, (8, 9, 2), (2, 2, 2)),
    "FS": (CONVOLUTION, (8, 9, 2), (2, 2, 2)),
    "FS+VDN": (DILATED, (8, 4, 2), (2, 1, 2)),
    "BS+VDN": (sbn.dense_norm, (8, 3), (3, 2)),
    "lattice": (DILATED, (8, 4, 2), (2, 1, 2)),
    "lattice+VDN": (CONVOLUTION, (8, 13, 2), (2, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_agree_with_finite_differences_to_second_order(name, x64):
    fold, *shapes = LAYERS[name]
    x, kernel = (cases.inputs(s, "float64", seed=i) for i, s in enumerate(shapes))
    scale, bias = cases.inputs((2, 2), "float64", seed=2)
    shape = jax.eval_shape(fold, x, kernel)[0].shape
    residual = cases.inputs(shape, "float64", seed=3)
    # Every other one with a mask.
    mask = np.arange(residual.size).reshape(shape) % 5 > 0
    mask = mask if list(LAYERS).index(name) % 2 else None

    @jax.jit
    def function(x, kernel, scale, bias, residual):
        return fold(
            x,
            kernel,
            scale,
            bias,
            residual=residual,
            sampler=cases.SAMPLERS[name],
            key=KEY,
            mask=mask,
            activation=jnp.tanh,
        )

    arguments = (x, kernel, scale, bias, residual)
    check_grads(function, arguments, order=2, modes=["fwd", "rev"])


def of_sines(product):
    """A product that is not linear in its first argument."""
    return lambda x, *args, **kwargs: product(jnp.sin(x), *args, **kwargs)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_given_products_need_not_be_linear_in_the_input(kind, x64):
    x = cases.inputs((8, 13, 2), "float64")
    kernel = cases.inputs((3, 2, 2)[kind == "dense" :], "float64", seed=1)
    options = {
        "conv": {"conv_general_dilated": of_sines(jax.lax.conv_general_dilated)},
        "dense": {"dot_general": of_sines(jax.lax.dot_general)},
    }[kind]
    fold = {"conv": sbn.conv_norm, "dense": sbn.dense_norm}[kind]

    @jax.jit
    def function(x, kernel):
        return fold(x, kernel, sampler=cases.SAMPLERS["lattice"], **options)

    same = {"conv": unfolded.conv_norm, "dense": unfolded.dense_norm}[kind]
    expected = same(jnp.sin(x), kernel, sampler=cases.SAMPLERS["lattice"])
    assert_same_to_rounding(function(x, kernel), expected)
    check_grads(function, (x, kernel), order=1, modes=["fwd", "rev"])


def towards_their_mean(statistics, running):
    """A correction that mixes features."""
    var = 0.5 * statistics.var + 0.5 * statistics.var.mean()
    return sbn.Statistics(statistics.mean, var)


def pooled_over_features(x, axes, where, one_pass):
    """A measure that mixes features."""
    count, mean, var = sbn.moments.mean_and_var(x, axes, where, one_pass)
    return count, mean, jnp.broadcast_to(var.mean(), var.shape)


@pytest.mark.parametrize("function", [towards_their_mean, pooled_over_features])
@pytest.mark.parametrize("partial", [False, True])
def test_corrections_and_measures_may_mix_features(function, partial, x64):
    name = {towards_their_mean: "correct", pooled_over_features: "measure"}[function]
    given = functools.partial(function) if partial else function
    x, kernel = cases.inputs((8, 13, 2), "float64"), cases.inputs((3, 2, 4), "float64")
    scale, bias = cases.inputs((2, 4), "float64", seed=2)
    options = {"sampler": cases.SAMPLERS["lattice"], name: given}

    def values_and_gradients(fold):
        arguments = {"x": x, "kernel": kernel, "scale": scale, "bias": bias}
        cotangents = cases.inputs((8, 13, 4), "float64"), sbn.Statistics(scale, bias)
        call = functools.partial(fold, **options)
        return unfolded.value_and_gradients(call, arguments, cotangents)

    def separately(x, kernel, scale, bias, **options):
        return sbn.batch_norm(unfolded.conv(x, kernel), scale, bias, **options)

    assert_same_to_rounding(
        values_and_gradients(sbn.conv_norm), values_and_gradients(separately)
    )


def test_an_epsilon_that_is_traced_has_a_gradient(x64):
    x, kernel = cases.inputs((8, 13, 2), "float64"), cases.inputs((3, 2, 4), "float64")

    @jax.jit
    def function(kernel, epsilon):
        sampler = cases.SAMPLERS["lattice"]
        return sbn.conv_norm(x, kernel, sampler=sampler, epsilon=epsilon)[0]

    check_grads(function, (kernel, jnp.array(0.1)), order=1, modes=["fwd", "rev"])
    expected = sbn.conv_norm(x, kernel, sampler=cases.SAMPLERS["lattice"], epsilon=0.1)
    assert_same_to_rounding(function(kernel, 0.1), expected[0])


@pytest.mark.parametrize("name", ["lattice", "BS", "all"])
def test_scale_and_bias_may_be_whole_numbers(name, x64):
    x, kernel = cases.inputs((8, 13, 2), "float64"), cases.inputs((3, 2, 4), "float64")
    options = {"sampler": {"all": None, **cases.SAMPLERS}[name], "key": KEY}

    def gradients(dtype):
        scale, bias = jnp.arange(4).astype(dtype), jnp.ones(4, dtype)

        def loss(x, kernel):
            y, _ = sbn.conv_norm(x, kernel, scale, bias, **options)
            return jnp.sin(y).sum()

        return jax.grad(loss, (0, 1))(x, kernel)

    assert_same_to_rounding(gradients("int32"), gradients("float64"))


@pytest.mark.parametrize("name", ["lattice", "BS"])
def test_where_a_variance_overflows_gradients_are_finite(name):
    x, kernel = 1e18 * cases.inputs((8, 13, 2)), cases.inputs((3, 2, 4))

    def loss(x, kernel):
        y, statistics = sbn.conv_norm(x, kernel, sampler=cases.SAMPLERS[name], key=KEY)
        return jnp.sin(y).sum(), statistics

    grads, statistics = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
    assert jnp.isinf(statistics.var).all()
    chex.assert_tree_all_finite(grads)


ODD = [-np.inf, -1.5, -0.0, 0.0, 1e-40, 2.5, np.inf, np.nan]


def derivatives(function, x):
    """Value, both modes' first derivative, and the second one."""
    slope = jax.grad(lambda x: function(x) ** 2)
    return {
        "value": jax.vmap(function)(x),
        "reverse": jax.vmap(jax.grad(function))(x),
        "forward": jax.jvp(function, (x,), (jnp.full_like(x, 3),)),
        "second": jax.vmap(jax.grad(slope))(x),
        "forward over reverse": jax.vmap(jax.jacfwd(slope))(x),
    }


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_relu_is_jax_relu_in_every_derivative(dtype, transform):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(ODD, dtype)
        actual, expected = (
            transform(functools.partial(derivatives, relu))(x)
            for relu in (sbn.relu, jax.nn.relu)
        )
        chex.assert_trees_all_equal(actual, expected, strict=True)


def test_relu_drops_cotangents_that_are_not_finite_where_it_is_off():
    _, pullback = jax.vjp(sbn.relu, jnp.array([-1.0, 0.0, 1.0]))
    (actual,) = pullback(jnp.full(3, jnp.inf))
    chex.assert_trees_all_equal(actual, jnp.array([0.0, 0.0, jnp.inf]))


def test_relu_takes_integers_as_jax_relu_does():
    x = jnp.arange(-2, 3)
    chex.assert_trees_all_equal(sbn.relu(x), jax.nn.relu(x), strict=True)


def program(activation):
    """The gradient of a folded layer."""

    def loss(x, kernel):
        y, _ = sbn.conv_norm(
            x, kernel, sampler=sbn.NaiveSampling(4), activation=activation
        )
        return (y**2).sum()

    return jax.make_jaxpr(jax.grad(loss, (0, 1)))


@functools.wraps(jax.nn.relu)
def named_relu(x):
    return -x


@pytest.mark.parametrize(
    ("activation", "stays"),
    [
        (jax.nn.relu, True),
        (copy.deepcopy(jax.nn.relu), True),
        (cloudpickle.loads(cloudpickle.dumps(jax.nn.relu)), True),
        (sbn.relu, True),
        (copy.deepcopy(sbn.relu), True),
        (pickle.loads(pickle.dumps(sbn.relu)), True),
        (named_relu, False),
        (jnp.tanh, False),
        (None, False),
    ],
    ids=[
        *["jax.nn.relu", "copied jax.nn.relu", "pickled jax.nn.relu"],
        *["sbn.relu", "copied sbn.relu", "pickled sbn.relu"],
        *["other of the name", "tanh", "none"],
    ],
)
def test_relu_is_replaced_by_the_one_that_stays_fused(activation, stays):
    x, kernel = cases.inputs((8, 6, 3)), cases.inputs((3, 3, 4), seed=1)
    assert ("optimization_barrier" in str(program(activation)(x, kernel))) == stays


def test_any_activation_is_applied_to_the_sum():
    x, kernel = cases.inputs((8, 6, 3)), cases.inputs((3, 3, 4), seed=1)
    residual = cases.inputs((8, 6, 4), seed=2)
    options = {"sampler": sbn.NaiveSampling(4), "residual": residual}
    plain, _ = sbn.conv_norm(x, kernel, **options)
    y, _ = sbn.conv_norm(x, kernel, **options, activation=lambda y: jnp.sin(3 * y))
    chex.assert_trees_all_equal(y, jnp.sin(3 * plain))
