"""Layers for :mod:`flax.nnx`: state and names; the arithmetic is in the functions."""

from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.batch_renorm import BatchRenorm
from flax_sbn.nnx.conv_norm import ConvNorm
from flax_sbn.nnx.dense_norm import DenseNorm
from flax_sbn.nnx.export import fold_model

__all__ = ["BatchNorm", "BatchRenorm", "ConvNorm", "DenseNorm", "fold_model"]
