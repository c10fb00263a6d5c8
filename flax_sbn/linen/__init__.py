"""Layers for :mod:`flax.linen`: state and names; the arithmetic is in the functions."""

from flax_sbn.linen.batch_norm import BatchNorm

__all__ = ["BatchNorm"]
