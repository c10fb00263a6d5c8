"""Parameters of NNX layers: made with common options, read, replaced for a call."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


class Normalizer(nnx.Module):
    """Scale and bias, None where there is none, and options of the normalization."""

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        rngs: nnx.Rngs,
    ) -> None:
        def make(use: bool, init: Initializer) -> nnx.Param[jax.Array] | None:
            if not use:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype))

        self.scale = make(use_scale, scale_init)
        self.bias = make(use_bias, bias_init)
        self.axis, self.dtype, self.param_dtype = axis, dtype, param_dtype


def values(*params: nnx.Param[jax.Array] | None) -> tuple[jax.Array | None, ...]:
    """Returns the arrays in parameters."""
    return tuple(None if param is None else param[...] for param in params)


def with_kernel(layer: nnx.Module, kernel: jax.Array) -> Any:
    """Returns a copy of a layer with another kernel, to pass to Flax's own call."""
    graph, state = nnx.split(layer)
    param: Any = state["kernel"]
    state["kernel"] = param.replace(kernel)
    return nnx.merge(graph, state)
