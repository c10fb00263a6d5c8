"""Residual network of binary convolutions for small images, in linen.

As ReActNet (Liu et al., arXiv 2003.03488) in small: each convolution but the first has
weights and inputs of two values, a shortcut of its own, and learned shifts before the
sign and around the activation. Kind ``'norm_free'`` trains it without a norm, as Chen
et al., '"BNN - BN = ?"', arXiv 2104.08215: with standardized weights and branches of
known mean and variance. Unlike there, the activation is in the branch, so that those
of the sum are known, too.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from flax_sbn.alternatives import (
    activation_gain,
    binarize,
    binarize_kernel,
    expected_std,
    norm_free_residual,
    standardize_kernel,
)
from models.linen_units import LinenUnits

_SLOPE = 0.25  # of the activation's negative part, at first


class BinaryResNet(nn.Module):
    """Three stages of binary units, ``6 * blocks + 2`` layers.

    Attributes:
      units: makes the first layer, the norms and the head; any kind that comes after a
        layer, ``'none'``, or ``'norm_free'``.
      num_classes: number of classes.
      blocks: pairs of convolutions in a stage.
      width: features of the first stage; they double with each stage.
    """

    units: LinenUnits
    num_classes: int
    blocks: int
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images ``(N, H, W, C)``, in float32."""
        x = self.units.conv(self.width, 3)(x)
        x = _normalized(self.units, x)
        count = 2 * self.blocks
        for index, beta in enumerate(expected_std([3 * count])):
            stage, first = index // count, index % count == 0
            strides = 2 if stage > 0 and first else 1
            x = BinaryUnit(self.units, self.width * 2**stage, strides, beta)(x)
        x = x.mean(axis=(1, 2))
        return self.units.head(self.num_classes)(x).astype(jnp.float32)


class BinaryUnit(nn.Module):
    """Shifted sign, binary convolution, norm, shifted PReLU, and a shortcut.

    Attributes:
      units: see :class:`BinaryResNet`.
      features: of the output; the input's or twice as many.
      strides: of the convolution.
      beta: expected standard deviation of the input, for kind ``'norm_free'``.
    """

    units: LinenUnits
    features: int
    strides: int
    beta: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the unit to ``(N, H, W, I)``."""
        shortcut = _shortcut(x, self.features, self.strides)
        if self.units.method.kind != "norm_free":
            return shortcut + self._branch(x)
        return norm_free_residual(
            x,
            self._branch,
            lambda _: shortcut,
            skip_gain=self.param("skip_gain", nn.initializers.zeros, ()),
            beta=self.beta,
        )

    def _branch(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        mean = 0.0
        if self.units.method.kind == "norm_free":
            gain, mean = _branch_gain_and_mean()
            init = nn.initializers.constant(gain)
            kernel = binarize_kernel(standardize_kernel(kernel))
            gains = self.param("gain", init, (self.features,))
            kernel *= jnp.broadcast_to(gains, shape)
        else:
            kernel = binarize_kernel(kernel)
        x = lax.conv_general_dilated(
            binarize(x - self._learned("threshold", 0.0, x)),
            kernel.astype(x.dtype),
            (self.strides, self.strides),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = _normalized(self.units, x)
        x -= self._learned("shift_before", 0.0, x)
        x = jnp.where(x > 0, x, self._learned("slope", _SLOPE, x) * x)
        return x + self._learned("shift_after", -mean, x)

    def _learned(self, name: str, start: float, x: jax.Array) -> jax.Array:
        """Returns a learned number for each feature of ``x``."""
        init = nn.initializers.constant(start)
        learned = self.param(name, init, x.shape[-1:]).astype(x.dtype)
        return jnp.expand_dims(learned, range(x.ndim - 1))


def _normalized(units: LinenUnits, x: jax.Array) -> jax.Array:
    if units.method.kind in ("none", "norm_free"):
        return x
    return units.norm(x.shape[-1], name="norm")(x)


def _branch_gain_and_mean() -> tuple[float, float]:
    """Returns the kernel's gain and the mean, for branches of mean 0 and variance 1."""
    gain = activation_gain(lambda x: jnp.where(x > 0, x, _SLOPE * x))
    # The mean magnitude of normal weights is smaller than their standard deviation.
    return math.sqrt(math.pi / 2) * gain, (1 - _SLOPE) * gain / math.sqrt(2 * math.pi)


def _shortcut(x: jax.Array, features: int, strides: int) -> jax.Array:
    """Skips pixels and repeats features: neither changes their variance."""
    return jnp.tile(x[:, ::strides, ::strides], features // x.shape[-1])
