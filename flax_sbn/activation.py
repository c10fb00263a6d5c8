"""Activations behind a norm, and a ReLU that stays fused with what is before it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

Activation = Callable[[jax.Array], jax.Array]


def relu(x: jax.Array) -> jax.Array:
    r"""Rectified linear unit that stays fused with the convolution before it.

    .. math::
      \mathrm{relu}(x) = \max(x, 0)

    Values and gradients are those of :func:`jax.nn.relu`. Its gradient, though, is read
    off the *output*: XLA rewrites a test of :func:`jax.nn.relu`'s output into one of
    its input, which then is written to memory, too, and kept for the backward pass.

    Args:
      x: any shape, any real dtype.

    Returns:
      An array of the same shape and dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import relu
      >>> jax.vmap(jax.value_and_grad(relu))(jnp.array([-1.0, 0.0, 2.0]))
      (Array([0., 0., 2.], dtype=float32), Array([0., 0., 1.], dtype=float32))

    The formulation is ours.
    """
    # A function of its own, so that a copied or unpickled model holds the very same.
    return _relu(x)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = _relu(*primals)
    (tangent,) = tangents
    positive = lax.optimization_barrier(y) > 0
    return y, jnp.where(positive, tangent, jnp.zeros_like(tangent))


@contextlib.contextmanager
def fused_relu() -> Iterator[None]:
    """Makes :func:`jax.nn.relu` stay fused, as :func:`relu` does, while it lasts.

    For models that are not written with :func:`relu`: put it around the call of the
    model inside the function that is compiled. Values and gradients are the same;
    :func:`jax.nn.relu` is only differentiated in another way, under all of its names.

    Example:
      >>> import jax
      >>> from flax_sbn import fused_relu
      >>> def loss(x):
      ...     with fused_relu():
      ...         return jax.nn.relu(x).sum()
      >>> jax.grad(loss)(jax.numpy.array([-1.0, 0.0, 2.0]))
      Array([0., 0., 1.], dtype=float32)
    """
    plain: Any = jax.nn.relu
    before = plain.jvp
    plain.jvp = _relu_jvp
    try:
        yield
    finally:
        plain.jvp = before


def fused(activation: Activation | None) -> Activation | None:
    """Returns the activation, :func:`jax.nn.relu` such that it stays fused."""
    return relu if _origin(activation) == _origin(jax.nn.relu) else activation


def _origin(activation: Activation | None) -> tuple[Any, ...]:
    """Returns what a function shares with its copies, which do not compare equal."""
    names = ("__module__", "__qualname__")
    return (type(activation), *(getattr(activation, name, None) for name in names))


def add_and_activate(
    x: jax.Array, residual: ArrayLike | None, activation: Activation | None
) -> jax.Array:
    """Adds the residual, and applies the activation; see :func:`fused`."""
    if residual is not None:
        residual = jnp.asarray(residual, x.dtype)
        if residual.shape != x.shape:
            raise ValueError(
                f"Expected residual of the output's shape {x.shape}, got residual of "
                f"shape {residual.shape}. Project or subsample it first."
            )
        x += residual
    activation = fused(activation)
    return x if activation is None else activation(x)
