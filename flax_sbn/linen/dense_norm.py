"""flax.linen.Dense with a batch norm folded into it."""

from collections.abc import Callable
from dataclasses import InitVar, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from jax.typing import DTypeLike

from flax_sbn.activation import Activation, fused
from flax_sbn.folding import refuse_options
from flax_sbn.linen.batch_norm import BatchNorm
from flax_sbn.linen.linear_norm import has_bias, linear_norm
from flax_sbn.sampling import Sampler


class DenseNorm(nn.Module):
    r"""Dense layer, batch norm, residual and activation, for the price of a bias.

    .. math::
      y = \mathrm{activation}(\mathrm{norm}(\mathrm{dense}(x)) + \mathit{residual})

    As :class:`ConvNorm`, with a dense layer: see there. Parameters are
    ``dense/kernel``, ``norm/scale`` and ``norm/bias``. Without spatial axes
    FeatureSampling does not apply; use BatchSampling.

    Attributes:
      features: number of output features.
      use_running_average: evaluation, as all up to ``force_float32_reductions`` in
        :class:`flax.linen.BatchNorm`.
      momentum: decay rate of the running statistics.
      epsilon: added to the variance.
      norm_bias: whether the norm has a bias. The dense layer has none, and its
        ``use_bias`` is refused, as is ``use_scale``.
      norm_scale: whether the norm has a scale.
      bias_init: initializer of the norm's bias.
      scale_init: initializer of the norm's scale.
      axis_name: devices that pool their statistics.
      axis_index_groups: groups of them.
      use_fast_variance: with ``sampler=None``, one pass.
      force_float32_reductions: with ``sampler=None``.
      dtype: dtype of the computation and the output.
      param_dtype: dtype of the parameters.
      precision: of the product, as the rest in :class:`flax.linen.Dense`.
      kernel_init: initializer of the kernel.
      dot_general: the product to use.
      dot_general_cls: makes the product to use.
      sampler: which rows of the output are measured in training; None measures all of
        them, and does not fold.
      running_weight: how far a step's statistics are moved towards the running ones
        before they normalize, in [0, 1]; see :func:`flax_sbn.renormalize`. None for
        what is the default of ``norm_cls``.
      rng_collection: name of the rng stream that positions are drawn from.
      norm_cls: the norm: :class:`BatchNorm`, or a class derived from it, such as
        :class:`BatchRenorm`; further options of it with :func:`functools.partial`.
      activation: applied last, or None; see :class:`ConvNorm`.

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

    features: int
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    norm_bias: bool = True
    norm_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = default_kernel_init
    dot_general: Any = None
    dot_general_cls: Any = None
    sampler: Sampler | None = None
    running_weight: float | None = None
    rng_collection: str = "sampling"
    norm_cls: Callable[..., BatchNorm] = BatchNorm
    activation: Activation | None = None
    use_bias: InitVar[None] = field(default=None, kw_only=True)
    use_scale: InitVar[None] = field(default=None, kw_only=True)

    def __post_init__(self, use_bias: None = None, use_scale: None = None) -> None:
        refuse_options(use_bias=use_bias, use_scale=use_scale)
        self.activation = fused(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer; in training also updates the running statistics.

        Args:
          x: ``(N, *spatial, I)``.
          residual: added before the activation, of the output's shape; cast to its
            dtype.
          use_running_average: normalize with the running statistics (evaluation).
          mask: booleans that broadcast to the output: False is not measured.

        Returns:
          ``(N, *spatial, features)``.
        """
        dense = nn.Dense(
            self.features,
            use_bias=has_bias(self, "dense"),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            dot_general=self.dot_general,
            dot_general_cls=self.dot_general_cls,
            name="dense",
        )
        kernel_shape = (x.shape[-1], self.features)
        return linear_norm(
            self, dense, kernel_shape, x, residual, use_running_average, mask
        )
