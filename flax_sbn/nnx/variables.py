"""What an NNX layer has and asks of its call: parameters, keys, the mode."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
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


def scale_and_bias(layer: Any) -> tuple[jax.Array | None, ...]:
    """Returns the arrays, each None where a layer has none."""
    params = layer.scale, layer.bias
    return tuple(None if param is None else param[...] for param in params)


def with_kernel(layer: nnx.Module, kernel: jax.Array) -> Any:
    """Returns a copy of a layer with another kernel, to pass to Flax's own call."""
    graph, state = nnx.split(layer)
    param: Any = state["kernel"]
    state["kernel"] = param.replace(kernel)
    return nnx.merge(graph, state)


def fork_stream(rngs: nnx.Rngs, rng_collection: str, purpose: str) -> nnx.RngStream:
    """Returns an rng stream of a layer's own; the default stream will do."""
    if rng_collection not in rngs and "default" not in rngs:
        raise ValueError(
            f"Expected an rng stream '{rng_collection}' for {purpose}, got streams "
            f"{sorted(rngs)}. Use nnx.Rngs(params=0, {rng_collection}=1), or "
            "nnx.Rngs(0) for every stream."
        )
    return rngs[rng_collection].fork()


def evaluates(layer: Any, use_running_average: bool | None) -> bool:
    """Returns what a call says or, where it says nothing, the layer."""
    evaluate = first_from(
        use_running_average,
        layer.use_running_average,
        error_msg="Expected use_running_average in the constructor or the call, got "
        "None in both. Use model.train() and model.eval(), or pass it.",
    )
    return bool(evaluate)
