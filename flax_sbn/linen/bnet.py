"""BNET as a Linen layer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.depthwise import depthwise_affine, identity_kernel
from flax_sbn.linen.batch_norm import BatchNorm, shared_options
from flax_sbn.sampling import Sampler


class BNET(nn.Module):
    r"""Batch norm whose linear part looks at the neighbours of a value, too.

    With :math:`*` a convolution of each feature with a window of its own:

    .. math::
      y = \mathit{kernel} * \frac{x - \mu}{\sqrt{v + \epsilon}} + \mathit{bias}

    Input and output are ``(N, *spatial, C)``. Parameters are ``kernel``,
    ``(*kernel_size, 1, C)``, and ``bias``; the running statistics are those of a
    :class:`BatchNorm` named ``norm``. It starts as batch norm, from a kernel that is
    one at its centre.

    Attributes:
      kernel_size: extent of the window on each spatial axis; 3 on each of two is the
        paper's BNET-3. An int is for a single axis, as in :class:`flax.linen.Conv`.
      bias_init: initializer of the bias.
      kernel_init: initializer of the kernel.
      **options: all others are those of :class:`BatchNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if ``kernel_size`` does not have one entry for each spatial axis of
        the input, and as :class:`BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.BNET((3, 3), use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape, jax.tree.map(jnp.shape, variables["params"])
      ((32, 8, 8, 6), {'bias': (6,), 'kernel': (3, 3, 1, 6)})

    Source: Xu et al., "BNET: Batch Normalization With Enhanced Linear Transformation",
    arXiv 2011.14150. The start as batch norm is ours.
    """

    kernel_size: int | Sequence[int] = (3, 3)
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    bias_init: Initializer = nn.initializers.zeros
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    kernel_init: Callable[..., jax.Array] = identity_kernel
    sampler: Sampler | None = None
    running_weight: float = 0.0
    ghost_groups: int = 1
    rng_collection: str = "sampling"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer to ``(N, *spatial, C)``; called as :class:`BatchNorm`."""
        options = shared_options(self, BatchNorm) | {
            "use_bias": False,
            "use_scale": False,
        }
        y = BatchNorm(**options, name="norm")(x, use_running_average, mask=mask)

        window = self.kernel_size
        window = (window,) if isinstance(window, int) else tuple(window)
        features = x.shape[-1]
        kernel = self.param(
            "kernel", self.kernel_init, (*window, 1, features), self.param_dtype
        )
        bias = self.param("bias", self.bias_init, (features,), self.param_dtype)
        return depthwise_affine(y, kernel, bias, dtype=self.dtype)
