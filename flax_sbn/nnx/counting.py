"""Batch norm that counts its training steps, for what changes with them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.statistics import Statistics


class CountingBatchNorm(BatchNorm):
    """:class:`BatchNorm` with the number of training steps so far, ``step``, int32."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _num_steps(self) -> jax.Array:
        """Returns the number of training steps so far."""
        return self.step[...]

    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step, and counts this one."""
        super()._keep(running)
        self.step[...] += 1
