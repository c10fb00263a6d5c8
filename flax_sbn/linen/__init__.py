"""Layers for :mod:`flax.linen`: state and names; the arithmetic is in the functions."""

from flax_sbn.linen.batch_norm import BatchNorm
from flax_sbn.linen.batch_renorm import BatchRenorm
from flax_sbn.linen.conv_norm import ConvNorm
from flax_sbn.linen.dense_norm import DenseNorm
from flax_sbn.linen.export import fold_variables

__all__ = ["BatchNorm", "BatchRenorm", "ConvNorm", "DenseNorm", "fold_variables"]
