"""A residual block without normalization, for NNX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_sbn.activation import Activation, relu
from flax_sbn.alternatives.norm_free import norm_free_residual
from flax_sbn.alternatives.weight_standardization import scaled
from flax_sbn.nnx.weight_standardization import WSConv


class NormFreeBlock(nnx.Module):
    r"""Residual block of two convolutions, without normalization.

    With :math:`f` the activation times its gain:

    .. math::
      \begin{aligned}
      z &= f(x / \beta) \\
      y &= x + \alpha \cdot \mathit{skip\_gain} \cdot
      \mathrm{conv}_2(f(\mathrm{conv}_1(z)))
      \end{aligned}

    Where the strides or the number of features change, a 1 x 1 convolution of ``z``
    takes the place of ``x``. All convolutions are :class:`WSConv`, the attributes
    ``conv1``, ``conv2`` and, if needed, ``shortcut``; the parameter ``skip_gain`` is a
    scalar. For other branches see
    :func:`flax_sbn.alternatives.norm_free_residual`.

    Args:
      in_features: number of input features ``I``.
      out_features: number of output features ``C``.
      kernel_size: extent of both windows.
      strides: of the first convolution and the shortcut.
      beta: expected standard deviation of the input; see
        :func:`flax_sbn.alternatives.expected_std`.
      alpha: factor of the branch.
      activation: elementwise, not yet scaled.
      conv: makes the convolutions; ``functools.partial(WSConv, dtype=...)`` sets any
        option.
      skip_gain_init: initializer of the gain of the branch.
      rngs: keys for the parameters.

    Raises:
      ValueError: if branch and input differ in shape. Choose a ``conv`` whose padding
        keeps the shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> rngs = nnx.Rngs(0)
      >>> stage = nnx.Sequential(*[
      ...     sbn.nnx.NormFreeBlock(16, 16, beta=beta, rngs=rngs)
      ...     for beta in sbn.alternatives.expected_std([3])
      ... ])
      >>> stage(jnp.ones((4, 8, 8, 16))).shape
      (4, 8, 8, 16)

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: Sequence[int] = (3, 3),
        strides: int | Sequence[int] = 1,
        beta: float = 1.0,
        alpha: float = 0.2,
        activation: Activation = relu,
        conv: Callable[..., nnx.Module] = WSConv,
        skip_gain_init: nnx.Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        window, unit = tuple(kernel_size), (1,) * len(kernel_size)
        self.conv1 = conv(in_features, out_features, window, strides=strides, rngs=rngs)
        self.conv2 = conv(out_features, out_features, window, rngs=rngs)
        self.shortcut: Any = nnx.data(None)
        if np.max(strides) > 1 or in_features != out_features:
            self.shortcut = conv(
                in_features, out_features, unit, strides=strides, rngs=rngs
            )
        self.skip_gain = nnx.Param(skip_gain_init(rngs.params(), (), jnp.float32))
        self.activation, self.beta, self.alpha = activation, beta, alpha

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``(N, *spatial, I)``."""
        activation = scaled(self.activation)
        return norm_free_residual(
            x,
            lambda z: self.conv2(activation(self.conv1(z))),
            self.shortcut,
            skip_gain=self.skip_gain[...],
            activation=activation,
            beta=self.beta,
            alpha=self.alpha,
        )
