"""flax.linen.Conv with a batch norm folded into it."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax
from flax import linen as nn

from flax_sbn.linear_layers import Extents, Padding
from flax_sbn.linen.linear_norm import LinearNorm


class ConvNorm(LinearNorm):
    r"""Convolution, batch norm, residual and activation, for the price of a bias.

    .. math::
      y = \mathrm{activation}(\mathrm{norm}(\mathrm{conv}(x)) + \mathit{residual})

    With a sampler, the norm is folded into the kernel and bias of the convolution (see
    :func:`flax_sbn.conv_norm`): the normalized tensor is never written, and output and
    gradients stay the same. With ``sampler=None`` training runs an ordinary
    :class:`flax.linen.Conv` and :class:`BatchNorm`. At evaluation the running
    statistics are folded, with or without a sampler.

    Parameters are ``conv/kernel``, ``norm/scale`` and ``norm/bias``, running statistics
    ``norm/mean`` and ``norm/var``, float32 whatever the compute dtype: those of modules
    named ``conv`` and ``norm``. Samplers that draw positions take keys from the rng
    stream ``'sampling'``, or from ``'params'`` where it is missing.

    Attributes:
      features: number of output features. This and all fields up to ``mask`` are as in
        :class:`flax.linen.Conv`.
      kernel_size: extent of the window.
      strides: of the window.
      padding: any of Flax's.
      input_dilation: of the input.
      kernel_dilation: of the kernel.
      feature_group_count: number of groups of features.
      mask: of the kernel's entries.
      use_running_average: normalize with the running statistics (evaluation). This and
        all fields up to ``force_float32_reductions`` are as in
        :class:`flax.linen.BatchNorm`.
      momentum: decay rate of the running statistics.
      epsilon: added to the variance.
      norm_bias: whether the norm has a bias. The convolution has none, and its
        ``use_bias`` is refused, as is ``use_scale``.
      norm_scale: whether the norm has a scale.
      bias_init: initializer of the norm's bias.
      scale_init: initializer of the norm's scale.
      axis_name: devices that pool their statistics.
      axis_index_groups: groups of them.
      use_fast_variance: measure in one pass, with ``sampler=None``.
      force_float32_reductions: reduce in float32, with ``sampler=None``.
      dtype: dtype of the computation and the output.
      param_dtype: dtype of the parameters.
      precision: of the convolution.
      kernel_init: initializer of the kernel.
      conv_general_dilated: the convolution to use.
      conv_general_dilated_cls: makes the convolution to use; the norm is not folded
        into that.
      sampler: which positions of the output are measured in training; None measures
        all of them, and does not fold.
      running_weight: how far a step's statistics are moved towards the running ones
        before normalizing, in [0, 1]; see :func:`flax_sbn.renormalize`. None for the
        default of ``norm_cls``.
      rng_collection: name of the rng stream that positions are drawn from.
      norm_cls: the norm: :class:`BatchNorm`, or a class derived from it, such as
        :class:`BatchRenorm`; set its other options with :func:`functools.partial`.
      activation: applied last, or None. :func:`flax.linen.relu` is replaced by
        :func:`flax_sbn.relu`, the same function, which stays fused.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or an option is refused.
      ValueError: if the sampler does not fit the output, a residual has another shape,
        or the rng stream is missing and needed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn, flax_sbn as sbn
      >>> layer = sbn.linen.ConvNorm(
      ...     6, (3, 3), use_running_average=False, activation=nn.relu,
      ...     sampler=sbn.FeatureSampling(1 / 16),
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 3))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> rngs = {"sampling": jax.random.key(2)}
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
      >>> y.shape, jax.tree.map(jnp.shape, variables["params"]["conv"])
      ((32, 8, 8, 6), {'kernel': (3, 3, 3, 6)})

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """

    linear_name = "conv"
    linear_cls = nn.Conv

    features: int
    kernel_size: int | Sequence[int]
    strides: Extents = 1
    padding: Padding = "SAME"
    input_dilation: Extents = 1
    kernel_dilation: Extents = 1
    feature_group_count: int = 1
    mask: jax.Array | None = None
    conv_general_dilated: Any = field(default=None, kw_only=True)
    conv_general_dilated_cls: Any = field(default=None, kw_only=True)
