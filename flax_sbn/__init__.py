"""Batch normalization from a small sample of the batch, for JAX and Flax.

The pure functions are here, the layers in :mod:`flax_sbn.linen` and
:mod:`flax_sbn.nnx`::

    import flax_sbn as sbn

    sbn.linen.BatchNorm(sampler=sbn.FeatureSampling(1 / 64))
"""

import warnings
from typing import Any

from flax_sbn import alternatives, linen, nnx, optim
from flax_sbn.activation import fused_relu, relu
from flax_sbn.augmentation import augment_batch, repeat_examples
from flax_sbn.folding import NormOptions, conv_norm, dense_norm, fold
from flax_sbn.lattice import LatticeSampling
from flax_sbn.modules.switching import SwitchedNorm, SwitchReport
from flax_sbn.normalization import batch_norm, normalize
from flax_sbn.renormalization import renormalize
from flax_sbn.sampling import (
    BatchSampling,
    CopySampling,
    FeatureSampling,
    MixedSampling,
    NaiveSampling,
    Sampler,
    VirtualSampling,
    num_measured,
)
from flax_sbn.statistics import (
    Statistics,
    batch_statistics,
    mix_statistics,
    update_running,
)
from flax_sbn.virtual import append_virtual, drop_virtual, virtual_samples
from flax_sbn.windows import Part, Windows

__version__ = "0.1.0"

__all__ = [
    "BatchSampling",
    "CopySampling",
    "FeatureSampling",
    "LatticeSampling",
    "MixedSampling",
    "NaiveSampling",
    "NormOptions",
    "Part",
    "Sampler",
    "Statistics",
    "SwitchReport",
    "SwitchedNorm",
    "VirtualSampling",
    "Windows",
    "alternatives",
    "append_virtual",
    "augment_batch",
    "batch_norm",
    "batch_statistics",
    "conv_norm",
    "dense_norm",
    "drop_virtual",
    "fold",
    "fused_relu",
    "linen",
    "mix_statistics",
    "nnx",
    "normalize",
    "num_measured",
    "optim",
    "relu",
    "renormalize",
    "repeat_examples",
    "update_running",
    "virtual_samples",
]


def __getattr__(name: str) -> Any:
    if name == "repeat_rows":
        warnings.warn(
            "flax_sbn.repeat_rows is now called repeat_examples.",
            DeprecationWarning,
            stacklevel=2,
        )
        return repeat_examples
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
