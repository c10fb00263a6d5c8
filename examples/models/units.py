"""What the models are built of: the only place where a method becomes layers.

A unit is a convolution or dense layer, the norm after it, the residual and the
activation: ``conv_norm(features, kernel_size, strides, activation)(x, residual)`` is
``activation(norm(conv(x)) + residual)``. Folded methods compute it at once, all others
one layer after the other, in parameters and statistics of the same names. Without a
norm the convolution has a bias instead. Windows are padded symmetrically.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import flax_sbn as sbn
from methods import Method

Activation = Callable[[jax.Array], jax.Array]
Layer = Callable[..., Any]

# Running averages of a training of some hundred steps need a short memory.
_BATCH_NORM: dict[str, Any] = {"momentum": 0.9, "epsilon": 1e-5}
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class LinenUnits:
    """Makes the layers of linen models.

    Attributes:
      method: the normalization.
      train: normalize with the batch's statistics, not the running ones.
      dtype: of the computation.
    """

    method: Method
    train: bool
    dtype: Any = jnp.float32

    def conv_norm(
        self,
        features: int,
        kernel_size: int,
        strides: int = 1,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a convolutional unit, called with the input and a residual."""
        if self.method.folded:
            return sbn.linen.ConvNorm(
                features,
                activation=activation,
                **_window(kernel_size, strides),
                **self._batch_norm(),
            )

        def conv(name: str) -> nn.Module:
            return self.conv(features, kernel_size, strides, name)

        activation = _fused(self.method, activation)
        return ConvNorm(conv, self._norm_maker(features), activation)

    def dense_norm(self, features: int, activation: Activation | None = None) -> Layer:
        """Returns a dense unit, called with the input and a residual."""
        if self.method.folded:
            return sbn.linen.DenseNorm(
                features, activation=activation, **self._batch_norm()
            )

        def dense(name: str) -> nn.Module:
            use_bias = self.method.kind == "none"
            return nn.Dense(features, use_bias, dtype=self.dtype, name=name)

        activation = _fused(self.method, activation)
        return DenseNorm(dense, self._norm_maker(features), activation)

    def conv(
        self,
        features: int,
        kernel_size: int,
        strides: int = 1,
        name: str | None = None,
    ) -> nn.Module:
        """Returns a convolution alone."""
        return nn.Conv(
            features,
            **_window(kernel_size, strides),
            use_bias=self.method.kind == "none",
            dtype=self.dtype,
            name=name,
        )

    def norm(self, features: int, name: str | None = None) -> Layer:
        """Returns a norm alone."""
        match self.method.kind:
            case "flax":
                return nn.BatchNorm(**self._batch_norm(), name=name)
            case "batch":
                return sbn.linen.BatchNorm(**self._batch_norm(), name=name)
            case "group":
                groups = _num_groups(features)
                return nn.GroupNorm(groups, dtype=self.dtype, name=name)
        return jax.nn.identity

    def head(self, num_classes: int) -> nn.Module:
        """Returns the dense layer that makes the logits."""
        return nn.Dense(num_classes, dtype=self.dtype)

    def _norm_maker(self, features: int) -> Layer:
        return lambda name: self.norm(features, name)

    def _batch_norm(self) -> dict[str, Any]:
        return {
            "use_running_average": not self.train,
            "dtype": self.dtype,
            **self.method.options,
            **_BATCH_NORM,
        }


class _LinearNorm(nn.Module):
    """A linear layer, its norm, the residual and the activation, one by one.

    Attributes:
      linear: makes the linear layer, given its name.
      norm_after: makes the norm, given its name.
      activation: of the sum; None for none.
    """

    linear: Layer
    norm_after: Layer
    activation: Activation | None
    linear_name: ClassVar[str]

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns ``activation(norm(linear(x)) + residual)``."""
        x = self.linear(name=self.linear_name)(x)
        x = self.norm_after(name="norm")(x)
        return _add_and_activate(x, residual, self.activation)


# Flax names a layer after its class: these are those of the library's folded layers.
class ConvNorm(_LinearNorm):
    """The layers and names of :class:`flax_sbn.linen.ConvNorm`, not folded."""

    linear_name = "conv"


class DenseNorm(_LinearNorm):
    """The layers and names of :class:`flax_sbn.linen.DenseNorm`, not folded."""

    linear_name = "dense"


@dataclasses.dataclass(frozen=True)
class NnxUnits:
    """Makes the layers of nnx models.

    Attributes:
      method: the normalization.
      dtype: of the computation.
      rngs: keys for the parameters and the sampling.
    """

    method: Method
    dtype: Any
    rngs: nnx.Rngs

    def conv_norm(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        strides: int = 1,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a convolutional unit, called with the input and a residual."""
        window = _window(kernel_size, strides)
        if self.method.folded:
            return sbn.nnx.ConvNorm(
                in_features,
                out_features,
                activation=activation,
                **window,
                **self._batch_norm(),
            )
        conv = nnx.Conv(in_features, out_features, **window, **self._linear())
        activation = _fused(self.method, activation)
        return NnxConvNorm(conv, self._norm(out_features), activation)

    def dense_norm(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a dense unit, called with the input and a residual."""
        if self.method.folded:
            return sbn.nnx.DenseNorm(
                in_features, out_features, activation=activation, **self._batch_norm()
            )
        dense = nnx.Linear(in_features, out_features, **self._linear())
        activation = _fused(self.method, activation)
        return NnxDenseNorm(dense, self._norm(out_features), activation)

    def head(self, in_features: int, num_classes: int) -> nnx.Module:
        """Returns the dense layer that makes the logits."""
        return nnx.Linear(in_features, num_classes, dtype=self.dtype, rngs=self.rngs)

    def _norm(self, features: int) -> Layer:
        match self.method.kind:
            case "flax":
                return nnx.BatchNorm(features, **self._batch_norm())
            case "batch":
                return sbn.nnx.BatchNorm(features, **self._batch_norm())
            case "group":
                groups = _num_groups(features)
                return nnx.GroupNorm(features, groups, dtype=self.dtype, rngs=self.rngs)
        return jax.nn.identity

    def _linear(self) -> dict[str, Any]:
        use_bias = self.method.kind == "none"
        return {"use_bias": use_bias, "dtype": self.dtype, "rngs": self.rngs}

    def _batch_norm(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            **self.method.options,
            "rngs": self.rngs,
            **_BATCH_NORM,
        }


class NnxConvNorm(nnx.Module):
    """The layers and names of :class:`flax_sbn.nnx.ConvNorm`, not folded."""

    def __init__(self, conv: Layer, norm: Layer, activation: Activation | None) -> None:
        self.conv, self.norm, self.activation = conv, norm, activation

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns ``activation(norm(conv(x)) + residual)``."""
        return _add_and_activate(self.norm(self.conv(x)), residual, self.activation)


class NnxDenseNorm(nnx.Module):
    """The layers and names of :class:`flax_sbn.nnx.DenseNorm`, not folded."""

    def __init__(
        self, dense: Layer, norm: Layer, activation: Activation | None
    ) -> None:
        self.dense, self.norm, self.activation = dense, norm, activation

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns ``activation(norm(dense(x)) + residual)``."""
        return _add_and_activate(self.norm(self.dense(x)), residual, self.activation)


def _add_and_activate(
    x: jax.Array, residual: jax.Array | None, activation: Activation | None
) -> jax.Array:
    if residual is not None:
        x = x + residual
    return x if activation is None else activation(x)


def _fused(method: Method, activation: Activation | None) -> Activation | None:
    """Gives networks without a norm, the limit of folded ones, the same ReLU."""
    return sbn.relu if method.kind == "none" and activation is nn.relu else activation


def _window(kernel_size: int, strides: int) -> dict[str, Any]:
    return {
        "kernel_size": (kernel_size, kernel_size),
        "strides": strides,
        "padding": kernel_size // 2,
        "kernel_init": _KERNEL_INIT,
    }


def _num_groups(features: int) -> int:
    """Returns Wu and He's 32 groups, or for narrow layers 8, if they divide."""
    return math.gcd(features, 32 if features >= 256 else 8)
