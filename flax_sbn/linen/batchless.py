"""Batchless normalization as a Linen layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.batchless import (
    batchless_init,
    batchless_nll,
    batchless_norm,
)
from flax_sbn.linen.variables import evaluates, scale_and_bias
from flax_sbn.statistics import Axis, feature_shape


class BatchlessNorm(nn.Module):
    r"""Normalization with a mean and a scale that are parameters.

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{\sqrt{e^{2 \rho} + \epsilon}} +
      \mathit{bias}

    The parameters ``mean`` and ``log_scale`` (:math:`\mu` and :math:`\rho`) get their
    gradient from :func:`flax_sbn.alternatives.batchless_nll` alone, which the layer
    sows in training as ``'nll'`` into the collection ``'losses'``. Make that collection
    mutable, and add its sum to the loss; otherwise the two parameters never change.
    Evaluation computes the same and sows nothing.

    ``init`` sets both parameters to the statistics of the batch it is given, layer by
    layer: give it real images. A feature that does not vary in it, as in an array of
    zeros, starts with a scale of one.

    Attributes:
      use_running_average: sow nothing (evaluation). There is no average: the name is
        that of Flax's batch normalization.
      axis: the feature axis or axes.
      epsilon: added to the variance.
      dtype: dtype of the result; by default that of the input and parameters.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale after the normalization.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.

    Raises:
      ValueError: if ``axis`` is out of range or ``epsilon`` is negative.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.BatchlessNorm(use_running_average=False)
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (32, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> list(variables), sorted(variables["params"])
      (['params'], ['bias', 'log_scale', 'mean', 'scale'])
      >>> y, updates = layer.apply(variables, x[:1], mutable=["losses"])
      >>> nll = sum(jax.tree.leaves(updates["losses"]))  # to be added to the loss
      >>> y.shape, nll.shape
      ((1, 6), ())

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729. The
    ``epsilon`` is ours.
    """

    use_running_average: bool | None = None
    axis: Axis = -1
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; called as :class:`BatchNorm`. In training sows the loss."""
        evaluate = evaluates(self.use_running_average, use_running_average)
        features = feature_shape(x.shape, self.axis)
        options: dict[str, Any] = {"axis": self.axis, "epsilon": self.epsilon}

        def measured(key: jax.Array, i: int) -> jax.Array:
            start = batchless_init(x, mask=mask, **options)[i]
            return start.astype(self.param_dtype)

        mean = self.param("mean", measured, 0)
        log_scale = self.param("log_scale", measured, 1)
        affine = scale_and_bias(self, features)

        if not (evaluate or self.is_initializing()):
            nll = batchless_nll(x, mean, log_scale, mask=mask, **options)
            self.sow("losses", "nll", nll)
        return batchless_norm(x, mean, log_scale, *affine, dtype=self.dtype, **options)
