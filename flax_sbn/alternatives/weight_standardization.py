"""Scaled weight standardization, and activations that keep the variance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import ArrayLike

from flax_sbn.activation import Activation
from flax_sbn.alternatives.moving_average import center_kernel
from flax_sbn.moments import wide


def standardize_kernel(
    kernel: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    epsilon: float = 1e-4,
) -> jax.Array:
    r"""Gives each output feature's weights mean zero and variance one over the fan-in.

    With mean :math:`\mu` and variance :math:`v` of the :math:`n` weights that lead to
    one output feature:

    .. math::
      \hat W = \mathit{gain} \cdot \frac{W - \mu}{\sqrt{\max(n v, \epsilon)}}

    Inputs of mean square one, independent of each other, then give outputs of variance
    :math:`\mathit{gain}^2`, whatever the mean of the inputs.

    Args:
      kernel: ``(*window, I, C)``, as in Flax: the last axis is the outputs', and the
        fan-in :math:`n` the extent of all others. With feature groups ``I`` is the
        inputs of one group.
      gain: ``(C,)``, or None for one.
      mask: of the kernel's shape: weights that are False or zero stay zero and count
        neither in the statistics nor in the fan-in.
      epsilon: the least that :math:`n v` counts as; it keeps constant weights finite.

    Returns:
      An array of the shape of ``kernel``, in the dtype of ``kernel`` and ``gain``
      promoted. The arithmetic is in float32 or wider.

    Raises:
      ValueError: if the fan-in is one, where the result would always be zero, or
        ``gain`` or ``mask`` has another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> kernel = jax.random.uniform(jax.random.key(0), (3, 3, 16, 8))
      >>> kernel = sbn.alternatives.standardize_kernel(kernel)
      >>> bool(jnp.allclose(kernel.mean((0, 1, 2)), 0, atol=1e-6))
      True
      >>> bool(jnp.allclose(kernel.var((0, 1, 2)), 1 / (3 * 3 * 16)))
      True

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692. The mask is ours.
    """
    kernel = jnp.asarray(kernel)
    if gain is not None and jnp.shape(gain) != kernel.shape[-1:]:
        raise ValueError(
            f"Expected gain of shape {kernel.shape[-1:]} for a kernel of shape "
            f"{kernel.shape}, got gain of shape {jnp.shape(gain)}."
        )
    y = center_kernel(wide(kernel), mask=mask)
    squares = jnp.square(y).sum(range(y.ndim - 1), keepdims=True)
    y *= lax.rsqrt(jnp.maximum(squares, epsilon))
    if gain is not None:
        y *= jnp.broadcast_to(jnp.asarray(gain), y.shape)
    return y.astype(canonicalize_dtype(kernel, gain))


def activation_gain(activation: Activation) -> float:
    r"""Returns what to multiply an activation with, to give its output variance one.

    .. math::
      \begin{aligned}
      \gamma &= \mathrm{Var}\,[\mathrm{activation}(z)]^{-1/2} \\
      z &\sim \mathcal{N}(0, 1)
      \end{aligned}

    It is integrated numerically on the host, outside of whatever is traced, to about
    eight digits if the activation is smooth but at whole numbers.

    Args:
      activation: an elementwise function.

    Returns:
      The gain :math:`\gamma`: for a ReLU :math:`\sqrt{2 / (1 - 1 / \pi)}`.

    Raises:
      ValueError: if the activation is constant, not finite, or not elementwise.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> for activation in (jax.nn.relu, jax.nn.silu, jax.nn.gelu):
      ...     print(f"{sbn.alternatives.activation_gain(activation):.3f}")
      1.713
      1.787
      1.701

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692. The quadrature is ours; the numbers
    in use elsewhere for SiLU and GELU, 1.7881 and 1.7015, are up to 0.05% larger.
    """
    # Panels end at whole numbers, where the kinks of the usual activations are.
    nodes, weights = np.polynomial.legendre.leggauss(16)
    x = np.arange(-12, 12)[:, None] + (nodes + 1) / 2
    density = weights / 2 * np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)
    with jax.enable_x64(True):
        # Compiled ahead, so that it runs at once, also within another function's trace.
        y = np.asarray(jax.jit(activation).lower(x).compile()(x), np.float64)
    if y.shape != x.shape:
        raise ValueError(
            f"Expected an elementwise activation, got {activation=}, which makes shape "
            f"{y.shape} of {x.shape}."
        )
    var = (density * np.square(y - (density * y).sum())).sum()
    if not 1e-12 < var < math.inf:
        raise ValueError(
            f"Expected an activation of positive, finite variance, got {activation=} "
            f"of variance {var} for normal inputs."
        )
    return float(var**-0.5)


@functools.lru_cache
def scaled(activation: Activation) -> Activation:
    r"""Returns ``activation`` times its gain: normal inputs give variance one.

    .. math::
      y = \gamma \cdot \mathrm{activation}(x)

    Args:
      activation: an elementwise function; see :func:`activation_gain`.

    Returns:
      A function of an array, the same one at each call, so that modules that hold it
      compare equal. Shape and dtype of its result are the activation's.

    Raises:
      ValueError: see :func:`activation_gain`.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> relu = sbn.alternatives.scaled(jax.nn.relu)
      >>> y = relu(jax.random.normal(jax.random.key(0), (1000, 100)))
      >>> bool(abs(y.var() - 1) < 0.05)
      True

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """
    gain = activation_gain(activation)
    return lambda x: gain * activation(x)
