"""The linen layer under nn.scan, nn.remat and nn.vmap."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.linen import BatchNorm
from tests import cases

KEY = jax.random.key(3)
X = cases.inputs(cases.SHAPES[4])


def train(module, variables, *args):
    return module.apply(
        variables, *args, mutable=["batch_stats"], rngs={"sampling": KEY}
    )


class Block(nn.Module):
    """The body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        norm = BatchNorm(
            use_running_average=False,
            sampler=sbn.BatchSampling(2),
            momentum=0.0,
            name="norm",
        )
        return norm(x) + X, None


def test_scan_over_layers_draws_another_place_in_each():
    model = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "sampling": True},
        length=8,
    )()
    variables = model.init(KEY, X, None)
    _, updated = jax.jit(lambda v: train(model, v, 0 * X, None))(variables)
    # The first layer sees zeros, the others about the same input.
    mean = updated["batch_stats"]["norm"]["mean"]
    assert mean.shape == (8, 3)
    assert len(np.unique(mean[:, 0].round(3))) > 3


def test_scan_over_steps_carries_the_statistics():
    model = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False, "sampling": True},
        length=3,
    )()
    variables = Block().init(KEY, X, None)
    _, updated = jax.jit(lambda v: train(model, v, X, None))(variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        updated["batch_stats"], variables["batch_stats"]
    )
    assert (updated["batch_stats"]["norm"]["mean"] != 0).all()


@pytest.mark.parametrize("name", ["BS", "FS", "lattice"])
def test_remat_draws_the_same_place_again(name):
    def gradient(cls):
        layer = cls(
            use_running_average=False, sampler=cases.SAMPLERS[name], name="norm"
        )
        variables = layer.init(KEY, X)

        def loss(x):
            y, updated = train(layer, variables, x)
            return (y**3).sum(), updated

        return jax.jit(jax.grad(loss, has_aux=True))(X)

    plain, remat = gradient(BatchNorm), gradient(nn.remat(BatchNorm))
    chex.assert_trees_all_close(plain, remat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_vmap_draws_one_place_or_one_for_each(split):
    model = nn.vmap(
        BatchNorm,
        variable_axes={"params": None, "batch_stats": 0},
        split_rngs={"params": False, "sampling": split},
    )(use_running_average=False, sampler=sbn.BatchSampling(2), momentum=0.0)
    x = jnp.stack([X] * 8)
    _, updated = train(model, model.init(KEY, x), x)
    assert (len(np.unique(updated["batch_stats"]["mean"][:, 0])) > 1) == split


@pytest.mark.parametrize("lift", ["vmap", "scan"])
def test_a_stream_that_is_not_split_is_named_with_the_fix(lift):
    if lift == "vmap":
        model = nn.vmap(
            BatchNorm,
            variable_axes={"params": None, "batch_stats": 0},
            split_rngs={"params": False},
        )(use_running_average=False, sampler=sbn.BatchSampling(2))
        args = (jnp.stack([X] * 2),)
    else:
        model = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )()
        args = (X, None)
    variables = model.init(KEY, *args)
    message = r"Expected an rng stream 'sampling'.*split_rngs=\{'sampling': True\}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: train(model, v, *args), variables)
