"""Residual networks for ImageNet: ResNet-18, 34 and 50.

Those of He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
in the form that torchvision has made common: bottlenecks stride in their 3 x 3
convolution ("v1.5"), and shortcuts project where the shape changes.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.linen_units import LinenUnits


class ResNet(nn.Module):
    """Residual network for images of about 224 x 224; smaller ones work as well.

    Attributes:
      units: what it is built of.
      num_classes: number of classes.
      blocks: blocks of each stage.
      bottleneck: whether a block is 1 x 1, 3 x 3, 1 x 1 convolutions with four times
        the features at its ends, or two 3 x 3 ones.
      width: features of the stem; they double with each stage.
    """

    units: LinenUnits
    num_classes: int
    blocks: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images ``(N, H, W, C)``, in float32."""
        x = self.units.conv_norm(self.width, 7, strides=2, activation=nn.relu)(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        block = BottleneckBlock if self.bottleneck else BasicBlock
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                strides = 2 if stage > 0 and index == 0 else 1
                x = block(self.units, self.width * 2**stage, strides)(x)
        x = x.mean(axis=(1, 2))
        return self.units.head(self.num_classes)(x).astype(jnp.float32)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Attributes:
      units: what it is built of.
      features: of both convolutions.
      strides: of the first one.
    """

    units: LinenUnits
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's features."""
        conv_norm = self.units.conv_norm
        residual = _shortcut(self.units, x, self.features, self.strides)
        x = conv_norm(self.features, 3, self.strides, activation=nn.relu)(x)
        return conv_norm(self.features, 3, activation=nn.relu)(x, residual)


class BottleneckBlock(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut.

    Attributes:
      units: what it is built of.
      features: of the inner convolutions; the last one has four times as many.
      strides: of the 3 x 3 convolution.
    """

    units: LinenUnits
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's features."""
        conv_norm = self.units.conv_norm
        residual = _shortcut(self.units, x, 4 * self.features, self.strides)
        x = conv_norm(self.features, 1, activation=nn.relu)(x)
        x = conv_norm(self.features, 3, self.strides, activation=nn.relu)(x)
        return conv_norm(4 * self.features, 1, activation=nn.relu)(x, residual)


def _shortcut(
    units: LinenUnits, x: jax.Array, features: int, strides: int
) -> jax.Array:
    if strides == 1 and x.shape[-1] == features:
        return x
    return units.conv_norm(features, 1, strides)(x)
