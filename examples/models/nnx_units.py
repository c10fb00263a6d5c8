"""What nnx models are built of: the only place where a method becomes layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import flax_sbn as sbn
from harness.methods import Method
from models import units
from models.units import Activation, Carried, Layer


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
        kernel_size: int | tuple[int, ...],
        strides: int = 1,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a convolutional unit, called with the input and a residual."""
        options = units.window(kernel_size, strides)
        if self.method.folded:
            options = {**options, "activation": activation, **self._folded()}
            return sbn.nnx.ConvNorm(in_features, out_features, **options)
        cls = {
            "norm_free": sbn.nnx.WSConv,
            "moving_average": sbn.nnx.CenteredConv,
        }.get(self.method.kind, nnx.Conv)
        conv = cls(in_features, out_features, **options, **self._linear())
        return self._unit("conv", conv, activation)

    def dense_norm(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a dense unit, called with the input and a residual."""
        if self.method.folded:
            options = {"activation": activation, **self._folded()}
            return sbn.nnx.DenseNorm(in_features, out_features, **options)
        cls = sbn.nnx.WSDense if self.method.kind == "norm_free" else nnx.Linear
        dense = cls(in_features, out_features, **self._linear())
        return self._unit("dense", dense, activation)

    def head(self, in_features: int, num_classes: int) -> nnx.Module:
        """Returns the dense layer that makes the logits."""
        return nnx.Linear(in_features, num_classes, dtype=self.dtype, rngs=self.rngs)

    def _unit(self, name: str, linear: Any, activation: Activation | None) -> Layer:
        in_features, out_features = linear.kernel.shape[-2:]
        kind = self.method.kind
        if kind == "kalman":
            norm = sbn.nnx.BatchNorm(out_features, **self._norm_options("batch"))
            virtual = units.num_virtual(linear.kernel.ndim)
            layer = sbn.nnx.KalmanNorm(
                linear, norm, num_virtual=virtual, rngs=self.rngs
            )
            return KalmanUnit(layer, activation)
        if kind == "norm_free":
            return NormFreeUnit(linear, activation)
        before = {name: linear, "norm": self._norm(out_features)}
        if kind == "ic":
            options = {"rate": units.IC_RATE, **self._norm_options("batch")}
            before = {"ic": sbn.nnx.IC(in_features, **options), name: linear}
        after: dict[str, Layer] = {}
        if self.method.shade:
            after["shade"] = sbn.nnx.Shade(out_features, weight=units.SHADE_WEIGHT)
        if kind == "filter_response" and activation is nnx.relu:
            after["tlu"] = sbn.nnx.TLU(out_features, dtype=self.dtype, rngs=self.rngs)
        elif (activate := units.fused(self.method, activation)) is not None:
            after["activation"] = activate
        return Unit(before, after)

    def _norm(self, features: int) -> Layer:
        match self.method.kind:
            case "none" | "ic":
                return jax.nn.identity
            case "flax":
                return nnx.BatchNorm(features, **self._norm_options("batch"))
            case "group":
                groups = units.num_groups(features)
                return nnx.GroupNorm(features, groups, dtype=self.dtype, rngs=self.rngs)
            case kind:
                cls = getattr(sbn.nnx, units.NORMS[kind][0])
                return cls(features, **self._norm_options(kind))

    def _linear(self) -> dict[str, Any]:
        options = {"dtype": self.dtype, "rngs": self.rngs}
        return {"use_bias": units.use_bias(self.method), **options}

    def _norm_options(self, kind: str) -> dict[str, Any]:
        options = {"dtype": self.dtype, **self.method.options, **units.NORMS[kind][1]}
        return {**options, "rngs": self.rngs}

    def _folded(self) -> dict[str, Any]:
        """Returns the options of a folded layer: those of its norm, and its class."""
        options = self._norm_options(self.method.kind)
        own, shared = units.split_options(self.method.kind, options)
        cls = getattr(sbn.nnx, units.NORMS[self.method.kind][0])
        return {**shared, "norm_cls": functools.partial(cls, **own)}


class Unit(nnx.Module):
    """Layers one by one, by name, with the residual between them."""

    def __init__(self, before: dict[str, Layer], after: dict[str, Layer]) -> None:
        for name, layer in {**before, **after}.items():
            setattr(self, name, layer)
        self.before, self.after = tuple(before), tuple(after)

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns ``after(before(x) + residual)``."""
        for name in self.before:
            x = getattr(self, name)(x)
        if residual is not None:
            x = x + residual
        for name in self.after:
            x = getattr(self, name)(x)
        return x


class KalmanUnit(nnx.Module):
    """A linear layer and its norm, which know the statistics of the layer before."""

    def __init__(self, layer: Layer, activation: Activation | None) -> None:
        self.layer, self.activation = layer, activation

    def __call__(
        self, x: jax.Array | Carried, residual: Carried | None = None
    ) -> Carried:
        """Returns ``activation(norm(linear(x)) + residual)``, and its statistics."""
        return units.join(self.layer(*units.split(x)), residual, self.activation)


class NormFreeUnit(nnx.Module):
    """A standardized linear layer; where there is a residual, the end of its branch."""

    def __init__(self, linear: Layer, activation: Activation | None) -> None:
        self.linear, self.activation = linear, activation
        self.skip_gain = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns the activated output, or residual and branch."""
        gain = self.skip_gain[...]
        return units.norm_free(self.linear(x), residual, gain, self.activation)
