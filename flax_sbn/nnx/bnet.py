"""BNET as an NNX layer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.depthwise import depthwise_affine, identity_kernel
from flax_sbn.nnx.batch_norm import BatchNorm


class BNET(nnx.Module):
    r"""Batch norm whose linear part looks at the neighbours of a value, too.

    With :math:`*` a convolution of each feature with a window of its own:

    .. math::
      y = \mathit{kernel} * \frac{x - \mu}{\sqrt{v + \epsilon}} + \mathit{bias}

    Input and output are ``(N, *spatial, C)``. Parameters are ``kernel``,
    ``(*kernel_size, 1, C)``, and ``bias``; the running statistics are those of the
    :class:`BatchNorm` that is the attribute ``norm``. It starts as batch norm, from a
    kernel that is one at its centre.

    Args:
      num_features: number of features ``C``.
      kernel_size: extent of the window on each spatial axis; 3 on each of two is the
        paper's BNET-3. An int is for a single axis, as in :class:`flax.nnx.Conv`.
      dtype: dtype of the result.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      rngs: keys for the parameters, and see :class:`BatchNorm`.
      **options: those of :class:`BatchNorm`, but no ``axis``, scale or bias.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if ``kernel_size`` does not have one entry for each spatial axis of
        the input, and as :class:`BatchNorm`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.BNET(6, (3, 3), rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (32, 8, 8, 6)))
      >>> y.shape, layer.kernel.shape, bool((layer.norm.var[...] != 1).all())
      ((32, 8, 8, 6), (3, 3, 1, 6), True)

    Source: Xu et al., "BNET: Batch Normalization With Enhanced Linear Transformation",
    arXiv 2011.14150. The start as batch norm is ours.
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., jax.Array] = identity_kernel,
        bias_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.norm = BatchNorm(
            num_features,
            axis=-1,
            use_bias=False,
            use_scale=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )
        window = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
        shape = (*window, 1, num_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype))
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer to ``(N, *spatial, C)``; called as :class:`BatchNorm`."""
        y = self.norm(x, use_running_average, mask=mask)
        kernel, bias = self.kernel[...], self.bias[...]
        return depthwise_affine(y, kernel, bias, dtype=self.dtype)
