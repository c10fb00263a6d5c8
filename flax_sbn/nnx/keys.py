"""Random keys of an NNX layer."""

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
