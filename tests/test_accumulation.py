"""Micro-batches, accumulation and recomputation: each statistic counts once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_sbn as sbn
from tests.closeness import assert_close, assert_trees_close
from tests.networks import Norm, batch, linen_step, nnx_step
from tests.samples import KEY

MICRO = 4
SAMPLERS = {
    "all": None,
    "BS": sbn.BatchSampling(2),
    "FS+VDN": sbn.MixedSampling(sbn.FeatureSampling(1 / 4), sbn.VirtualSampling(2)),
    "lattice": sbn.LatticeSampling(2, min_values=1),
}
CASES = pytest.mark.parametrize(
    ("step", "name", "folded"),
    [
        (linen_step, "all", False),
        (linen_step, "BS", True),
        (nnx_step, "BS", False),
        (nnx_step, "FS+VDN", True),
        (linen_step, "lattice", True),
    ],
)


def micro_batches():
    """Returns images, labels and keys, a leading axis of micro-batches."""
    x, labels = (a.reshape(MICRO, -1, *a.shape[1:]) for a in batch())
    return (
        x + np.arange(MICRO)[:, None, None, None, None],
        labels,
        jax.random.split(KEY, MICRO),
    )


def gradients(loss):
    return jax.value_and_grad(loss, has_aux=True)


def one_by_one(loss, params, state):
    """Returns the mean gradient of micro-batches and the state after each of them."""
    run, all_grads, states = jax.jit(gradients(loss)), [], []
    for each in zip(*micro_batches(), strict=True):
        (_, state), grads = run(params, state, *each)
        all_grads.append(grads)
        states.append(state)
    return jax.tree.map(lambda *g: sum(g) / MICRO, *all_grads), states


def first_mean(state):
    """Returns the running mean of the network's first norm."""
    return next(
        leaf
        for path, leaf in jax.tree.leaves_with_path(state)
        if "mean" in jax.tree_util.keystr(path)
    )


@CASES
def test_a_scan_over_micro_batches_is_a_loop(step, name, folded):
    params, state, loss = step(Norm(SAMPLERS[name], folded=folded))
    grads, states = one_by_one(loss, params, state)

    @jax.jit
    def accumulated(params, state):
        def body(carry, each):
            state, total = carry
            (_, state), grads = gradients(loss)(params, state, *each)
            return (state, jax.tree.map(jnp.add, total, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        (state, total), _ = jax.lax.scan(body, (state, zeros), micro_batches())
        return jax.tree.map(lambda g: g / MICRO, total), state

    assert_trees_close(accumulated(params, state), (grads, states[-1]), num=512)


@CASES
def test_each_micro_batch_moves_the_averages_once(step, name, folded):
    norm = Norm(SAMPLERS[name], folded=folded, momentum=0.75)
    params, state, loss = step(norm)
    _, states = one_by_one(loss, params, state)
    # Without momentum the averages are what each micro-batch has.
    *_, measuring = step(Norm(SAMPLERS[name], folded=folded, momentum=0.0))
    _, measured = one_by_one(measuring, params, state)
    expected = np.float64(first_mean(state))
    for after, own in zip(states, measured, strict=True):
        expected = 0.75 * expected + 0.25 * np.float64(first_mean(own))
        assert_close(first_mean(after), expected)


@CASES
def test_recomputation_counts_nothing_twice(step, name, folded):
    params, state, loss = step(Norm(SAMPLERS[name], folded=folded))
    args = (params, state, *batch(), KEY)
    plain = jax.jit(gradients(loss))(*args)
    again = jax.jit(gradients(jax.checkpoint(loss)))(*args)
    assert_trees_close(again, plain, num=512)


def linen_rematerialized(remat):
    cls = nn.remat(sbn.linen.BatchRenorm) if remat else sbn.linen.BatchRenorm
    layer = cls(use_running_average=False, sampler=sbn.BatchSampling(4), name="norm")
    x, _ = batch()
    variables = layer.init(KEY, x)

    def loss(x):
        y, updates = layer.apply(
            variables, x, mutable=["batch_stats"], rngs={"sampling": KEY}
        )
        return (y**3).sum(), updates

    return jax.jit(gradients(loss))(x)


def nnx_rematerialized(remat):
    layer = sbn.nnx.BatchRenorm(3, sampler=sbn.BatchSampling(4), rngs=nnx.Rngs(0))
    call = nnx.remat(lambda layer, x: layer(x)) if remat else lambda layer, x: layer(x)

    @nnx.jit
    def run(layer, x):
        return nnx.grad(lambda layer, x: (call(layer, x) ** 3).sum(), argnums=1)(
            layer, x
        )

    grads = run(layer, batch()[0])
    return grads, nnx.state(layer)


@pytest.mark.parametrize("run", [linen_rematerialized, nnx_rematerialized])
def test_a_recomputed_layer_counts_its_step_once(run):
    plain, again = run(False), run(True)
    assert_trees_close(again, plain, num=512)
    (count,) = (
        int(leaf)
        for path, leaf in jax.tree.leaves_with_path(again)
        if "step" in jax.tree_util.keystr(path)
    )
    assert count == 1


@CASES
def test_multi_steps_update_once_and_every_statistic_counts(step, name, folded):
    params, state, loss = step(Norm(SAMPLERS[name], folded=folded))
    grads, states = one_by_one(loss, params, state)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    tx = optax.MultiSteps(optax.sgd(0.1), MICRO)

    @jax.jit
    def train(params, state, optimizer, *each):
        (_, state), grads = gradients(loss)(params, state, *each)
        updates, optimizer = tx.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), state, optimizer

    optimizer = tx.init(params)
    start = params
    for i, each in enumerate(zip(*micro_batches(), strict=True)):
        if i:
            assert_trees_close(params, start, num=512)
        params, state, optimizer = train(params, state, optimizer, *each)
    assert_trees_close((params, state), (expected, states[-1]), num=512)
