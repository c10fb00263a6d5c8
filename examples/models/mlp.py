"""Multi-layer perceptron on flattened images, in linen and in nnx."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from models.linen_units import LinenUnits
from models.nnx_units import NnxUnits
from models.units import value_of

_HIDDEN_LAYERS = 2


class MLP(nn.Module):
    """Multi-layer perceptron: dense, normalized, ReLU.

    Attributes:
      units: what it is built of.
      num_classes: number of classes.
      width: features of the hidden layers.
    """

    units: LinenUnits
    num_classes: int
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images, in float32."""
        x = x.reshape(len(x), -1)
        for _ in range(_HIDDEN_LAYERS):
            x = self.units.dense_norm(self.width, activation=nn.relu)(x)
        return self.units.head(self.num_classes)(value_of(x)).astype(jnp.float32)


class NnxMLP(nnx.Module):
    """The nnx counterpart of :class:`MLP`, for images of ``in_shape``."""

    def __init__(
        self,
        units: NnxUnits,
        in_shape: tuple[int, ...],
        num_classes: int,
        width: int = 128,
    ) -> None:
        sizes = [math.prod(in_shape)] + [width] * _HIDDEN_LAYERS
        self.hidden = nnx.List(
            [units.dense_norm(*pair, nnx.relu) for pair in itertools.pairwise(sizes)]
        )
        self.head = units.head(width, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images, in float32."""
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = layer(x)
        return self.head(value_of(x)).astype(jnp.float32)
