"""What linen models are built of: the only place where a method becomes layers."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

import flax_sbn as sbn
from harness.methods import Method
from models import units
from models.units import Activation, Carried, Layer

# Layers by name, made when they are called with it.
Makers = tuple[tuple[str, Layer], ...]


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
        kernel_size: int | tuple[int, ...],
        strides: int = 1,
        activation: Activation | None = None,
    ) -> Layer:
        """Returns a convolutional unit, called with the input and a residual."""
        if self.method.folded:
            return sbn.linen.ConvNorm(
                features,
                activation=activation,
                **units.window(kernel_size, strides),
                **self._folded(),
            )
        conv = functools.partial(self.conv, features, kernel_size, strides)
        return self._unit(ConvNorm, conv, features, activation)

    def dense_norm(self, features: int, activation: Activation | None = None) -> Layer:
        """Returns a dense unit, called with the input and a residual."""
        if self.method.folded:
            return sbn.linen.DenseNorm(
                features, activation=activation, **self._folded()
            )
        cls = sbn.linen.WSDense if self.method.kind == "norm_free" else nn.Dense
        use_bias = units.use_bias(self.method)
        dense = functools.partial(cls, features, use_bias, dtype=self.dtype)
        return self._unit(DenseNorm, dense, features, activation)

    def conv(
        self,
        features: int,
        kernel_size: int | tuple[int, ...],
        strides: int = 1,
        name: str | None = None,
    ) -> nn.Module:
        """Returns a convolution alone."""
        cls = {
            "norm_free": sbn.linen.WSConv,
            "moving_average": sbn.linen.CenteredConv,
        }.get(self.method.kind, nn.Conv)
        return cls(
            features,
            **units.window(kernel_size, strides),
            use_bias=units.use_bias(self.method),
            dtype=self.dtype,
            name=name,
        )

    def norm(self, features: int, name: str | None = None) -> Layer:
        """Returns a norm alone."""
        match self.method.kind:
            case "none" | "ic":
                return jax.nn.identity
            case "flax":
                return nn.BatchNorm(**self._norm_options("batch"), name=name)
            case "group":
                groups = units.num_groups(features)
                return nn.GroupNorm(groups, dtype=self.dtype, name=name)
            case kind:
                cls = getattr(sbn.linen, units.NORMS[kind][0])
                return cls(**self._norm_options(kind), name=name)

    def head(self, num_classes: int) -> nn.Module:
        """Returns the dense layer that makes the logits."""
        return nn.Dense(num_classes, dtype=self.dtype)

    def _unit(
        self,
        cls: "type[_Unit]",
        linear: Layer,
        features: int,
        activation: Activation | None,
    ) -> Layer:
        kind = self.method.kind
        name = cls.linear_name
        if kind == "kalman":
            norm = functools.partial(sbn.linen.BatchNorm, **self._norm_options("batch"))
            return KalmanUnit(linear, norm, activation)
        if kind == "norm_free":
            return NormFreeUnit(linear, activation)
        before: Makers = (
            (name, linear),
            ("norm", functools.partial(self.norm, features)),
        )
        after: Makers = ()
        if kind == "ic":
            options = {"rate": units.IC_RATE, **self._norm_options("batch")}
            ic = functools.partial(sbn.linen.IC, **options)
            before = (("ic", ic), (name, linear))
        if self.method.shade:
            options = {"use_running_average": not self.train}
            shade = functools.partial(
                sbn.linen.Shade, weight=units.SHADE_WEIGHT, **options
            )
            after = (("shade", shade),)
        if kind == "filter_response" and activation is nn.relu:
            after = (
                *after,
                ("tlu", functools.partial(sbn.linen.TLU, dtype=self.dtype)),
            )
        elif activation is not None:
            activate = units.fused(self.method, activation)
            after = (*after, ("activation", lambda name: activate))
        return cls(before, after)

    def _norm_options(self, kind: str) -> dict[str, Any]:
        options = {"dtype": self.dtype, **self.method.options, **units.NORMS[kind][1]}
        if kind not in units.STATELESS:
            options["use_running_average"] = not self.train
        return options

    def _folded(self) -> dict[str, Any]:
        """Returns the options of a folded layer: those of its norm, and its class."""
        options = self._norm_options(self.method.kind)
        own, shared = units.split_options(self.method.kind, options)
        cls = getattr(sbn.linen, units.NORMS[self.method.kind][0])
        return {**shared, "norm_cls": functools.partial(cls, **own)}


class _Unit(nn.Module):
    """Layers one by one, with the residual between them.

    Attributes:
      before: what comes before the residual is added.
      after: what comes after.
    """

    before: Makers
    after: Makers
    linear_name: ClassVar[str]

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns ``after(before(x) + residual)``."""
        for name, make in self.before:
            x = make(name=name)(x)
        if residual is not None:
            x = x + residual
        for name, make in self.after:
            x = make(name=name)(x)
        return x


# Flax names a layer after its class: these are those of the library's folded layers.
class ConvNorm(_Unit):
    """The layers and names of :class:`flax_sbn.linen.ConvNorm`, not folded."""

    linear_name = "conv"


class DenseNorm(_Unit):
    """The layers and names of :class:`flax_sbn.linen.DenseNorm`, not folded."""

    linear_name = "dense"


class KalmanUnit(nn.Module):
    """A linear layer and its norm, which know the statistics of the layer before.

    Attributes:
      linear: makes the linear layer.
      norm: makes the norm.
      activation: of the sum; None for none.
    """

    linear: Layer
    norm: Layer
    activation: Activation | None

    @nn.compact
    def __call__(
        self, x: jax.Array | Carried, residual: Carried | None = None
    ) -> Carried:
        """Returns ``activation(norm(linear(x)) + residual)``, and its statistics."""
        layer = sbn.linen.KalmanNorm(
            self.linear(name="linear"),
            self.norm(name="norm"),
            num_virtual=units.num_virtual(units.value_of(x).ndim),
        )
        return units.join(layer(*units.split(x)), residual, self.activation)


class NormFreeUnit(nn.Module):
    """A standardized linear layer; where there is a residual, the end of its branch.

    Attributes:
      linear: makes the linear layer.
      activation: of the output.
    """

    linear: Layer
    activation: Activation | None

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Returns the activated output, or residual and branch."""
        y = self.linear(name="linear")(x)
        gain = None
        if residual is not None:
            gain = self.param("skip_gain", nn.initializers.ones, ())
        return units.norm_free(y, residual, gain, self.activation)
