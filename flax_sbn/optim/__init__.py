"""Transformations of gradients, for optax."""

from flax_sbn.optim.preconditioning import (
    BatchNormPreconditioningState,
    InputStatistics,
    batch_norm_preconditioning,
    input_statistics,
    precondition_gradients,
)

__all__ = [
    "BatchNormPreconditioningState",
    "InputStatistics",
    "batch_norm_preconditioning",
    "input_statistics",
    "precondition_gradients",
]
