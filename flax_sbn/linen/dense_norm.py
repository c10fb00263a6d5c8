"""flax.linen.Dense with a batch norm folded into it."""

from dataclasses import field
from typing import Any

from flax import linen as nn

from flax_sbn.linen.linear_norm import LinearNorm


class DenseNorm(LinearNorm):
    r"""Dense layer, batch norm, residual and activation, for the price of a bias.

    .. math::
      y = \mathrm{activation}(\mathrm{norm}(\mathrm{dense}(x)) + \mathit{residual})

    As :class:`ConvNorm`, with a dense layer: see there. Parameters are
    ``dense/kernel``, ``norm/scale`` and ``norm/bias``. Without spatial axes
    FeatureSampling raises an error, and LatticeSampling measures the whole batch, so
    that nothing is folded; use BatchSampling.

    Attributes:
      features: number of output features.
      precision: of the product. This and all fields up to ``dot_general_cls`` are as in
        :class:`flax.linen.Dense`.
      kernel_init: initializer of the kernel.
      dot_general: the product to use.
      dot_general_cls: makes the product to use; the norm is not folded into that.
      **options: of the norm and its fold, and ``activation``: as in
        :class:`ConvNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or an option is refused.
      ValueError: if the sampler does not fit the output, a residual has another shape,
        or the rng stream is missing and needed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn, flax_sbn as sbn
      >>> layer = sbn.linen.DenseNorm(
      ...     6, use_running_average=False, activation=nn.relu,
      ...     sampler=sbn.BatchSampling(16),
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (128, 3))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> rngs = {"sampling": jax.random.key(2)}
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
      >>> y.shape, jax.tree.map(jnp.shape, variables["params"]["dense"])
      ((128, 6), {'kernel': (3, 6)})

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """

    linear_name = "dense"
    linear_cls = nn.Dense

    features: int
    dot_general: Any = field(default=None, kw_only=True)
    dot_general_cls: Any = field(default=None, kw_only=True)
