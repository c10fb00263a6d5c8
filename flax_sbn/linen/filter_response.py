"""Filter response normalization and its activation, as Linen layers."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.alternatives.filter_response import filter_response_norm, tlu
from flax_sbn.linen.variables import scale_and_bias
from flax_sbn.statistics import Axis, feature_shape


class FilterResponseNorm(nn.Module):
    r"""Filter response normalization: each feature map by its root mean square.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x}{\sqrt{\nu^2 + |\epsilon|}} + \mathit{bias} \\
      \nu^2 &= \mathrm{mean}_{HW}(x^2)
      \end{aligned}

    See :func:`flax_sbn.alternatives.filter_response_norm`. There are no running
    statistics and no difference between training and evaluation. The paper's layer is
    this one followed by :class:`TLU`, in the place of batch normalization and ReLU.

    Attributes:
      axis: the feature axis or axes.
      epsilon: its absolute value is added to the mean square.
      learn_epsilon: learn one epsilon for each feature in place of ``epsilon``; for
        maps of a single value, of which little but the sign is left otherwise.
      dtype: dtype of the result; by default that of input and parameters promoted.
      param_dtype: dtype of the parameters.
      use_bias: whether a bias is added.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      epsilon_init: where a learned epsilon starts.

    Raises:
      ValueError: if ``axis`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.FilterResponseNorm()
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
      >>> y, variables = layer.init_with_output(jax.random.key(1), x)
      >>> y.shape, jax.tree.map(jnp.shape, variables)
      ((4, 8, 8, 6), {'params': {'bias': (6,), 'scale': (6,)}})

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    """

    axis: Axis = -1
    epsilon: float = 1e-6
    learn_epsilon: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    epsilon_init: float = 1e-4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``x``, ``(N, *spatial, C)``, or with features at ``axis``."""
        features = feature_shape(x.shape, self.axis)
        scale, bias = scale_and_bias(self, features)
        epsilon: ArrayLike = self.epsilon
        if self.learn_epsilon:
            init = nn.initializers.constant(self.epsilon_init)
            epsilon = self.param("epsilon", init, features, self.param_dtype)
        return filter_response_norm(
            x, scale, bias, axis=self.axis, epsilon=epsilon, dtype=self.dtype
        )


class TLU(nn.Module):
    r"""Thresholded linear unit: a ReLU with a learned threshold.

    .. math::
      y = \max(x, \tau)

    Attributes:
      axis: the feature axis or axes.
      dtype: dtype of the result; by default that of input and threshold promoted.
      param_dtype: dtype of the threshold.
      threshold_init: initializer of the threshold; zeros start as a ReLU.

    Raises:
      ValueError: if ``axis`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.TLU()
      >>> y, variables = layer.init_with_output(jax.random.key(0), -jnp.ones((4, 6)))
      >>> bool((y == 0).all()), jax.tree.map(jnp.shape, variables)
      (True, {'params': {'threshold': (6,)}})

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    """

    axis: Axis = -1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    threshold_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Cuts ``x`` off, ``(N, *spatial, C)``, or with features at ``axis``."""
        features = feature_shape(x.shape, self.axis)
        threshold = self.param(
            "threshold", self.threshold_init, features, self.param_dtype
        )
        return tlu(x, threshold, axis=self.axis, dtype=self.dtype)
