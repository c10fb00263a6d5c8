"""The independent-component (IC) layer for NNX."""

from typing import Any

import jax
from flax import nnx

from flax_sbn.nnx.batch_norm import BatchNorm


class IC(nnx.Module):
    r"""Independent-component layer: batch norm, then dropout.

    .. math::
      y = \mathrm{dropout}(\mathrm{norm}(x))

    Put it before a convolution or linear layer, after the activation: ReLU, IC,
    convolution. Evaluation (``model.eval()``) normalizes with the running statistics
    and drops nothing. In training :class:`flax.nnx.Dropout` draws from the rng stream
    ``'dropout'``, and a sampler from ``'sampling'``, both forked from ``rngs`` when the
    layer is made. The two layers are the attributes ``norm`` and ``dropout``.

    Args:
      num_features: number of features ``C``.
      rate: probability that a value is dropped; the others are divided by ``1 - rate``.
      use_running_average: evaluation, of both layers.
      rngs: keys for the parameters, the stream ``'dropout'`` and, for samplers that
        draw, ``'sampling'`` (or a default stream).
      **options: those of :class:`BatchNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if ``rate`` is outside [0, 1), and as :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.IC(6, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> y = layer(x)
      >>> y.shape, bool(0.03 < (y == 0).mean() < 0.07)
      ((32, 8, 8, 6), True)
      >>> layer.eval()
      >>> bool((layer(x) == 0).any())
      False

    Source: Chen et al., "Rethinking the Usage of Batch Normalization and Dropout in the
    Training of Deep Neural Networks", arXiv 1905.05928.
    """

    def __init__(
        self,
        num_features: int,
        *,
        rate: float = 0.05,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if not 0 <= rate < 1:
            raise ValueError(
                f"Expected rate in [0, 1), got {rate=}. It is the share of values that "
                "are dropped."
            )
        self.norm = BatchNorm(
            num_features, use_running_average=use_running_average, rngs=rngs, **options
        )
        self.dropout = nnx.Dropout(rate, deterministic=use_running_average, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer; called as :class:`BatchNorm`. Evaluation drops nothing."""
        y = self.norm(x, use_running_average, mask=mask)
        return self.dropout(y, deterministic=use_running_average)
