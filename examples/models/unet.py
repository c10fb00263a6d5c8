"""A small U-Net: a class for each pixel, in linen.

After Ronneberger et al., "U-Net", arXiv 1505.04597, with norms, padded convolutions,
and nearest neighbours in place of transposed convolutions.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.linen_units import LinenUnits


class UNet(nn.Module):
    """U-Net with two convolutions a scale, on the way down and up again.

    Attributes:
      units: what it is built of.
      num_classes: number of classes.
      scales: how often the maps are halved.
      width: features at full size; they double with each scale.
    """

    units: LinenUnits
    num_classes: int
    scales: int = 2
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits ``(N, H, W, num_classes)`` of images, in float32."""
        skipped = []
        for scale in range(self.scales):
            x = self._twice(x, self.width * 2**scale)
            skipped.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = self._twice(x, self.width * 2**self.scales)
        for scale in reversed(range(self.scales)):
            x = x.repeat(2, 1).repeat(2, 2)
            x = self._twice(
                jnp.concatenate([skipped.pop(), x], -1), self.width * 2**scale
            )
        return self.units.head(self.num_classes)(x).astype(jnp.float32)

    def _twice(self, x: jax.Array, features: int) -> jax.Array:
        for _ in range(2):
            x = self.units.conv_norm(features, 3, activation=nn.relu)(x)
        return x
