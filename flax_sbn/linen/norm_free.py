"""A residual block without normalization, for Linen."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_sbn.activation import Activation, relu
from flax_sbn.alternatives.norm_free import norm_free_residual
from flax_sbn.alternatives.weight_standardization import scaled
from flax_sbn.linen.weight_standardization import WSConv


class NormFreeBlock(nn.Module):
    r"""Residual block of two convolutions, without normalization.

    With :math:`f` the activation times its gain:

    .. math::
      \begin{aligned}
      z &= f(x / \beta) \\
      y &= x + \alpha \cdot \mathit{skip\_gain} \cdot
      \mathrm{conv}_2(f(\mathrm{conv}_1(z)))
      \end{aligned}

    Where the strides or the number of features change, a 1 x 1 convolution of ``z``
    takes the place of ``x``. All convolutions are :class:`WSConv`, the submodules
    ``conv1``, ``conv2`` and, if needed, ``shortcut``; the parameter ``skip_gain`` is a
    scalar. For other branches see
    :func:`flax_sbn.alternatives.norm_free_residual`.

    Attributes:
      features: number of output features ``C``.
      kernel_size: extent of both windows.
      strides: of the first convolution and the shortcut.
      beta: expected standard deviation of the input; see
        :func:`flax_sbn.alternatives.expected_std`.
      alpha: factor of the branch.
      activation: elementwise, not yet scaled.
      conv: makes the convolutions; ``functools.partial(WSConv, dtype=...)`` sets any
        option.
      skip_gain_init: initializer of the gain of the branch.

    Raises:
      ValueError: if branch and input differ in shape. Choose a ``conv`` whose padding
        keeps the shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.ones((4, 8, 8, 16))
      >>> for beta in sbn.alternatives.expected_std([3]):
      ...     block = sbn.linen.NormFreeBlock(16, beta=beta)
      ...     x, variables = block.init_with_output(jax.random.key(0), x)
      >>> x.shape, sorted(variables["params"])
      ((4, 8, 8, 16), ['conv1', 'conv2', 'skip_gain'])

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """

    features: int
    kernel_size: Sequence[int] = (3, 3)
    strides: int | Sequence[int] = 1
    beta: float = 1.0
    alpha: float = 0.2
    activation: Activation = relu
    conv: Callable[..., nn.Module] = WSConv
    skip_gain_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``(N, *spatial, I)``."""
        activation = scaled(self.activation)
        window, unit = tuple(self.kernel_size), (1,) * len(self.kernel_size)
        conv1 = self.conv(self.features, window, strides=self.strides, name="conv1")
        conv2 = self.conv(self.features, window, name="conv2")
        shortcut = None
        if np.max(self.strides) > 1 or x.shape[-1] != self.features:
            shortcut = self.conv(
                self.features, unit, strides=self.strides, name="shortcut"
            )
        return norm_free_residual(
            x,
            lambda z: conv2(activation(conv1(z))),
            shortcut,
            skip_gain=self.param("skip_gain", self.skip_gain_init, (), jnp.float32),
            activation=activation,
            beta=self.beta,
            alpha=self.alpha,
        )
