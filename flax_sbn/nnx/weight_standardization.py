"""flax.nnx.Conv and Linear with standardized weights."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from flax_sbn.alternatives.weight_standardization import standardize_kernel
from flax_sbn.nnx.variables import with_kernel

# Not captured or tabulated a second time; see BatchNorm.
_conv_call, _linear_call = nnx.Conv.__call__, nnx.Linear.__call__


class WSConv(nnx.Conv):
    r"""Convolution with scaled weight standardization.

    .. math::
      y = \mathrm{conv}\Big(x,\ \mathit{gain} \cdot
      \frac{W - \mu}{\sqrt{\max(n v, 10^{-4})}}\Big) + \mathit{bias}

    with mean and variance of the ``n`` weights of each output feature; see
    :func:`flax_sbn.alternatives.standardize_kernel`. Parameters are ``kernel`` and
    ``bias``, as in :class:`flax.nnx.Conv`, and ``gain``, ``(C,)``. The weights are
    standardized before they are cast to ``dtype``.

    Args:
      in_features: number of input features ``I``.
      out_features: number of output features ``C``.
      kernel_size: extent of the window.
      gain_init: initializer of the gain.
      rngs: keys for the parameters.
      **options: those of :class:`flax.nnx.Conv`; keep the bias, since there is no norm
        to add one.

    Raises:
      ValueError: if the fan-in is one.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.WSConv(3, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.gain.shape
      ((4, 4, 4, 6), (6,))

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        gain_init: nnx.Initializer = nnx.initializers.ones,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, kernel_size, *args, rngs=rngs, **options
        )
        gain = gain_init(rngs.params(), (out_features,), self.param_dtype)
        self.gain = nnx.Param(gain)

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Applies the layer to ``(N, *spatial, I)``, as :class:`flax.nnx.Conv`."""
        kernel = standardize_kernel(self.kernel[...], self.gain[...], mask=self.mask)
        return _conv_call(with_kernel(self, kernel), inputs, *args, **options)


class WSDense(nnx.Linear):
    r"""Dense layer with scaled weight standardization.

    .. math::
      y = x \Big(\mathit{gain} \cdot \frac{W - \mu}{\sqrt{\max(n v, 10^{-4})}}\Big) +
      \mathit{bias}

    As :class:`WSConv`, for :class:`flax.nnx.Linear`.

    Args:
      in_features: number of input features ``I``.
      out_features: number of output features ``C``.
      gain_init: initializer of the gain.
      rngs: keys for the parameters.
      **options: those of :class:`flax.nnx.Linear`.

    Raises:
      ValueError: if the fan-in is one.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.WSDense(3, 6, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 3))).shape, layer.gain.shape
      ((4, 6), (6,))

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gain_init: nnx.Initializer = nnx.initializers.ones,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **options)
        gain = gain_init(rngs.params(), (out_features,), self.param_dtype)
        self.gain = nnx.Param(gain)

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Applies the layer to ``(*batch, I)``, as :class:`flax.nnx.Linear`."""
        kernel = standardize_kernel(self.kernel[...], self.gain[...])
        return _linear_call(with_kernel(self, kernel), inputs, *args, **options)
