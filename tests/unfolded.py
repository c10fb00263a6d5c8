"""What folding has to equal: linear layer, norm, residual and activation in turn.

The convolution is flax's own, with its reading of strides, padding and dilations.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import flax_sbn as sbn

# Compiling takes nearly all of a test's time, and optimizing most of that.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def conv(x: jax.Array, kernel: jax.Array, dtype: Any = None, **options: Any) -> Any:
    """Returns flax's convolution."""
    *window, _, features = kernel.shape
    layer = nn.Conv(features, window, use_bias=False, dtype=dtype, **options)
    return layer.apply({"params": {"kernel": kernel}}, x)


def dense(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> Any:
    """Returns flax's dense layer."""
    layer = nn.Dense(kernel.shape[-1], use_bias=False, dtype=dtype)
    return layer.apply({"params": {"kernel": kernel}}, x)


def norm(
    linear: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    residual: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    sampler: sbn.Sampler | None = None,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
    dtype: Any = None,
    axis_name: str | None = None,
    **options: Any,
) -> tuple[jax.Array, sbn.Statistics]:
    """Returns the output and statistics of a linear layer and what follows it."""
    y, statistics = sbn.batch_norm(
        linear(x, kernel, dtype=dtype, **options),
        scale,
        bias,
        sampler=sampler,
        key=key,
        mask=mask,
        dtype=dtype,
        axis_name=axis_name,
    )
    if residual is not None:
        y += residual.astype(y.dtype)
    return y if activation is None else activation(y), statistics


conv_norm = functools.partial(norm, conv)
dense_norm = functools.partial(norm, dense)


def value_and_gradients(
    function: Callable[..., Any], arguments: dict[str, Any], cotangents: Any
) -> tuple[Any, Any]:
    """Returns what a function gives, and its gradients by all arguments."""
    value, pullback = jax.vjp(lambda given: function(**given), arguments)
    # Cotangents have the dtypes of the values.
    cotangents = jax.tree.map(lambda g, v: jnp.asarray(g, v.dtype), cotangents, value)
    return value, *pullback(cotangents)
