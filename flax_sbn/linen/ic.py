"""The independent-component (IC) layer for Linen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.linen.batch_norm import BatchNorm, shared_options
from flax_sbn.linen.variables import evaluates
from flax_sbn.sampling import Sampler


class IC(nn.Module):
    r"""Independent-component layer: batch norm, then dropout.

    .. math::
      y = \mathrm{dropout}(\mathrm{norm}(x))

    Put it before a convolution or dense layer, after the activation: ReLU, IC,
    convolution. There is one switch, ``use_running_average``: evaluation normalizes
    with the running statistics and drops nothing. In training
    :class:`flax.linen.Dropout` draws from the rng stream ``'dropout'``, and a sampler
    from ``'sampling'``. Parameters and statistics are those of a :class:`BatchNorm`
    named ``norm``.

    Attributes:
      rate: probability that a value is dropped; the others are divided by ``1 - rate``.
      **options: ``use_running_average`` and all that follow it, those of
        :class:`BatchNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if ``rate`` is outside [0, 1), and as :class:`BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.IC(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> rngs = {"dropout": jax.random.key(2)}
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
      >>> y.shape, bool(0.03 < (y == 0).mean() < 0.07)
      ((32, 8, 8, 6), True)

    Source: Chen et al., "Rethinking the Usage of Batch Normalization and Dropout in the
    Training of Deep Neural Networks", arXiv 1905.05928.
    """

    rate: float = 0.05
    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    sampler: Sampler | None = None
    running_weight: float = 0.0
    ghost_groups: int = 1
    rng_collection: str = "sampling"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer; called as :class:`BatchNorm`. Evaluation drops nothing."""
        if not 0 <= self.rate < 1:
            raise ValueError(
                f"Expected rate in [0, 1), got rate={self.rate!r}. It is the share of "
                "values that are dropped."
            )
        evaluate = evaluates(self.use_running_average, use_running_average)
        options = shared_options(self, BatchNorm) | {"use_running_average": evaluate}
        y = BatchNorm(**options, name="norm")(x, mask=mask)
        # Nothing is drawn in `init`, so that it needs no stream but 'params'.
        return nn.Dropout(self.rate, name="dropout")(
            y, deterministic=evaluate or self.is_initializing()
        )
