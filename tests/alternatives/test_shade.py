"""SHADE: against the reference, with its means held, over steps, and in layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_sbn.alternatives.entropy import shade, shade_init, shade_update
from flax_sbn.linen.shade import Shade
from flax_sbn.nnx.loss import Loss
from flax_sbn.nnx.shade import Shade as NnxShade
from tests import cases
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(6)
VALUE_AND_GRADIENT = jax.jit(jax.value_and_grad(shade))
# Shape, feature axis.
LAYOUTS = [((16, 3), -1), ((8, 3, 4, 2), 1), ((4, 3, 5, 2), (1, 3))]


def features_last(x, axis):
    """Returns ``(values, features)`` in float64."""
    x = np.asarray(x, np.float64)
    axes = [a % x.ndim for a in np.atleast_1d(axis)]
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(-1, np.prod(x.shape[-len(axes) :]))


def probability(x, z):
    return 1 / (1 + np.exp(-x if z else x))


def reference(x, means):
    """Loss and its gradient by ``x``, of features last, means held."""
    loss, gradient = 0.0, np.zeros_like(x)
    slope = probability(x, 0) * probability(x, 1)
    for z, sign in enumerate((-1, 1)):
        difference = x - means[z]
        loss += (probability(x, z) * difference**2).sum() / len(x)
        gradient += sign * slope * difference**2
        gradient += 2 * probability(x, z) * difference
    return loss, gradient / len(x)


def reference_update(x, means, momentum):
    measured = [
        (probability(x, z) * x).sum(0) / probability(x, z).sum(0) for z in (0, 1)
    ]
    return momentum * means + (1 - momentum) * np.stack(measured)


def given(shape, axis, dtype="float32"):
    """Activations around zero, and means."""
    features = [shape[a] for a in np.atleast_1d(axis)]
    means = shade_init(features) + cases.inputs((2, *features), seed=1) / 4
    return cases.inputs(shape, dtype) - 1, means


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_loss_gradient_and_means_are_those_of_the_reference(shape, axis, dtype, x64):
    x, means = given(shape, axis, dtype)
    wide = jnp.promote_types(dtype, "float32")
    flat, flat_means = features_last(x, axis), np.asarray(means, float).reshape(2, -1)

    @jax.jit
    def compiled(x, means):
        loss = functools.partial(shade, axis=axis)
        return (
            jax.value_and_grad(loss, (0, 1))(x, means),
            shade_update(means, x, momentum=0.7, axis=axis),
        )

    (loss, (dx, d_means)), updated = compiled(x, means)
    assert (loss.shape, loss.dtype) == ((), wide)
    expected, gradient = reference(flat, flat_means)
    assert_close(loss, expected, str(wide), num=x.size)
    assert_close(features_last(dx, axis), gradient, dtype, num=x.size)
    assert not d_means.any()
    assert (updated.shape, updated.dtype) == (means.shape, means.dtype)
    expected = reference_update(flat, flat_means, 0.7)
    assert_close(updated.reshape(2, -1), expected, num=x.size)


def test_the_update_carries_no_gradient():
    x, means = given((16, 3), -1)
    slopes = jax.jit(jax.grad(lambda *args: shade_update(*args).sum(), (0, 1)))(
        means, x
    )
    assert not any(slope.any() for slope in slopes)


def test_the_loss_does_not_grow_with_rows_or_positions():
    x, means = given((4, 3), -1)
    compiled = jax.jit(shade)
    loss = compiled(x, means)
    maps = jnp.tile(x[:, None, None], (3, 5, 2, 1))
    assert_close(compiled(maps, means), np.asarray(loss), num=maps.size)
    apart = [compiled(x[:, [c]], means[:, [c]]) for c in range(3)]
    assert_close(loss, np.sum(apart), num=x.size)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e4), ("float32", 1e18), ("float16", 65504.0)]
)
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
def test_huge_activations_stay_finite(dtype, size, signs):
    x = jnp.asarray(np.array(signs)[:, None] * size, dtype)
    means = shade_init((1,))
    loss, gradient = VALUE_AND_GRADIENT(x.astype("float32"), means)
    assert np.isfinite(loss)
    assert np.isfinite(jax.jit(shade)(x, means))
    expected = np.asarray(x, "float64") - np.array(signs)[:, None]
    assert_close(gradient / size, expected / size)
    assert np.isfinite(jax.jit(shade_update)(means, x)).all()


def test_what_is_masked_counts_for_nothing():
    x, means = given((8, 4, 3), -1)
    mask = (jnp.arange(8) < 5)[:, None, None] & jnp.array([[[True, True, False]]])
    hidden = jnp.where(mask, x, jnp.nan)
    kept = slice(None), slice(2)
    loss, gradient = VALUE_AND_GRADIENT(hidden, means, mask=mask)
    expected, slope = VALUE_AND_GRADIENT(x[:5, :, :2], means[kept])
    assert_close(loss, np.asarray(expected), num=x.size)
    assert_close(gradient[:5, :, :2], np.asarray(slope), num=x.size)
    assert not gradient[5:].any()
    assert not gradient[..., 2].any()
    update = jax.jit(shade_update)
    updated = update(means, hidden, mask=mask)
    expected = update(means[kept], x[:5, :, :2])
    assert_close(updated[kept], np.asarray(expected), num=x.size)
    np.testing.assert_array_equal(updated[:, 2], means[:, 2])


def apply(api, layer, variables, x, **options):
    """Returns output, losses and state after a call."""
    if api == "linen":
        y, updates = layer.apply(
            variables, x, mutable=["batch_stats", "losses"], **options
        )
        losses = jax.tree.leaves(updates.pop("losses", ()))
        return y, losses, updates
    y, losses = nnx.capture(layer, Loss)(x, **options)
    state = {"means": layer.means[...]}
    return y, jax.tree.leaves(losses), {"batch_stats": state}


def layer_of(api, x, **options):
    if api == "linen":
        layer = Shade(**options)
        return layer, layer.init(KEY, x)
    return NnxShade(3, **options), {"batch_stats": {"means": shade_init((3,))}}


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_sow_before_they_update(api):
    x, _ = given((8, 3, 5), 1)
    layer, state = layer_of(api, x, weight=0.1, axis=1, use_running_average=False)
    assert state.keys() == {"batch_stats"}
    means = state["batch_stats"]["means"]
    np.testing.assert_array_equal(means, shade_init((3,)))
    means = np.asarray(means, np.float64)
    for step in range(3):
        shifted = x + step
        y, losses, state = apply(api, layer, state, shifted)
        assert y is shifted
        flat = features_last(shifted, 1)
        expected, _ = reference(flat, means)
        assert len(losses) == 1
        assert_close(losses[0], 0.1 * expected, num=x.size)
        means = reference_update(flat, means, 0.8)
        assert_close(state["batch_stats"]["means"], means, num=x.size)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_evaluation_sows_and_updates_nothing(api):
    x, _ = given((8, 3), -1)
    layer, state = layer_of(api, x, weight=0.1, use_running_average=True)
    y, losses, state = apply(api, layer, state, x)
    assert y is x
    assert not losses
    np.testing.assert_array_equal(state["batch_stats"]["means"], shade_init((3,)))


def test_nnx_switches_between_training_and_evaluation():
    x, _ = given((8, 3), -1)
    layer, state = layer_of("nnx", x, weight=0.1)
    layer.eval()
    assert not apply("nnx", layer, state, x)[1]
    layer.train()
    assert apply("nnx", layer, state, x)[1]
    assert not apply("nnx", layer, state, x, use_running_average=True)[1]


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_mask(api):
    x, _ = given((8, 3), -1)
    layer, state = layer_of(api, x, weight=2.0, use_running_average=False)
    mask = (jnp.arange(8) < 5)[:, None]
    hidden = jnp.where(mask, x, jnp.nan)
    _, losses, state = apply(api, layer, state, hidden, mask=mask)
    means = shade_init((3,))
    assert_close(losses[0], 2 * np.asarray(shade(x[:5], means)), num=x.size)
    expected = np.asarray(shade_update(means, x[:5]))
    assert_close(state["batch_stats"]["means"], expected, num=x.size)


MEANS = shade_init((3,))
ERRORS = {
    "means": (lambda x: shade(x, MEANS[0]), "means of shape (3,)", "axis"),
    "update": (
        lambda x: shade_update(MEANS[:, :2], x),
        "means of shape (2, 2)",
        "axis",
    ),
    "axis": (lambda x: shade(x, MEANS, axis=3), "axis=3", "Features last"),
    "mask": (
        lambda x: shade_update(MEANS, x, mask=jnp.ones(5, bool)),
        "mask of shape (5,)",
        "size 1",
    ),
    "nnx": (lambda x: NnxShade(4, 0.1)(x), "means of shape (2, 4)", "axis"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, *message = ERRORS[name]
    message_while_tracing((8, 3), call, ValueError, *message)
