"""Parameters with a number for each feature, and their arrays; any may be missing."""

from collections.abc import Iterator

import jax
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


def make(
    *inits: Initializer | None,
    num_features: int,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Iterator[nnx.Param[jax.Array] | None]:
    """Yields a parameter ``(num_features,)`` for each initializer, None for None."""
    for init in inits:
        yield (
            nnx.data(None)
            if init is None
            else nnx.Param(init(rngs.params(), (num_features,), param_dtype))
        )


def values(*params: nnx.Param[jax.Array] | None) -> tuple[jax.Array | None, ...]:
    """Returns the arrays in parameters."""
    return tuple(None if param is None else param[...] for param in params)
