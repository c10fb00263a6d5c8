"""Scale and bias of a Linen layer."""

from typing import Any

import jax
from flax import linen as nn


def scale_and_bias(
    layer: nn.Module, features: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns them as the fields of ``layer`` say, None where there is none.

    Args:
      layer: with Flax's fields, ``use_scale`` and ``scale_init`` and so on.
      features: extent of the feature axes.
    """
    fields: Any = layer
    # Of the scope, so that another layer may ask for them.
    assert fields.scope is not None
    make, dtype = fields.scope.param, fields.param_dtype
    return (
        make("scale", fields.scale_init, features, dtype) if fields.use_scale else None,
        make("bias", fields.bias_init, features, dtype) if fields.use_bias else None,
    )
