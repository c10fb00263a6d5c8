"""Mixture normalization, as a Linen layer."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.mixture import MixtureHooks, initial_mixture
from flax_sbn.linen.variables import (
    evaluates,
    keep_state,
    running_state,
    scale_and_bias,
)
from flax_sbn.statistics import Axis, feature_shape


class MixtureNorm(MixtureHooks, nn.Module):
    r"""Normalizes by the modes of the batch: a mixture of normal distributions.

    .. math::
      y_i = \mathit{scale} \cdot \sum_k \frac{\nu_{ik}}{\sqrt{\lambda_k}}
      \frac{x_i - \mu_k}{\sqrt{v_k + \epsilon}} + \mathit{bias}

    In training the mixture is fitted to the feature vectors of the batch, starting from
    the running mixture. At evaluation the running mixture is used. See
    :func:`flax_sbn.alternatives.mixture_norm`. The running state is ``weight``,
    ``(K,)``, ``mean`` and ``var``, ``(K, C)``, and ``step``. Nothing is drawn at
    random.

    Attributes:
      use_running_average: normalize with the running mixture (evaluation).
      axis: the feature axis or axes.
      momentum: decay rate of the running mixture; the first batch replaces it.
      epsilon: added to the variances.
      dtype: dtype of the result; by default that of input and parameters promoted.
      param_dtype: dtype of the parameters.
      use_bias: whether a bias is added.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: devices that fit one mixture.
      num_components: the number of components ``K``; 1 is batch norm.
      num_steps: steps of expectation maximization for each batch, at least 1.

    Raises:
      ValueError: if ``axis`` is out of range, or ``num_components`` or ``num_steps`` is
        below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.MixtureNorm(num_components=2)
      >>> x = jax.random.normal(jax.random.key(0), (8, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"]
      ... )
      >>> shapes = jax.tree.map(jnp.shape, updates["batch_stats"])
      >>> y.shape, shapes["weight"], shapes["mean"], shapes["var"]
      ((8, 8, 8, 6), (2,), (2, 6), (2, 6))

    Source: Kalayeh & Shah, "Training Faster by Separating Modes of Variation in
    Batch-normalized Models", arXiv 1806.02892. The formulation is ours.
    """

    use_running_average: bool | None = None
    axis: Axis = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | tuple[str, ...] | None = None
    num_components: int = 3
    num_steps: int = 2

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; as :class:`BatchNorm`, with masks ``(N, *spatial, 1)``."""
        evaluate = evaluates(self.use_running_average, use_running_average)
        evaluate = evaluate or self.is_initializing()
        features = feature_shape(x.shape, self.axis)
        affine = scale_and_bias(self, features)
        running = running_state(self, initial_mixture(self.num_components, features))
        y, updated = self._normalize(x, running, affine, mask, evaluate=evaluate)
        if not evaluate:
            keep_state(self, updated)
        return y
