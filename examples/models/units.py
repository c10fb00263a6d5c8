"""What linen and nnx units share: how a method becomes options of layers.

A unit is a convolution or dense layer, what normalizes it, the residual and the
activation: ``conv_norm(features, kernel_size, strides, activation)(x, residual)`` is
``activation(norm(conv(x)) + residual)``. Folded methods compute it at once, all others
one layer after the other, in parameters and statistics of the same names. Without a
norm the convolution has a bias instead. Windows are padded symmetrically. The units are
in :mod:`models.linen_units` and :mod:`models.nnx_units`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

import flax_sbn as sbn
from flax_sbn.alternatives.schedules import Ramp
from harness.methods import Method

Activation = Callable[[jax.Array], jax.Array]
Layer = Callable[..., Any]

KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Running averages of a training of some hundred steps need a short memory.
_BATCH_NORM: dict[str, Any] = {"momentum": 0.9, "epsilon": 1e-5}
# The layers that follow a convolution or dense layer, by kind of method, and what they
# are told besides; schedules are those of the papers, for some hundred steps.
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("BatchNorm", _BATCH_NORM),
    "renorm": (
        "BatchRenorm",
        {
            **_BATCH_NORM,
            "r_max": Ramp(50, 200, 1.0, 3.0),
            "d_max": Ramp(50, 150, 0.0, 5.0),
        },
    ),
    "diminishing": ("DiminishingBatchNorm", {"epsilon": 1e-5}),
    "l1": ("L1BatchNorm", _BATCH_NORM),
    "range": ("RangeBatchNorm", _BATCH_NORM),
    "bnet": ("BNET", _BATCH_NORM),
    "mixture": ("MixtureNorm", _BATCH_NORM),
    "moving_average": ("MovingAverageBatchNorm", {"renorm_warmup": 200}),
    "batchless": ("BatchlessNorm", {}),
    "filter_response": ("FilterResponseNorm", {}),
}
# Kinds whose layers behave otherwise in training.
STATELESS = {"filter_response"}
BRANCH_FACTOR = 0.2  # of a residual branch without a norm
SHADE_WEIGHT = 1e-4
IC_RATE = 0.05


class Carried(NamedTuple):
    """An activation, and the statistics that its layer hands on to the next."""

    value: jax.Array
    statistics: sbn.Statistics


def split(x: jax.Array | Carried) -> tuple[jax.Array, sbn.Statistics | None]:
    """Returns an activation and its statistics; an image has none."""
    return (x.value, x.statistics) if isinstance(x, Carried) else (x, None)


def num_virtual(rank: int) -> int:
    """Returns how many synthetic examples predict statistics; one if they are maps."""
    return 1 if rank > 2 else 64


def value_of(x: jax.Array | Carried) -> jax.Array:
    """Returns an activation alone."""
    return x.value if isinstance(x, Carried) else x


def on_value(
    function: Callable[[jax.Array], jax.Array], x: jax.Array | Carried
) -> jax.Array | Carried:
    """Returns what a function makes of an activation; its statistics stay."""
    if isinstance(x, Carried):
        return Carried(function(x.value), x.statistics)
    return function(x)


def join(
    layer: tuple[jax.Array, sbn.Statistics],
    residual: Carried | None,
    activation: Activation | None,
) -> Carried:
    """Adds a residual to what a layer gives, statistics too, and activates it."""
    y, statistics = layer
    if residual is not None:
        y = y + residual.value
        statistics = sbn.alternatives.add_statistics(statistics, residual.statistics)
    return Carried(y if activation is None else activation(y), statistics)


def use_bias(method: Method) -> bool:
    """Whether linear layers have a bias, as no norm behind them does."""
    return method.kind in {"none", "ic", "norm_free"}


def split_options(
    kind: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options that only the norm of this kind has, and the others."""
    own = {name for name in NORMS[kind][1] if name not in _BATCH_NORM}
    return (
        {name: options[name] for name in options if name in own},
        {name: options[name] for name in options if name not in own},
    )


def fused(method: Method, activation: Activation | None) -> Activation | None:
    """Gives networks without a norm, the limit of folded ones, the same ReLU."""
    return sbn.relu if method.kind == "none" and activation is nn.relu else activation


def norm_free(
    y: jax.Array,
    residual: jax.Array | None,
    gain: jax.Array | None,
    activation: Activation | None,
) -> jax.Array:
    """Activates the output of a standardized layer, or of the branch that it ends.

    The residual stream is activated, too, as in the networks with norms. There the
    activation is not scaled: positive values would grow from block to block. Branches
    start with a gain of one instead of zero, for training runs of some hundred steps.
    """
    if residual is not None and gain is not None:
        y = residual + BRANCH_FACTOR * gain.astype(y.dtype) * y
    elif activation is not None:
        activation = sbn.alternatives.scaled(activation)
    return y if activation is None else activation(y)


def window(kernel_size: int | tuple[int, ...], strides: int) -> dict[str, Any]:
    """Returns the options of a convolution; one number is that of an image's axes."""
    sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    return {
        "kernel_size": sizes,
        "strides": strides,
        "padding": [(size // 2, size // 2) for size in sizes],
        "kernel_init": KERNEL_INIT,
    }


def num_groups(features: int) -> int:
    """Returns Wu and He's 32 groups, or for narrow layers 8, if they divide."""
    return math.gcd(features, 32 if features >= 256 else 8)
