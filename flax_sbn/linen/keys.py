"""Random keys of a Linen layer."""

import jax
from flax import linen as nn


def draw_key(layer: nn.Module, rng_collection: str, purpose: str) -> jax.Array:
    """Draws a key from an rng stream, or from ``'params'`` where it is missing.

    Args:
      layer: in its ``__call__``.
      rng_collection: name of the stream.
      purpose: what needs the key, for the message.

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
    key: jax.Array = layer.make_rng(rng_collection)
    return key
