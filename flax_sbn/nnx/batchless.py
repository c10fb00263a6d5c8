"""Batchless normalization as an NNX layer, and its start from data."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_sbn.alternatives.batchless import (
    batchless_init,
    batchless_nll,
    batchless_norm,
)
from flax_sbn.nnx.loss import sow_loss
from flax_sbn.nnx.variables import Normalizer, evaluates, scale_and_bias


class BatchlessNorm(Normalizer):
    r"""Normalization with a mean and a scale that are parameters.

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu}{\sqrt{e^{2 \rho} + \epsilon}} +
      \mathit{bias}

    The parameters ``mean`` and ``log_scale`` (:math:`\mu` and :math:`\rho`) get their
    gradient from :func:`flax_sbn.alternatives.batchless_nll` alone, which the layer
    sows in training as a :class:`Loss`. Collect it with ``nnx.capture``, and add the
    sum to the loss; otherwise the two parameters never change. Evaluation computes the
    same and sows nothing.

    Both parameters start from zero; :func:`initialize_batchless` sets them in a whole
    network to what they are on a batch.

    Args:
      num_features: number of features ``C``.
      use_running_average: sow nothing (evaluation). There is no average: the name is
        that of Flax's batch normalization, which ``model.eval()`` sets.
      epsilon: added to the variance.
      rngs: keys for the parameters.
      **options: ``axis``, ``dtype``, ``param_dtype``, ``use_bias``, ``use_scale``,
        ``bias_init`` and ``scale_init``, as in :class:`flax.nnx.BatchNorm`.

    Raises:
      ValueError: if ``axis`` is out of range or ``epsilon`` is negative.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.BatchlessNorm(6, rngs=nnx.Rngs(0))
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (32, 6))
      >>> y = sbn.nnx.initialize_batchless(layer, x)
      >>> bool(abs(y.mean(0)).max() < 1e-3), bool(abs(y.std(0) - 1).max() < 1e-3)
      (True, True)
      >>> y, losses = nnx.capture(layer, sbn.nnx.Loss)(x[:1])
      >>> y.shape, sum(jax.tree.leaves(losses)).shape
      ((1, 6), ())

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729. The
    ``epsilon`` is ours.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        epsilon: float = 1e-5,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        zeros = jnp.zeros(num_features, self.param_dtype)
        self.mean, self.log_scale = nnx.Param(zeros), nnx.Param(zeros)
        self.use_running_average, self.epsilon = use_running_average, epsilon
        self.initializing = False

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; called as :class:`BatchNorm`. In training sows the loss."""
        evaluate = evaluates(self, use_running_average)
        options: dict[str, Any] = {"axis": self.axis, "epsilon": self.epsilon}
        if self.initializing:
            mean, log_scale = batchless_init(x, mask=mask, **options)
            self.mean[...] = mean.astype(self.mean.dtype)
            self.log_scale[...] = log_scale.astype(self.log_scale.dtype)
        mean, log_scale = self.mean[...], self.log_scale[...]
        if not (evaluate or self.initializing):
            nll = batchless_nll(x, mean, log_scale, mask=mask, **options)
            sow_loss(self, "nll", nll)
        affine = scale_and_bias(self)
        return batchless_norm(x, mean, log_scale, *affine, dtype=self.dtype, **options)


def initialize_batchless(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """Sets every :class:`BatchlessNorm` of a network to the statistics of a batch.

    One forward pass, in which each layer is set before it normalizes: deeper layers see
    normalized inputs. Whatever else a call changes, such as running averages, changes.

    Args:
      model: the network, or a layer.
      *args: what it is called with: a batch of real images.
      **kwargs: likewise.

    Returns:
      What the call returns.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     sbn.nnx.BatchlessNorm(3, rngs=rngs),
      ...     nnx.Linear(3, 4, rngs=rngs),
      ...     sbn.nnx.BatchlessNorm(4, rngs=rngs),
      ... )
      >>> x = 5 + jax.random.normal(jax.random.key(0), (64, 3))
      >>> y = sbn.nnx.initialize_batchless(model, x)
      >>> bool(abs(y.mean(0)).max() < 1e-3), bool(abs(y.std(0) - 1).max() < 1e-2)
      (True, True)

    Source: Berger & Uc Cetina, "Batchless Normalization: How to Normalize Activations
    Across Instances with Minimal Memory Requirements", arXiv 2212.14729.
    """
    model.set_attributes(BatchlessNorm, initializing=True)
    try:
        return model(*args, **kwargs)
    finally:
        model.set_attributes(BatchlessNorm, initializing=False)
