"""Residual networks for small images and for sequences, in linen and in nnx.

Those of section 4.2 of He et al., "Deep Residual Learning for Image Recognition",
arXiv 1512.03385: three stages of two-convolution blocks, and shortcuts without
parameters. ``6 * blocks + 2`` layers: ResNet-8, 20, 56 have 1, 3, 9 blocks a stage.
Their windows have as many axes as the inputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from models.linen_units import LinenUnits
from models.nnx_units import NnxUnits
from models.units import on_value, value_of


class CifarResNet(nn.Module):
    """Residual network for small images.

    Attributes:
      units: what it is built of.
      num_classes: number of classes.
      blocks: blocks a stage.
      width: features of the first stage; they double with each stage.
      stem_strides: of the first convolution. With 2 all maps are half as large, and at
        the same cost there may be twice as many features: better, on a CPU.
    """

    units: LinenUnits
    num_classes: int
    blocks: int
    width: int = 16
    stem_strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of ``(N, H, W, C)`` or ``(N, L, C)``, in float32."""
        conv_norm = self.units.conv_norm
        window = (3,) * (x.ndim - 2)
        x = conv_norm(self.width, window, self.stem_strides, activation=nn.relu)(x)
        for features, strides in _blocks(self.width, self.blocks):
            residual = on_value(_shortcut(features, strides), x)
            x = conv_norm(features, window, strides, activation=nn.relu)(x)
            x = conv_norm(features, window, activation=nn.relu)(x, residual)
        x = _pooled(value_of(x))
        return self.units.head(self.num_classes)(x).astype(jnp.float32)


class NnxCifarResNet(nnx.Module):
    """The nnx counterpart of :class:`CifarResNet`, for images of ``in_shape``."""

    def __init__(
        self,
        units: NnxUnits,
        in_shape: tuple[int, ...],
        num_classes: int,
        blocks: int,
        width: int = 16,
        stem_strides: int = 1,
    ) -> None:
        *extents, channels = in_shape
        window = (3,) * len(extents)
        self.stem = units.conv_norm(channels, width, window, stem_strides, nnx.relu)
        stack, in_features = [], width
        for features, strides in _blocks(width, blocks):
            stack.append(_NnxBlock(units, window, in_features, features, strides))
            in_features = features
        self.blocks = nnx.List(stack)
        self.head = units.head(in_features, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of ``(N, H, W, C)`` or ``(N, L, C)``, in float32."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(_pooled(value_of(x))).astype(jnp.float32)


class _NnxBlock(nnx.Module):
    def __init__(
        self,
        units: NnxUnits,
        window: tuple[int, ...],
        in_features: int,
        features: int,
        strides: int,
    ) -> None:
        self.features, self.strides = features, strides
        self.unit1 = units.conv_norm(in_features, features, window, strides, nnx.relu)
        self.unit2 = units.conv_norm(features, features, window, activation=nnx.relu)

    def __call__(self, x: jax.Array) -> jax.Array:
        residual = on_value(_shortcut(self.features, self.strides), x)
        return self.unit2(self.unit1(x), residual)


def _blocks(width: int, blocks: int) -> list[tuple[int, int]]:
    """Returns the features and strides of each block."""
    return [
        (width * 2**stage, 2 if stage > 0 and block == 0 else 1)
        for stage in range(3)
        for block in range(blocks)
    ]


def _shortcut(features: int, strides: int) -> Callable[[jax.Array], jax.Array]:
    """Option A of the paper: skips pixels, and fills up with zero features."""

    def shortcut(x: jax.Array) -> jax.Array:
        x = x[(slice(None), *(slice(None, None, strides),) * (x.ndim - 2))]
        return jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, features - x.shape[-1])))

    return shortcut


def _pooled(x: jax.Array) -> jax.Array:
    """Returns the mean of each feature over an input."""
    return x.mean(axis=tuple(range(1, x.ndim - 1)))
