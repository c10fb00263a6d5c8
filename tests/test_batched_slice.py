"""Slicing each entry of a leading axis: the same as a loop, in every direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from flax_sbn.batched_slice import batched_slice

SIZES = (2, 2, 3)
STARTS = jnp.array([[0, 1, 0], [2, 3, 0], [1, 0, 0], [2, 2, 0]])


def loop(x: jax.Array, starts: jax.Array = STARTS) -> jax.Array:
    pairs = zip(x, starts, strict=True)
    return jnp.stack([jax.lax.dynamic_slice(a, s, SIZES) for a, s in pairs])


def ours(x: jax.Array, starts: jax.Array = STARTS) -> jax.Array:
    return batched_slice(x, starts, SIZES)


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 4, 5, 3))


def test_it_equals_a_loop_forward_and_backward(x) -> None:
    z, pullback = jax.vjp(ours, x)
    expected, expected_pullback = jax.vjp(loop, x)
    np.testing.assert_array_equal(z, expected)
    np.testing.assert_array_equal(pullback(z)[0], expected_pullback(z)[0])


def test_both_modes_and_second_order(x64, x) -> None:
    check_grads(lambda x: jnp.sin(ours(x)) ** 2, (x.astype(float),), order=2)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (2, 1)], ids=str)
def test_vmap_of_values_and_gradients(x, axes) -> None:
    args = [
        a if axis is None else jnp.stack([a, a[::-1]], axis)
        for a, axis in zip((x, STARTS), axes, strict=True)
    ]
    grads = [jax.grad(lambda x, s, f=f: (f(x, s) ** 3).sum()) for f in (ours, loop)]
    for f, expected in ((ours, loop), tuple(grads)):
        mapped = jax.vmap(f, axes)(*args)
        np.testing.assert_array_equal(mapped, jax.vmap(expected, axes)(*args))


def test_no_scatter_is_left_in_the_gradient(x) -> None:
    program = jax.jit(jax.grad(lambda x: (ours(x) ** 2).sum())).lower(x).as_text()
    assert "gather" in program
    assert "scatter" not in program


def test_sharded_along_the_leading_axis_it_moves_nothing(x) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(x, sharding)
    grad = jax.jit(jax.grad(lambda x: (ours(x) ** 2).sum()), out_shardings=sharding)
    program = grad.lower(sharded).compile().as_text()
    assert not [op for op in ("all-gather", "all-to-all", "permute") if op in program]
    np.testing.assert_allclose(
        grad(sharded), jax.grad(lambda x: (loop(x) ** 2).sum())(x)
    )

    spec = PartitionSpec("data")
    mapped = jax.shard_map(ours, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_array_equal(mapped(x, STARTS), loop(x))
