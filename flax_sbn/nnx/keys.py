"""Random keys of an NNX layer."""

import jax
from flax import nnx


def fork_stream(rngs: nnx.Rngs, rng_collection: str, purpose: str) -> nnx.RngStream:
    """Returns an rng stream of a layer's own; the default stream will do."""
    if rng_collection not in rngs and "default" not in rngs:
        raise ValueError(
            f"Expected an rng stream '{rng_collection}' for {purpose}, got streams "
            f"{sorted(rngs)}. Use nnx.Rngs(params=0, {rng_collection}=1), or "
            "nnx.Rngs(0) for every stream."
        )
    return rngs[rng_collection].fork()


def draw_key(
    rngs: nnx.Rngs | nnx.RngStream | None, rng_collection: str, purpose: str
) -> jax.Array:
    """Draws a key from a layer's stream, or streams of which it is one."""
    if rngs is None:
        raise ValueError(
            f"Expected an rng stream for {purpose}, got none in a layer that was made "
            "for a sampler that draws nothing. Set both: model.set_attributes("
            "sbn.nnx.BatchNorm, sampler=sampler, rngs=nnx.Rngs(0))."
        )
    stream = rngs[rng_collection] if isinstance(rngs, nnx.Rngs) else rngs
    return stream()
