"""Layers for :mod:`flax.linen`: state and names; the arithmetic is in the functions."""

from flax_sbn.linen.batch_norm import BatchNorm
from flax_sbn.linen.batch_renorm import BatchRenorm
from flax_sbn.linen.batchless import BatchlessNorm
from flax_sbn.linen.bnet import BNET
from flax_sbn.linen.conv_norm import ConvNorm
from flax_sbn.linen.conversion import to_folded_layers, to_plain_layers
from flax_sbn.linen.dense_norm import DenseNorm
from flax_sbn.linen.diminishing import DiminishingBatchNorm
from flax_sbn.linen.estimation import estimate_statistics
from flax_sbn.linen.export import fold_variables
from flax_sbn.linen.filter_response import TLU, FilterResponseNorm
from flax_sbn.linen.ic import IC
from flax_sbn.linen.input_statistics import apply_with_inputs
from flax_sbn.linen.kalman import KalmanNorm
from flax_sbn.linen.l1 import L1BatchNorm
from flax_sbn.linen.mixture import MixtureNorm
from flax_sbn.linen.moving_average import CenteredConv, MovingAverageBatchNorm
from flax_sbn.linen.norm_free import NormFreeBlock
from flax_sbn.linen.range_norm import RangeBatchNorm
from flax_sbn.linen.shade import Shade
from flax_sbn.linen.switching import sample_norms, switch_report
from flax_sbn.linen.weight_standardization import WSConv, WSDense

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
    "MixtureNorm",
    "MovingAverageBatchNorm",
    "NormFreeBlock",
    "RangeBatchNorm",
    "Shade",
    "WSConv",
    "WSDense",
    "apply_with_inputs",
    "estimate_statistics",
    "fold_variables",
    "sample_norms",
    "switch_report",
    "to_folded_layers",
    "to_plain_layers",
]
