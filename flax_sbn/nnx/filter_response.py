"""Filter response normalization and its activation, as NNX layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.filter_response import filter_response_norm, tlu
from flax_sbn.nnx.variables import Normalizer, scale_and_bias


class FilterResponseNorm(Normalizer):
    r"""Filter response normalization: each feature map by its root mean square.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot \frac{x}{\sqrt{\nu^2 + |\epsilon|}} + \mathit{bias} \\
      \nu^2 &= \mathrm{mean}_{HW}(x^2)
      \end{aligned}

    See :func:`flax_sbn.alternatives.filter_response_norm`. There are no running
    statistics and no difference between training and evaluation. The paper's layer is
    this one followed by :class:`TLU`, in the place of batch normalization and ReLU.

    Args:
      num_features: number of features ``C``.
      epsilon: its absolute value is added to the mean square.
      learn_epsilon: learn one epsilon for each feature in place of ``epsilon``; for
        maps of a single value, of which little but the sign is left otherwise.
      epsilon_init: where a learned epsilon starts.
      rngs: keys for the parameters.
      **options: ``axis``, ``dtype``, ``param_dtype``, ``use_bias``, ``use_scale``,
        ``bias_init`` and ``scale_init``, as in :class:`flax.nnx.BatchNorm`.

    Raises:
      ValueError: if ``axis`` is out of range, or the input has another number of
        features.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.FilterResponseNorm(6, rngs=nnx.Rngs(0))
      >>> layer(jax.random.normal(jax.random.key(0), (4, 8, 8, 6))).shape
      (4, 8, 8, 6)

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        learn_epsilon: bool = False,
        epsilon_init: float = 1e-4,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.epsilon = (
            nnx.Param(jnp.full(num_features, epsilon_init, self.param_dtype))
            if learn_epsilon
            else epsilon
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``x``, ``(N, *spatial, C)``, or with features at ``axis``."""
        epsilon = self.epsilon
        return filter_response_norm(
            x,
            *scale_and_bias(self),
            axis=self.axis,
            epsilon=epsilon[...] if isinstance(epsilon, nnx.Param) else epsilon,
            dtype=self.dtype,
        )


class TLU(nnx.Module):
    r"""Thresholded linear unit: a ReLU with a learned threshold.

    .. math::
      y = \max(x, \tau)

    Args:
      num_features: number of features ``C``.
      axis: the feature axis.
      dtype: dtype of the result; by default that of input and threshold promoted.
      param_dtype: dtype of the threshold.
      threshold_init: initializer of the threshold; zeros start as a ReLU.
      rngs: keys for the threshold.

    Raises:
      ValueError: if ``axis`` is out of range, or the input has another number of
        features.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.TLU(6, rngs=nnx.Rngs(0))
      >>> bool((layer(-jnp.ones((4, 6))) == 0).all())
      True

    Source: Singh & Krishnan, "Filter Response Normalization Layer", arXiv 1911.09737.
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        threshold_init: Initializer = initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.axis, self.dtype = axis, dtype
        self.threshold = nnx.Param(
            threshold_init(rngs.params(), (num_features,), param_dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Cuts ``x`` off, ``(N, *spatial, C)``, or with features at ``axis``."""
        return tlu(x, self.threshold[...], axis=self.axis, dtype=self.dtype)
