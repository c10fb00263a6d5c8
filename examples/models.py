"""Small networks that take any normalization, in linen and in nnx.

``norm`` is a factory: in linen ``norm()`` makes a layer, in nnx
``norm(num_features, rngs=rngs)``. Images are ``(N, H, W, C)``; the result is
``(N, num_classes)`` logits in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import flax_sbn as sbn
from methods import Method

Norm = Callable[..., Any]

# Running averages of a training of some hundred steps need a short memory.
_BATCH_NORM: dict[str, Any] = {"momentum": 0.9, "epsilon": 1e-5}
_GROUPS = 8


def linen_norm(method: Method, train: bool, dtype: Any) -> Norm:
    """Returns the factory of a method's linen layers."""
    match method.kind:
        case "batch":
            return functools.partial(
                sbn.linen.BatchNorm,
                use_running_average=not train,
                sampler=method.sampler,
                dtype=dtype,
                **_BATCH_NORM,
            )
        case "group":
            return functools.partial(nn.GroupNorm, num_groups=_GROUPS, dtype=dtype)
    return lambda: lambda x: x


def nnx_norm(method: Method, dtype: Any) -> Norm:
    """Returns the factory of a method's nnx layers."""
    match method.kind:
        case "batch":
            return functools.partial(
                sbn.nnx.BatchNorm, sampler=method.sampler, dtype=dtype, **_BATCH_NORM
            )
        case "group":
            return functools.partial(nnx.GroupNorm, num_groups=_GROUPS, dtype=dtype)
    return lambda num_features, rngs: lambda x: x


class ResNet(nn.Module):
    """Residual network for small images: three stages, ``6 * blocks + 2`` layers.

    Attributes:
      num_classes: number of classes.
      norm: factory of normalization layers.
      blocks: blocks a stage; 1 gives ResNet-8, 3 ResNet-20.
      widths: features of each stage.
      dtype: compute dtype.
    """

    num_classes: int
    norm: Norm
    blocks: int = 1
    widths: tuple[int, ...] = (16, 32, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = nn.relu(self.norm()(conv(self.widths[0], (3, 3))(x)))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                residual = x
                x = nn.relu(self.norm()(conv(width, (3, 3), strides)(x)))
                x = self.norm()(conv(width, (3, 3))(x))
                if residual.shape != x.shape:
                    residual = self.norm()(conv(width, (1, 1), strides)(residual))
                x = nn.relu(x + residual)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class MLP(nn.Module):
    """Multi-layer perceptron on flattened images: dense, normalized, ReLU.

    Attributes:
      num_classes: number of classes.
      norm: factory of normalization layers.
      widths: features of the hidden layers.
      dtype: compute dtype.
    """

    num_classes: int
    norm: Norm
    widths: tuple[int, ...] = (128, 128)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.Dense(width, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(self.norm()(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class NnxBlock(nnx.Module):
    """Two convolutions and a shortcut, as in :class:`ResNet`."""

    def __init__(
        self, inputs: int, width: int, strides: int, norm: Norm, dtype: Any, rngs: Any
    ) -> None:
        conv = functools.partial(nnx.Conv, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv1 = conv(inputs, width, (3, 3), strides)
        self.norm1 = norm(width, rngs=rngs)
        self.conv2 = conv(width, width, (3, 3))
        self.norm2 = norm(width, rngs=rngs)
        self.projects = strides > 1 or inputs != width
        if self.projects:
            self.conv3 = conv(inputs, width, (1, 1), strides)
            self.norm3 = norm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's features."""
        residual = self.norm3(self.conv3(x)) if self.projects else x
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)) + residual)


class NnxResNet(nnx.Module):
    """The nnx counterpart of :class:`ResNet`."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        norm: Norm,
        *,
        blocks: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        width = widths[0]
        self.conv = nnx.Conv(
            channels, width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = norm(width, rngs=rngs)
        stack = []
        for stage, features in enumerate(widths):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                stack.append(NnxBlock(width, features, strides, norm, dtype, rngs))
                width = features
        self.blocks = nnx.List(stack)
        self.head = nnx.Linear(width, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


class NnxMLP(nnx.Module):
    """The nnx counterpart of :class:`MLP`."""

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        norm: Norm,
        *,
        widths: tuple[int, ...] = (128, 128),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        sizes = (inputs, *widths)
        self.layers = nnx.List(
            [dense(a, b, use_bias=False) for a, b in zip(sizes, widths, strict=False)]
        )
        self.norms = nnx.List([norm(width, rngs=rngs) for width in widths])
        self.head = dense(sizes[-1], num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        x = x.reshape(len(x), -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x).astype(jnp.float32)
