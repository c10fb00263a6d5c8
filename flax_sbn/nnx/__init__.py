"""Layers for :mod:`flax.nnx`: state and names; the arithmetic is in the functions."""

from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.batch_renorm import BatchRenorm
from flax_sbn.nnx.batchless import BatchlessNorm, initialize_batchless
from flax_sbn.nnx.bnet import BNET
from flax_sbn.nnx.conv_norm import ConvNorm
from flax_sbn.nnx.dense_norm import DenseNorm
from flax_sbn.nnx.diminishing import DiminishingBatchNorm
from flax_sbn.nnx.estimation import estimate_statistics
from flax_sbn.nnx.export import fold_model
from flax_sbn.nnx.filter_response import TLU, FilterResponseNorm
from flax_sbn.nnx.ic import IC
from flax_sbn.nnx.input_statistics import call_with_inputs
from flax_sbn.nnx.kalman import KalmanNorm
from flax_sbn.nnx.l1 import L1BatchNorm
from flax_sbn.nnx.loss import Loss
from flax_sbn.nnx.mixture import MixtureNorm
from flax_sbn.nnx.moving_average import (
    CenteredConv,
    MovingAverageBatchNorm,
    OverwriteWithGradient,
)
from flax_sbn.nnx.norm_free import NormFreeBlock
from flax_sbn.nnx.range_norm import RangeBatchNorm
from flax_sbn.nnx.shade import Shade
from flax_sbn.nnx.switching import plain_norms, sample_norms, switch_report
from flax_sbn.nnx.weight_standardization import WSConv, WSDense

__all__ = [
    "BNET",
    "IC",
    "TLU",
    "BatchNorm",
    "BatchRenorm",
    "BatchlessNorm",
    "CenteredConv",
    "ConvNorm",
    "DenseNorm",
    "DiminishingBatchNorm",
    "FilterResponseNorm",
    "KalmanNorm",
    "L1BatchNorm",
    "Loss",
    "MixtureNorm",
    "MovingAverageBatchNorm",
    "NormFreeBlock",
    "OverwriteWithGradient",
    "RangeBatchNorm",
    "Shade",
    "WSConv",
    "WSDense",
    "call_with_inputs",
    "estimate_statistics",
    "fold_model",
    "initialize_batchless",
    "plain_norms",
    "sample_norms",
    "switch_report",
]
