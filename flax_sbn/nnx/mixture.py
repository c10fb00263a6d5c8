"""Mixture normalization, as an NNX layer."""

from typing import Any

import jax
from flax import nnx

from flax_sbn.alternatives.mixture import Mixture, MixtureHooks, initial_mixture
from flax_sbn.nnx.variables import Normalizer, evaluates, scale_and_bias


class MixtureNorm(MixtureHooks, Normalizer):
    r"""Normalizes by the modes of the batch: a mixture of normal distributions.

    .. math::
      y_i = \mathit{scale} \cdot \sum_k \frac{\nu_{ik}}{\sqrt{\lambda_k}}
      \frac{x_i - \mu_k}{\sqrt{v_k + \epsilon}} + \mathit{bias}

    In training the mixture is fitted to the feature vectors of the batch, starting from
    the running mixture. At evaluation the running mixture is used. See
    :func:`flax_sbn.alternatives.mixture_norm`. The running state is ``weight``,
    ``(K,)``, ``mean`` and ``var``, ``(K, C)``, and ``step``. Nothing is drawn at
    random.

    Args:
      num_features: number of features ``C``.
      use_running_average: normalize with the running mixture (evaluation).
      momentum: decay rate of the running mixture; the first batch replaces it.
      epsilon: added to the variances.
      axis_name: devices that fit one mixture.
      num_components: the number of components ``K``; 1 is batch norm.
      num_steps: steps of expectation maximization for each batch, at least 1.
      rngs: keys for the parameters.
      **options: ``axis``, ``dtype``, ``param_dtype``, ``use_bias``, ``use_scale``,
        ``bias_init`` and ``scale_init``, as in :class:`flax.nnx.BatchNorm`.

    Raises:
      ValueError: if ``axis`` is out of range, the input has another number of features,
        or ``num_components`` or ``num_steps`` is below 1.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.MixtureNorm(6, num_components=2, rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (8, 8, 8, 6)))
      >>> y.shape, layer.weight.shape, layer.mean.shape, int(layer.step[...])
      ((8, 8, 8, 6), (2,), (2, 6), 1)

    Source: Kalayeh & Shah, "Training Faster by Separating Modes of Variation in
    Batch-normalized Models", arXiv 1806.02892. The formulation is ours.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        axis_name: str | tuple[str, ...] | None = None,
        num_components: int = 3,
        num_steps: int = 2,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.use_running_average, self.epsilon = use_running_average, epsilon
        self.axis_name, self.momentum, self.num_steps = axis_name, momentum, num_steps
        initial = initial_mixture(num_components, (num_features,))
        self.step, self.weight, self.mean, self.var = map(nnx.BatchStat, initial)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; as :class:`BatchNorm`, with masks ``(N, *spatial, 1)``."""
        evaluate = evaluates(self, use_running_average)
        affine = scale_and_bias(self)
        state = (self.step, self.weight, self.mean, self.var)
        running = Mixture(*(variable[...] for variable in state))
        y, updated = self._normalize(x, running, affine, mask, evaluate=evaluate)
        if not evaluate:
            for variable, value in zip(state, updated, strict=True):
                variable[...] = value
        return y
