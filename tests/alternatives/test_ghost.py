"""Ghost batch norm: groups of examples are normalized as batches of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import flax_sbn as sbn
from tests import cases, reference
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(4)
LAYERS = ["BatchNorm", "BatchRenorm"]


@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_each_group_is_a_batch_of_its_own(axis):
    x = np.asarray(cases.inputs((12, 4, 5, 3)))
    y, statistics = sbn.alternatives.ghost_batch_norm(
        np.moveaxis(x, -1, axis), num_groups=3, axis=axis
    )
    groups = [reference.moments(g, np.ones(g.shape, bool)) for g in np.split(x, 3)]
    expected = [
        reference.normalize(group, *moments, np.ones(3), np.zeros(3))
        for group, moments in zip(np.split(x, 3), groups, strict=True)
    ]
    assert_close(np.moveaxis(y, axis, -1), np.concatenate(expected), num=80)
    assert_close(statistics.mean, np.mean([m for m, _ in groups], 0), num=80)
    assert_close(statistics.var, np.mean([v for _, v in groups], 0), num=80)


def test_gradients_stay_within_the_group(x64):
    x = cases.inputs((8, 3), "float64")

    @jax.jit
    def norm(x):
        return sbn.alternatives.ghost_batch_norm(x, num_groups=2)[0]

    check_grads(norm, (x,), 2)
    jacobian = np.asarray(jax.jacobian(norm)(x))
    assert (jacobian[:4, :, 4:] == 0).all()
    assert (jacobian[:4, :, :4] != 0).any()


def test_one_group_is_batch_norm():
    x = cases.inputs((8, 3))
    sampler = sbn.BatchSampling(2)
    ours, theirs = (
        norm(x, sampler=sampler, key=KEY, **groups)
        for norm, groups in (
            (sbn.alternatives.ghost_batch_norm, {"num_groups": 1}),
            (sbn.batch_norm, {}),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_groups_have_masks_and_draws_of_their_own():
    x = cases.inputs((64, 3)).at[0].set(jnp.nan)
    mask = jnp.arange(64)[:, None] > 0
    y, _ = sbn.alternatives.ghost_batch_norm(x, num_groups=2, mask=mask)
    expected, _ = sbn.batch_norm(x[1:32])
    assert_close(y[1:32], np.asarray(expected), num=32)

    # Groups of equal examples, told apart by what is drawn in them.
    twice = jnp.concatenate([x[32:], x[32:]])
    options = {"sampler": sbn.BatchSampling(2), "key": KEY}
    y, _ = sbn.alternatives.ghost_batch_norm(twice, num_groups=2, **options)
    assert not np.allclose(y[:32], y[32:])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_in_groups_and_evaluate_without(name):
    options = {"ghost_groups": 2, "momentum": 0.5}
    linen = getattr(sbn.linen, name)(use_running_average=False, **options)
    module = getattr(sbn.nnx, name)(3, **options, rngs=nnx.Rngs(0))
    x = cases.inputs((8, 4, 4, 3))
    variables = linen.init(jax.random.key(0), x[:1])
    y, updates = linen.apply(variables, x, mutable=["batch_stats"])
    _, measured = sbn.alternatives.ghost_batch_norm(x, num_groups=2)
    assert_close(module(x), np.asarray(y), num=64)
    mean = updates["batch_stats"]["mean"]
    assert_close(mean, 0.5 * np.asarray(measured.mean), num=64)
    assert_close(module.mean[...], np.asarray(mean), num=64)
    if name == "BatchNorm":
        for half in (slice(4), slice(4, 8)):
            assert_close(y[half], np.asarray(sbn.batch_norm(x[half])[0]), num=64)

    module.eval()
    alone = linen.clone(use_running_average=True).apply({**variables, **updates}, x[:3])
    assert_close(module(x[:3]), np.asarray(alone), num=64)


def test_a_folded_layer_with_groups_is_the_layers_one_by_one():
    options = {"sampler": sbn.BatchSampling(2), "rngs": nnx.Rngs(0)}

    def norm(*args, **options):
        return sbn.nnx.BatchNorm(*args, ghost_groups=2, **options)

    layer = sbn.nnx.ConvNorm(3, 4, (3, 3), norm_cls=norm, **options)
    x = cases.inputs((8, 4, 4, 3))
    y = nnx.clone(layer)(x)
    assert_close(y, np.asarray(layer.norm(layer.conv(x))), num=64)


@pytest.mark.parametrize("num_groups", [0, 3, 16])
def test_groups_that_do_not_divide_the_batch_are_refused(num_groups):
    message_while_tracing(
        (8, 3),
        lambda x: sbn.alternatives.ghost_batch_norm(x, num_groups=num_groups),
        ValueError,
        f"{num_groups=} and batch size 8",
        "Change either",
    )
