"""Batch norm that counts its training steps, for what changes with them."""

import inspect

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_sbn.linen.batch_norm import BatchNorm
from flax_sbn.statistics import Statistics

# Not wrapped a second time; see BatchNorm.
_batch_norm_call = inspect.unwrap(BatchNorm.__call__)


class CountingBatchNorm(BatchNorm):
    """:class:`BatchNorm` with the number of training steps so far, ``step``, int32."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; see :class:`BatchNorm`."""
        self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        return _batch_norm_call(self, x, use_running_average, mask=mask)

    @nn.nowrap
    def _num_steps(self) -> jax.Array:
        """Returns the number of training steps so far."""
        assert self.scope is not None
        scope = self.scope.rewound()  # `__call__` asks for it, too
        return scope.variable("batch_stats", "step", jnp.zeros, (), jnp.int32).value

    @nn.nowrap
    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step, and counts this one."""
        super()._keep(running)
        self.put_variable("batch_stats", "step", self._num_steps() + 1)
