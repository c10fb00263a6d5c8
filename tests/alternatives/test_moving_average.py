"""Moving-average batch norm: against the equations, over steps in both directions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from flax_sbn.alternatives.moving_average import (
    MovingAverages,
    center_kernel,
    moving_average_batch_norm,
    moving_averages,
)
from flax_sbn.linen import moving_average as linen
from flax_sbn.nnx import moving_average as nnx_layers
from tests import cases
from tests.closeness import assert_close
from tests.devices import mesh
from tests.samples import KEY
from tests.teaching import message_while_tracing

EPSILON = 1e-5


class Reference:
    """The equations in float64, features last: one call is one training step."""

    def __init__(self, features, window, warmup, renorm_warmup, r_max, momentum):
        self.window, self.momentum, self.r_max = window, momentum, r_max
        self.warmup, self.renorm_warmup = max(window, warmup), renorm_warmup
        self.step, self.squares, self.products, self.corrections = 0, [], [], []
        self.var = np.ones(features)

    def __call__(self, x, scale, bias, cotangent):
        """Returns y, and the gradients of x, scale and bias."""
        x, ct = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
        over = tuple(range(x.ndim - 1))
        averaged = self.step >= self.warmup
        self.squares = [*self.squares, (x**2).mean(over)][-self.window :]
        chi = np.mean(self.squares, 0) if averaged else self.squares[-1]
        z = x / np.sqrt(chi + EPSILON)
        r = np.ones_like(chi)
        if self.step >= self.renorm_warmup:
            r = np.sqrt((chi + EPSILON) / (self.var + EPSILON))
            r = np.clip(r, 1 / self.r_max, self.r_max)
        self.corrections.append(r)
        self.var = self.momentum * self.var + (1 - self.momentum) * chi
        self.step += 1

        g = scale * r * ct
        self.products = [*self.products, (g * z).mean(over)][-self.window :]
        psi = np.mean(self.products, 0) if averaged else self.products[-1]
        dx = (g - z * psi) / np.sqrt(chi + EPSILON)
        return scale * r * z + bias, dx, (ct * r * z).sum(over), ct.sum(over)

    def buffer(self, values):
        """Returns what fills a window, zeros before the first."""
        features = self.var.shape
        return np.array([np.zeros(features)] * (self.window - len(values)) + values)


def data(shape, step, dtype="float64"):
    """Returns x and a cotangent; the scale of x changes from step to step."""
    x = cases.inputs(shape, dtype, seed=2 * step) * 1.5 ** (step % 5)
    return x, cases.inputs(shape, dtype, seed=2 * step + 1)


def wide(running):
    """Returns averages in float64."""
    step, chi, var = running
    return MovingAverages(step, chi.astype("float64"), var.astype("float64"))


OPTIONS = {"warmup": 4, "renorm_warmup": 6, "r_max": 1.1, "momentum": 0.7}


@pytest.mark.parametrize(
    ("shape", "window"), [((6, 3), 2), ((2, 5, 3), 3), ((2, 4, 3, 2), 6)]
)
def test_value_gradients_and_state_are_the_references_over_many_steps(
    shape, window, x64
):
    scale, bias = cases.inputs((2, shape[-1]), "float64", seed=99)
    reference = Reference(shape[-1], window, **OPTIONS)
    running = wide(moving_averages(shape[-1:], window))
    psi = jnp.zeros_like(running.chi)

    @jax.jit
    def step(x, scale, bias, psi, running, cotangent):
        def norm(x, scale, bias, psi):
            return moving_average_batch_norm(
                x, scale, bias, psi=psi, running=running, **OPTIONS
            )

        y, pullback, running = jax.vjp(norm, x, scale, bias, psi, has_aux=True)
        return y, running, pullback(cotangent)

    for i in range(10):
        x, cotangent = data(shape, i)
        expected = reference(x, np.asarray(scale), np.asarray(bias), cotangent)
        y, running, (*gradients, psi) = step(x, scale, bias, psi, running, cotangent)
        for actual, e in zip((y, *gradients), expected, strict=True):
            assert_close(actual, e, "float64", num=x.size)
        assert_close(psi, reference.buffer(reference.products), "float64", num=x.size)
        assert_close(
            running.chi, reference.buffer(reference.squares), "float64", num=x.size
        )
        assert_close(running.var, reference.var, "float64", num=x.size)
        assert int(running.step) == i + 1
    r = np.array(reference.corrections)
    assert (r == 1.1).any()
    assert ((r > 1 / 1.1) & (r < 1)).any()


def test_before_the_window_is_full_it_is_batch_norm_of_centered_inputs(x64):
    x, cotangent = data((4, 6, 3), 0)
    x = x - x.mean((0, 1), keepdims=True)
    # So that BN's own centering does nothing.
    cotangent -= cotangent.mean((0, 1), keepdims=True)
    running = wide(moving_averages((3,)))

    def norm(x):
        psi = jnp.zeros_like(running.chi)
        return moving_average_batch_norm(x, psi=psi, running=running)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(norm):
        y, pullback = jax.vjp(norm, x)
        return y, *pullback(cotangent)

    found = value_and_gradient(norm)
    expected = value_and_gradient(lambda x: sbn.batch_norm(x)[0])
    for actual, e in zip(found, expected, strict=True):
        assert_close(actual, np.asarray(e), "float64", num=x.size)


def test_axis_moves_the_features(x64):
    x, cotangent = data((4, 3, 5), 0)
    running = wide(moving_averages((3,), 2))._replace(step=jnp.array(7, jnp.int32))
    psi = cases.inputs((2, 3), "float64", seed=5)

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_gradients(x, cotangent, axis):
        def norm(x, psi):
            return moving_average_batch_norm(
                x, psi=psi, running=running, axis=axis, **OPTIONS
            )[0]

        y, pullback = jax.vjp(norm, x, psi)
        return y, *pullback(cotangent)

    *found, dpsi = value_and_gradients(x, cotangent, 1)
    moved = (jnp.moveaxis(a, 1, -1) for a in (x, cotangent))
    *expected, expected_dpsi = value_and_gradients(*moved, -1)
    for actual, e in zip(found, expected, strict=True):
        assert_close(actual, np.moveaxis(np.asarray(e), -1, 1), "float64", num=20)
    assert_close(dpsi, np.asarray(expected_dpsi), "float64", num=20)


@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
@pytest.mark.parametrize("step", [0, 7])
def test_devices_that_pool_are_one(mapped, step):
    x, cotangent = data((8, 6, 3), 0, "float32")
    running = moving_averages((3,), 2)._replace(step=jnp.array(step, jnp.int32))
    psi = cases.inputs((2, 3), seed=5)

    def gradients(x, cotangent, psi, running, axis_name=None):
        def norm(x, psi):
            return moving_average_batch_norm(
                x, psi=psi, running=running, axis_name=axis_name, **OPTIONS
            )

        y, pullback, running = jax.vjp(norm, x, psi, has_aux=True)
        return y, *pullback(cotangent), running

    y, dx, dpsi, updated = jax.jit(gradients)(x, cotangent, psi, running)
    pooled = functools.partial(gradients, axis_name="data")
    if mapped == "vmap":
        groups = [a.reshape(4, 2, 6, 3) for a in (x, cotangent)]
        pooled = jax.vmap(pooled, (0, 0, None, None), 0, axis_name="data")
        found = jax.jit(pooled)(*groups, psi, running)
        rows, same = found[:2], jax.tree.map(lambda a: a[0], found[2:])
    else:
        specs = (P("data"), P("data"), P(), P())
        pooled = jax.jit(
            jax.shard_map(pooled, mesh=mesh(), in_specs=specs, out_specs=specs)
        )
        found = pooled(x, cotangent, psi, running)
        rows, same = found[:2], found[2:]
    for actual, expected in zip(rows, (y, dx), strict=True):
        assert_close(actual.reshape(8, 6, 3), np.asarray(expected), num=x.size)
    for actual, expected in zip(
        jax.tree.leaves(same), jax.tree.leaves((dpsi, updated)), strict=True
    ):
        assert_close(actual, np.asarray(expected), num=x.size)


@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
def test_micro_batches_side_by_side_average_to_the_next_psi(mapped, x64):
    x, cotangent = data((8, 4, 2), 0)
    running = wide(moving_averages((2,), 4))
    psi = cases.inputs((4, 2), "float64", seed=5)

    def loss(psi, x, cotangent):
        y, _ = moving_average_batch_norm(x, psi=psi, running=running)
        return (cotangent * y).sum()

    def of_all(psi):
        losses = jax.vmap(loss, (None, 0, 0))
        if mapped == "shard_map":
            specs = (P(), P("data"), P("data"))
            losses = jax.shard_map(
                losses, mesh=mesh(), in_specs=specs, out_specs=P("data")
            )
        return losses(psi, x, cotangent).sum()

    gradient = jax.jit(jax.grad(loss))
    each = [gradient(psi, *pair) for pair in zip(x, cotangent, strict=True)]
    assert_close(jax.jit(jax.grad(of_all))(psi) / 8, np.mean(each, 0), "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("step", [0, 5000])
def test_zeros_and_large_values_stay_finite(dtype, step):
    running = moving_averages((3,), 2)._replace(step=jnp.array(step, jnp.int32))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(x, psi, running):
        y, running = moving_average_batch_norm(x, psi=psi, running=running)
        return y.astype("float32").sum(), (y, running)

    for x in (jnp.zeros((1, 4, 3)), jnp.full((1, 4, 3), 3e4)):
        for var in (0.0, 1.0):
            given = running._replace(var=jnp.full(3, var))
            psi = jnp.zeros_like(running.chi)
            (dx, dpsi), (y, updated) = gradients(x.astype(dtype), psi, given)
            assert y.dtype == dx.dtype == dtype
            assert dpsi.dtype == updated.chi.dtype == "float32"
            for leaf in jax.tree.leaves((dx, dpsi, y, updated)):
                assert np.isfinite(np.asarray(leaf, "float32")).all()


def test_half_precision_is_averaged_in_single():
    x, cotangent = data((4, 6, 3), 0, "bfloat16")
    running = moving_averages((3,), 1)

    @jax.jit
    def gradients(x, cotangent):
        def norm(x, psi):
            return moving_average_batch_norm(
                x, psi=psi, running=running, dtype="float32"
            )

        psi = jnp.zeros((1, 3))
        _, pullback, running_ = jax.vjp(norm, x, psi, has_aux=True)
        return pullback(cotangent)[1], running_.chi

    cotangent = cotangent.astype("float32")
    found = gradients(x, cotangent)
    for actual, expected in zip(
        found, gradients(x.astype("float32"), cotangent), strict=True
    ):
        assert_close(actual, np.asarray(expected), num=x.size)


def test_linen_trains_with_flaxs_train_state_and_nnx_alike():
    shape = (2, 4, 3)
    layer = linen.MovingAverageBatchNorm(
        window=2, scale_init=nn.initializers.constant(1.5),
        **OPTIONS,
    )  # fmt: skip
    variables = layer.init(KEY, jnp.zeros((1, *shape[1:])), False)
    stats = variables.pop("batch_stats")
    state = TrainState.create(
        apply_fn=layer.apply, params=variables, tx=optax.sgd(1e-2)
    )
    module = nnx_layers.MovingAverageBatchNorm(
        3,
        window=2,
        scale_init=nnx.initializers.constant(1.5),
        rngs=nnx.Rngs(0),
        **OPTIONS,
    )
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)
    wrt = nnx.Any(nnx.Param, nnx_layers.OverwriteWithGradient)
    reference = Reference(3, 2, **OPTIONS)
    scale, bias = np.full(3, 1.5), np.zeros(3)

    def loss(params, stats, x, cotangent):
        variables = {**params, "batch_stats": stats}
        y, updates = state.apply_fn(variables, x, False, mutable=["batch_stats"])
        return (y * cotangent).sum(), (y, updates["batch_stats"])

    @jax.jit
    def train(state, stats, x, cotangent):
        grads, aux = jax.grad(loss, has_aux=True)(state.params, stats, x, cotangent)
        return state.apply_gradients(grads=grads), *aux

    def nnx_loss(module, x, cotangent):
        y = module(x)
        return (y * cotangent).sum(), y

    @nnx.jit
    def nnx_train(module, optimizer, x, cotangent):
        grad = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, wrt), has_aux=True)
        grads, y = grad(module, x, cotangent)
        optimizer.update(module, grads)
        nnx.update(module, nnx.state(grads, nnx_layers.OverwriteWithGradient))
        return y

    for i in range(8):
        x, cotangent = data(shape, i, "float32")
        y, _, dscale, dbias = reference(x, scale, bias, cotangent)
        scale, bias = scale - 1e-2 * dscale, bias - 1e-2 * dbias
        state, linen_y, stats = train(state, stats, x, cotangent)
        for found in (linen_y, nnx_train(module, optimizer, x, cotangent)):
            assert_close(found, y, num=x.size)

    psi = reference.buffer(reference.products)
    params = state.params
    for found in (params[OVERWRITE_WITH_GRADIENT]["psi"], module.psi[...]):
        assert_close(found, psi, num=24)
    for found in (params["params"]["scale"], module.scale[...]):
        assert_close(found, scale, num=24)
    chi = reference.buffer(reference.squares)
    for found in (stats, {"chi": module.chi, "var": module.var, "step": module.step}):
        assert int(found["step"][...]) == 8
        assert_close(found["var"][...], reference.var, num=24)
        assert_close(found["chi"][...], chi, num=24)

    x, _ = data(shape, 20, "float32")
    expected = scale * np.asarray(x) / np.sqrt(reference.var + EPSILON) + bias
    variables = {"params": params["params"], "batch_stats": stats}
    assert_close(layer.apply(variables, x, True), expected, num=24)
    module.eval()
    assert_close(module(x), expected, num=24)
    assert int(module.step[...]) == 8


def test_parameters_are_optional_and_dtypes_are_flaxs():
    x = cases.inputs((2, 4, 3), "bfloat16")
    layer = linen.MovingAverageBatchNorm(
        use_running_average=True, use_scale=False, use_bias=False, window=3
    )
    y, variables = layer.init_with_output(KEY, x)
    assert y.dtype == "bfloat16"
    assert jax.tree.map(jnp.shape, variables) == {
        "batch_stats": {"chi": (3, 3), "step": (), "var": (3,)},
        OVERWRITE_WITH_GRADIENT: {"psi": (3, 3)},
    }
    module = nnx_layers.MovingAverageBatchNorm(
        3, use_scale=False, use_bias=False, window=3, rngs=nnx.Rngs(0)
    )
    assert not nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert module(x).dtype == "bfloat16"


def test_a_limit_of_one_leaves_outputs_as_they_are():
    x, running = cases.inputs((8, 3), "float32"), moving_averages((3,))
    running = running._replace(step=jnp.array(1000), var=jnp.full(3, 9.0))
    (limited, _), (early, _) = (
        moving_average_batch_norm(x, psi=jnp.zeros((16, 3)), running=running, **options)
        for options in ({"r_max": 1.0}, {"renorm_warmup": 2000})
    )
    np.testing.assert_array_equal(limited, early)


def test_evaluation_needs_no_psi():
    layer = sbn.nnx.MovingAverageBatchNorm(4, rngs=nnx.Rngs(0))
    x = cases.inputs((8, 4))
    expected = layer(x, use_running_average=True)
    nnx.pop(layer, sbn.nnx.OverwriteWithGradient)
    np.testing.assert_array_equal(layer(x, use_running_average=True), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_kernels_are_centered_in_both_layers(masked):
    x, g = cases.inputs((2, 5, 5, 4)), cases.inputs((2, 5, 5, 6), seed=1)
    mask = jnp.tril(jnp.ones((3, 3)))[:, :, None, None] * jnp.ones((3, 3, 2, 6))
    options = {"feature_group_count": 2, "mask": mask if masked else None}
    where = np.asarray(mask, bool) if masked else np.ones(mask.shape, bool)

    def centered(kernel):
        kernel = np.asarray(kernel, np.float64)
        return np.where(where, kernel - kernel.mean((0, 1, 2), where=where), 0)

    def conv(kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    layer = linen.CenteredConv(6, (3, 3), **options)
    variables = layer.init(KEY, x)
    kernel = variables["params"]["kernel"]
    weights = centered(kernel)
    assert_close(center_kernel(kernel, mask=options["mask"]), weights, num=18)
    expected = conv(jnp.asarray(weights, "float32"))
    (of_weights,) = jax.linear_transpose(conv, kernel)(g)
    module = nnx_layers.CenteredConv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
    module.kernel[...] = kernel
    for y in (layer.apply(variables, x), module(x)):
        assert_close(y, np.asarray(expected), num=36)

    of_kernel = centered(of_weights)  # centering is its own transpose
    gradient = nnx.grad(lambda module: (g * module(x)).sum())(module)
    assert_close(gradient["kernel"][...], of_kernel, num=50)
    assert_close(module.kernel[...], np.asarray(kernel))


def test_kernels_in_half_precision_and_without_weights_stay_finite():
    kernel = cases.inputs((3, 4), "bfloat16")
    assert center_kernel(kernel).dtype == "bfloat16"
    nothing = center_kernel(kernel, mask=jnp.zeros((3, 4)))
    assert (nothing == 0).all()


@pytest.mark.parametrize(
    ("call", "given", "fix"),
    [
        (lambda x: center_kernel(x[:1]), "(1, 3)", "Use a plain layer"),
        (lambda x: center_kernel(x, mask=x[0]), "(3,)", "that of the kernel"),
        (lambda x: moving_averages((3,), 0), "window=0", "averages nothing"),
        (
            lambda x: moving_average_batch_norm(
                x, psi=jnp.zeros((16, 3)), running=moving_averages((4,))
            ),
            "(16, 4)",
            "Is `axis` the feature axis?",
        ),
        (
            lambda x: moving_average_batch_norm(
                x, psi=jnp.zeros((8, 3)), running=moving_averages((3,))
            ),
            "(8, 3)",
            "Is `axis` the feature axis?",
        ),
        (
            lambda x: moving_average_batch_norm(
                x, psi=jnp.zeros((16, 3)), running=moving_averages((3,)), r_max=0.5
            ),
            "r_max=0.5",
            "One leaves",
        ),
        (
            lambda x: linen.MovingAverageBatchNorm(use_running_average=False).apply(
                {
                    "params": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
                    "batch_stats": moving_averages((3,))._asdict(),
                },
                x,
                mutable=["batch_stats"],
            ),
            "['batch_stats', 'params']",
            "psi replaced by its gradient",
        ),
    ],
)
def test_errors_teach(call, given, fix):
    message_while_tracing((5, 3), call, ValueError, given, fix)
