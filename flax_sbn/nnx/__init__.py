"""Layers for :mod:`flax.nnx`: state and names; the arithmetic is in the functions."""

from flax_sbn.nnx.batch_norm import BatchNorm

__all__ = ["BatchNorm"]
