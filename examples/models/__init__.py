"""Published networks that take any normalization, by name, in linen and in nnx.

Images are ``(N, H, W, C)``, sequences ``(N, L, C)``; the result is logits in float32,
``(N, num_classes)``, or of every pixel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from harness.methods import Method
from models.binary_resnet import BinaryResNet
from models.cifar_resnet import CifarResNet, NnxCifarResNet
from models.densenet import DenseNet
from models.imagenet_resnet import ResNet
from models.linen_units import LinenUnits
from models.mlp import MLP, NnxMLP
from models.nnx_units import NnxUnits
from models.unet import UNet

LINEN: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(CifarResNet, blocks=1),
    "resnet8-stride2": functools.partial(CifarResNet, blocks=1, stem_strides=2),
    "resnet20": functools.partial(CifarResNet, blocks=3),
    "resnet56": functools.partial(CifarResNet, blocks=9),
    "resnet18": functools.partial(ResNet, blocks=(2, 2, 2, 2)),
    "resnet34": functools.partial(ResNet, blocks=(3, 4, 6, 3)),
    "resnet50": functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "densenet121": functools.partial(DenseNet, blocks=(6, 12, 24, 16)),
    "binary8": functools.partial(BinaryResNet, blocks=1),
    "mlp": MLP,
    "unet": UNet,
}
NNX: dict[str, Callable[..., nnx.Module]] = {
    "resnet8": functools.partial(NnxCifarResNet, blocks=1),
    "resnet8-stride2": functools.partial(NnxCifarResNet, blocks=1, stem_strides=2),
    "resnet20": functools.partial(NnxCifarResNet, blocks=3),
    "resnet56": functools.partial(NnxCifarResNet, blocks=9),
    "mlp": NnxMLP,
}
# Methods that replace more than the norm behind a layer, and the models that let them.
JOINED: dict[str, tuple[str, ...]] = {
    "ic": tuple(NNX),
    "kalman": tuple(NNX),
    "norm_free": (*NNX, "binary8"),
}
_SMALL = {*NNX, "binary8"}
# Of those that classify images.
IMAGE_SHAPES: dict[str, tuple[int, int, int]] = {
    name: (32, 32, 3) if name in _SMALL else (224, 224, 3)
    for name in LINEN
    if name != "unet"
}


def linen_model(
    name: str,
    method: Method,
    *,
    num_classes: int,
    train: bool,
    dtype: Any = jnp.float32,
    width: int | None = None,
) -> nn.Module:
    """Returns a linen model.

    Args:
      name: one of ``LINEN``.
      method: the normalization.
      num_classes: number of classes.
      train: normalize with the batch's statistics, not the running ones.
      dtype: of the computation; parameters are float32.
      width: features of the first stage or hidden layer; None for the published ones.

    Raises:
      ValueError: if the method does not fit the model.
    """
    if name not in (fitting := JOINED.get(method.kind, LINEN)):
        raise ValueError(
            f"Expected one of {', '.join(fitting)} for {method.name}, which replaces "
            f"more than the norm behind a layer, got {name!r}."
        )
    units = LinenUnits(method, train, dtype)
    return LINEN[name](units=units, num_classes=num_classes, **_given(width))


def nnx_model(
    name: str,
    method: Method,
    *,
    in_shape: tuple[int, ...],
    num_classes: int,
    dtype: Any = jnp.float32,
    width: int | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Returns an nnx model.

    Args:
      name: one of ``NNX``.
      method: the normalization.
      in_shape: of an image.
      num_classes: number of classes.
      dtype: of the computation; parameters are float32.
      width: features of the first stage or hidden layer; None for the published ones.
      rngs: keys for the parameters and, in training, the sampling.

    Raises:
      ValueError: if the model is there in linen only.
    """
    if name not in NNX:
        raise ValueError(
            f"Expected one of the nnx models {', '.join(NNX)}, got {name!r}. Use linen."
        )
    units = NnxUnits(method, dtype, rngs)
    return NNX[name](
        units=units, in_shape=in_shape, num_classes=num_classes, **_given(width)
    )


def _given(width: int | None) -> dict[str, int]:
    return {} if width is None else {"width": width}
