"""Residual blocks that need no norm, as their variance is known in advance."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_sbn.activation import Activation


def expected_std(blocks: Sequence[int], *, alpha: float = 0.2) -> tuple[float, ...]:
    r"""Returns the standard deviation of each block's input at initialization.

    It is one before the first block, and each block adds its branch's variance:

    .. math::
      \beta_{l + 1} = \sqrt{\beta_l^2 + \alpha^2}

    In each further stage the first block's shortcut is a convolution of its activated
    input, which starts from one again: :math:`\beta_{l + 1} = \sqrt{1 + \alpha^2}`.

    Args:
      blocks: number of blocks of each stage.
      alpha: factor of the branches.

    Returns:
      :math:`\beta_l` of all blocks, of one stage after the other: what
      :func:`norm_free_residual` divides by.

    Raises:
      ValueError: if a stage has no block.

    Example:
      >>> import flax_sbn as sbn
      >>> [f"{std:.3f}" for std in sbn.alternatives.expected_std([3, 2])]
      ['1.000', '1.020', '1.039', '1.058', '1.020']

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """
    if not all(count >= 1 for count in blocks):
        raise ValueError(f"Expected at least one block a stage, got {blocks=}.")
    stds, std = [], 1.0
    for count in blocks:
        for block in range(count):
            stds.append(std)
            std = math.hypot(std if block > 0 else 1.0, alpha)
    return tuple(stds)


def norm_free_residual(
    x: jax.Array,
    branch: Callable[[jax.Array], jax.Array],
    shortcut: Callable[[jax.Array], jax.Array] | None = None,
    *,
    skip_gain: ArrayLike = 1.0,
    activation: Activation = jax.nn.identity,
    beta: float = 1.0,
    alpha: float = 0.2,
) -> jax.Array:
    r"""Adds a branch to its input, each of a variance known at initialization.

    .. math::
      \begin{aligned}
      z &= \mathrm{activation}(x / \beta) \\
      y &= x + \alpha \cdot \mathit{skip\_gain} \cdot \mathrm{branch}(z)
      \end{aligned}

    and at the start of a stage :math:`\mathrm{shortcut}(z)` in place of ``x``.

    Args:
      x: any shape, of standard deviation ``beta`` at initialization.
      branch: keeps the variance of :math:`z`: :class:`flax_sbn.linen.WSConv` and scaled
        activations.
      shortcut: likewise, where the branch changes the shape; None for ``x`` itself.
      skip_gain: learned scalar; it starts from zero, where a block is the identity.
      activation: the first step of the branch and of ``shortcut``, as
        ``scaled(jax.nn.relu)``; see :func:`scaled`.
      beta: expected standard deviation of ``x``; see :func:`expected_std`.
      alpha: factor of the branch.

    Returns:
      An array of the branch's shape, in the dtype of both summands promoted.

    Raises:
      ValueError: if the branch has another shape than what it is added to.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x = jnp.array([2.0, 4.0])
      >>> sbn.alternatives.norm_free_residual(x, jnp.square, beta=2.0, alpha=0.5)
      Array([2.5, 6. ], dtype=float32)

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692; the gain from zero: De & Smith,
    "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
    Networks", arXiv 2002.10444.
    """
    z = activation(x / beta)
    y = branch(z)
    skipped = x if shortcut is None else shortcut(z)
    if y.shape != skipped.shape:
        raise ValueError(
            f"Expected a branch of shape {skipped.shape}, got {y.shape}. Give a "
            "shortcut of the same strides, padding and features."
        )
    return skipped + jnp.asarray(alpha * skip_gain, y.dtype) * y
