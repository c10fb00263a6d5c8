"""DenseNet: every layer sees the features of all layers before it.

That of Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993,
with bottlenecks and compression, as in torchvision. Half of its norms come *before* a
convolution and the ReLU: those are no units and cannot be folded.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.linen_units import LinenUnits

_MIN_SIZE = 32  # of images: they are halved five times


class DenseNet(nn.Module):
    """Densely connected network for images of at least 32 x 32.

    Attributes:
      units: what it is built of.
      num_classes: number of classes.
      blocks: layers of each dense block.
      width: features of the stem; a layer adds half as many.
    """

    units: LinenUnits
    num_classes: int
    blocks: tuple[int, ...]
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images ``(N, H, W, C)``, in float32.

        Raises:
          ValueError: if the images are too small.
        """
        if min(x.shape[1:3]) < _MIN_SIZE:
            raise ValueError(
                f"Expected images of at least {_MIN_SIZE} x {_MIN_SIZE} for DenseNet, "
                f"got images of shape {x.shape}. Use a ResNet for smaller ones."
            )
        x = self.units.conv_norm(self.width, 7, strides=2, activation=nn.relu)(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block, layers in enumerate(self.blocks):
            if block > 0:
                x = nn.relu(self.units.norm(x.shape[-1])(x))
                x = self.units.conv(x.shape[-1] // 2, 1)(x)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for _ in range(layers):
                x = DenseLayer(self.units, self.width // 2)(x)
        x = nn.relu(self.units.norm(x.shape[-1])(x)).mean(axis=(1, 2))
        return self.units.head(self.num_classes)(x).astype(jnp.float32)


class DenseLayer(nn.Module):
    """A bottleneck whose features are appended to its input.

    Attributes:
      units: what it is built of.
      growth: features that it adds.
    """

    units: LinenUnits
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the input and the new features."""
        new = nn.relu(self.units.norm(x.shape[-1])(x))
        new = self.units.conv_norm(4 * self.growth, 1, activation=nn.relu)(new)
        new = self.units.conv(self.growth, 3)(new)
        return jnp.concatenate([x, new], axis=-1)
