"""What a Linen layer asks of its scope and its call: variables, keys, the mode."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def scale_and_bias(
    layer: nn.Module, features: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the parameters that a layer's fields ask for, None where they do not."""
    fields: Any = layer
    # Of the scope, so that another layer may ask for them.
    assert fields.scope is not None
    make, dtype = fields.scope.param, fields.param_dtype
    return (
        make("scale", fields.scale_init, features, dtype) if fields.use_scale else None,
        make("bias", fields.bias_init, features, dtype) if fields.use_bias else None,
    )


def running_state(layer: nn.Module, initial: Any) -> Any:
    """Returns the running state, a named tuple: as it is kept, at first ``initial``."""
    return type(initial)(
        *(
            layer.variable("batch_stats", name, jnp.asarray, value).value
            for name, value in initial._asdict().items()
        )
    )


def keep_state(layer: nn.Module, state: Any) -> None:
    """Keeps the running state, a named tuple, for the next step."""
    for name, value in state._asdict().items():
        layer.put_variable("batch_stats", name, value)


def draw_key(layer: nn.Module, rng_collection: str, purpose: str) -> jax.Array:
    """Draws a key from an rng stream, or from ``'params'`` where it is missing.

    Raises:
      ValueError: if there is neither stream.
    """
    if not (layer.has_rng(rng_collection) or layer.has_rng("params")):
        raise ValueError(
            f"Expected an rng stream '{rng_collection}' for {purpose}, got none in "
            f"layer {'/'.join(layer.path) or type(layer).__name__}. Pass "
            f"rngs={{'{rng_collection}': key}} to apply, a fresh key each step; under "
            f"nn.vmap and nn.scan also split_rngs={{'{rng_collection}': True}}."
        )
    return layer.make_rng(rng_collection)


# Of a field and an argument of the call, returns the one that is given.
evaluates = functools.partial(nn.merge_param, "use_running_average")
