"""Extra losses of layers, on their way to the training step, in linen and in nnx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from flax_sbn.alternatives.batchless import batchless_init, batchless_nll
from flax_sbn.alternatives.entropy import shade, shade_init
from flax_sbn.linen.batchless import BatchlessNorm
from flax_sbn.linen.shade import Shade
from flax_sbn.nnx.batchless import BatchlessNorm as NnxBatchlessNorm
from flax_sbn.nnx.batchless import initialize_batchless
from flax_sbn.nnx.loss import Loss
from flax_sbn.nnx.shade import Shade as NnxShade
from tests import cases
from tests.closeness import assert_close

X = cases.inputs((16, 3))
MUTABLE = ["batch_stats", "losses"]
TX = optax.adam(0.03)
NUM_STEPS = 20


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for features in (5, 4):
            x = nn.Dense(features)(x)
            x = BatchlessNorm(use_running_average=not train)(x)
            x = nn.relu(Shade(0.1, use_running_average=not train)(x))
        return x


init = jax.jit(Network().init)


class Block(nnx.Module):
    def __init__(self, before, after, rngs):
        self.linear = nnx.Linear(before, after, rngs=rngs)
        self.norm = NnxBatchlessNorm(after, rngs=rngs)
        self.shade = NnxShade(after, 0.1)

    def __call__(self, x):
        return nnx.relu(self.shade(self.norm(self.linear(x))))


@nnx.jit
def nnx_network():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(Block(3, 5, rngs), Block(5, 4, rngs))
    initialize_batchless(model, X)
    # As linen's init: nothing has been trained on.
    for layer in model.layers:
        layer.shade.means[...] = shade_init(layer.shade.means.shape[1:])
    return model


def task(y):
    return jnp.square(y - 1).mean()


def nnx_loss(model, x):
    y, losses = nnx.capture(model, Loss)(x)
    return task(y) + sum(jax.tree.leaves(losses))


@jax.jit
def linen_step(state, x):
    params, batch_stats, opt = state

    def loss_fn(params):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = Network().apply(variables, x, mutable=MUTABLE)
        loss = task(y) + sum(jax.tree.leaves(updates["losses"]))
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt = TX.update(grads, opt)
    return loss, (optax.apply_updates(params, updates), batch_stats, opt)


@functools.cache
def train_linen():
    variables = init(jax.random.key(0), X)
    assert variables.keys() == {"params", "batch_stats"}
    params, batch_stats = variables["params"], variables["batch_stats"]
    state, losses = (params, batch_stats, TX.init(params)), []
    structure = jax.tree.structure(state)
    for _ in range(NUM_STEPS):
        loss, state = linen_step(state, 1 + X)
        assert jax.tree.structure(state) == structure
        losses.append(loss)
    return losses


@functools.cache
def train_nnx():
    model, losses = nnx_network(), []
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    structure = nnx.graphdef(model)
    num_traces = 0

    @nnx.jit
    def step(model, optimizer, x):
        nonlocal num_traces
        num_traces += 1
        loss, grads = nnx.value_and_grad(nnx_loss)(model, x)
        optimizer.update(model, grads)
        return loss

    for _ in range(NUM_STEPS):
        losses.append(step(model, optimizer, 1 + X))
        assert nnx.graphdef(model) == structure
    assert num_traces == 1
    return losses


@functools.cache
def train_nnx_split():
    graphdef, params, rest = nnx.split(nnx_network(), nnx.Param, ...)
    opt, losses = TX.init(params), []

    @jax.jit
    def step(params, rest, opt, x):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss = nnx_loss(model, x)
            assert nnx.graphdef(model) == graphdef
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = TX.update(grads, opt)
        return loss, optax.apply_updates(params, updates), rest, opt

    structure = jax.tree.structure(rest)
    for _ in range(NUM_STEPS):
        loss, params, rest, opt = step(params, rest, opt, 1 + X)
        assert jax.tree.structure(rest) == structure
        losses.append(loss)
    return losses


@pytest.mark.parametrize("train", [train_linen, train_nnx, train_nnx_split])
def test_training_reduces_the_sum_of_all_losses(train):
    losses = train()
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.5


def test_nnx_trains_alike_with_and_without_its_transforms():
    for a, e in zip(train_nnx(), train_nnx_split(), strict=True):
        assert_close(a, np.asarray(e), num=X.size, c=16)


@jax.jit
def expected_losses(hidden):
    """The losses of a first layer that has started from ``hidden``."""
    mean, log_scale = batchless_init(hidden)
    nll = batchless_nll(hidden, mean, log_scale)
    std = jnp.sqrt(jnp.exp(2 * log_scale) + 1e-5)
    normal = (hidden - mean[None]) / std[None]
    return nll, 0.1 * shade(normal, shade_init(hidden.shape[1:]))


def test_linen_collects_each_loss_once():
    variables = init(jax.random.key(0), X)
    _, updates = Network().apply(variables, X, mutable=MUTABLE)
    losses = updates["losses"]
    assert len(jax.tree.leaves(losses)) == 4
    nll, entropy = expected_losses(X @ variables["params"]["Dense_0"]["kernel"])
    assert_close(losses["BatchlessNorm_0"]["nll"][0], np.asarray(nll), num=X.size)
    assert_close(losses["Shade_0"]["shade"][0], np.asarray(entropy), num=X.size)
    _, updates = Network().apply(variables, X, train=False, mutable=MUTABLE)
    assert "losses" not in updates


def test_nnx_collects_each_loss_once():
    model = nnx_network()
    _, losses = nnx.capture(model, Loss)(X)
    assert len(jax.tree.leaves(losses)) == 4
    first = losses["layers"][0]
    nll, entropy = expected_losses(X @ model.layers[0].linear.kernel[...])
    found = [*jax.tree.leaves(first["norm"]), *jax.tree.leaves(first["shade"])]
    assert_close(found, np.stack([nll, entropy]), num=X.size)
    model.eval()
    _, losses = nnx.capture(model, Loss)(X)
    assert not jax.tree.leaves(losses)


def test_nothing_is_sown_where_nobody_collects():
    model = nnx_network()
    structure = nnx.graphdef(model)
    model(X)
    nnx.capture(model, nnx.Intermediate)(X)
    assert nnx.graphdef(model) == structure
    variables = init(jax.random.key(0), X)
    _, updates = Network().apply(variables, X, mutable=["batch_stats"])
    assert updates.keys() == {"batch_stats"}
