"""flax.nnx.Conv with a batch norm folded into it."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from flax_sbn.activation import Activation, fused
from flax_sbn.linear_layers import Extents
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.linear_norm import LinearNorm, split_options
from flax_sbn.sampling import Sampler


class ConvNorm(LinearNorm):
    r"""Convolution, batch norm, residual and activation, for the price of a bias.

    .. math::
      y = \mathrm{activation}(\mathrm{norm}(\mathrm{conv}(x)) + \mathit{residual})

    With a sampler, the norm is folded into the kernel and bias of the convolution (see
    :func:`flax_sbn.conv_norm`): the normalized tensor is never written, and output and
    gradients stay the same. With ``sampler=None`` training runs an ordinary
    :class:`flax.nnx.Conv` and :class:`BatchNorm`. At evaluation the running statistics
    are folded, with or without a sampler.

    The two layers are the attributes ``conv`` and ``norm``.

    Args:
      in_features: number of input features ``I``.
      out_features: number of output features ``C``.
      kernel_size: extent of the window.
      strides: of the window.
      sampler: which positions of the output are measured in training; None measures
        all of them, and does not fold.
      activation: applied last, or None. :func:`flax.nnx.relu` is replaced by
        :func:`flax_sbn.relu`, the same function, which stays fused.
      norm_cls: the norm: :class:`BatchNorm`, or a class derived from it, such as
        :class:`BatchRenorm`; set its other options with :func:`functools.partial`.
      rngs: keys for the parameters and, for samplers that draw, the stream
        ``'sampling'`` (or a default stream); see :class:`BatchNorm`.
      **options: those of :class:`flax.nnx.Conv`, without a bias, and of
        :class:`flax.nnx.BatchNorm`, but no ``axis`` and no ``promote_dtype``;
        ``running_weight`` and ``rng_collection``, see :class:`BatchNorm`. Whether the
        norm has a bias and a scale is ``norm_bias`` and ``norm_scale``: ``use_bias``
        and ``use_scale`` are refused.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or an option is refused.
      ValueError: if the sampler does not fit the output, a residual has another shape,
        or the rng stream is missing and needed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.ConvNorm(
      ...     3, 6, (3, 3), sampler=sbn.FeatureSampling(1 / 16), activation=nnx.relu,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> y = layer(jax.random.normal(jax.random.key(0), (32, 8, 8, 3)))
      >>> y.shape, bool((layer.norm.var[...] != 1).all())
      ((32, 8, 8, 6), True)
      >>> layer.eval()
      >>> layer(jnp.ones((1, 8, 8, 3))).shape
      (1, 8, 8, 6)

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """

    linear_name = "conv"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Extents = 1,
        *,
        sampler: Sampler | None = None,
        activation: Activation | None = None,
        norm_cls: Callable[..., BatchNorm] = BatchNorm,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        conv, norm = split_options(options)
        self.conv = nnx.Conv(
            in_features, out_features, kernel_size, strides, **conv, rngs=rngs
        )
        self.norm = nnx.data(norm_cls(out_features, sampler=sampler, rngs=rngs, **norm))
        self.activation = fused(activation)
