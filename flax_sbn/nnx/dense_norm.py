"""flax.nnx.Linear with a batch norm folded into it."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_sbn.activation import Activation, fused
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.linear_norm import LinearNorm, split_options
from flax_sbn.sampling import Sampler


class DenseNorm(LinearNorm):
    r"""Dense layer, batch norm, residual and activation, for the price of a bias.

    .. math::
      y = \mathrm{activation}(\mathrm{norm}(\mathrm{dense}(x)) + \mathit{residual})

    As :class:`ConvNorm`, with a dense layer: see there. The two layers are the
    attributes ``dense`` and ``norm``. Without spatial axes FeatureSampling raises an
    error, and LatticeSampling measures the whole batch, so that nothing is folded; use
    BatchSampling.

    Args:
      in_features: number of input features ``I``.
      out_features: number of output features ``C``.
      sampler: which examples are measured in training; None measures all of them, and
        does not fold.
      activation: applied last, or None; see :class:`ConvNorm`.
      norm_cls: the norm; see :class:`ConvNorm`.
      rngs: keys for the parameters and, for samplers that draw, the stream
        ``'sampling'`` (or a default stream); see :class:`BatchNorm`.
      **options: those of :class:`flax.nnx.Linear`, without a bias, and of the norm; see
        :class:`ConvNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or an option is refused.
      ValueError: if the sampler does not fit the output, a residual has another shape,
        or the rng stream is missing and needed.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.DenseNorm(
      ...     3, 6, sampler=sbn.BatchSampling(16), activation=nnx.relu, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jax.random.normal(jax.random.key(0), (128, 3))).shape
      (128, 6)

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """

    linear_name = "dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sampler: Sampler | None = None,
        activation: Activation | None = None,
        norm_cls: Callable[..., BatchNorm] = BatchNorm,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        dense, norm = split_options(options)
        self.dense = nnx.Linear(in_features, out_features, **dense, rngs=rngs)
        self.norm = nnx.data(norm_cls(out_features, sampler=sampler, rngs=rngs, **norm))
        self.activation = fused(activation)
