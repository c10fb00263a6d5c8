"""Batch augmentation: every row several times in the batch, augmented independently.

Letters in shapes: ``N`` rows, ``M`` copies of each, ``...`` the shape of one row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_sbn.arguments import check_positive
from flax_sbn.xla.sharding import laid_out_by_xla


def augment_batch(
    augment: Callable[[jax.Array, Any], Any], key: jax.Array, x: Any, num_copies: int
) -> Any:
    r"""Augments several copies of every row, each with a key of its own.

    .. math::
      y_{n M + m} = \mathit{augment}(\mathit{key}_{nm}, x_n), \qquad 0 \le m < M

    A loss that is the mean over the ``N M`` rows averages the gradient over the copies.

    Args:
      augment: takes a key and one row, and returns the augmented row. It is mapped by
        :func:`jax.vmap`.
      key: random key, a fresh one each step.
      x: ``(N, ...)``, or a pytree of arrays with ``N`` rows each, such as images with
        their boxes, of which ``augment`` gets one row together.
      num_copies: number of copies ``M`` of each row.

    Returns:
      What ``augment`` returns, with ``N M`` rows, those of one row of ``x`` next to
      each other: to be measured by ``CopySampling(M)``. Labels that ``augment`` does
      not see go with them by :func:`repeat_rows`.

    Raises:
      ValueError: if ``num_copies`` is no positive int, or ``x`` has no rows, or not as
        many in every array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import augment_batch, repeat_rows
      >>> def mirror(key, image):
      ...     return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
      >>> images, labels = jnp.zeros((4, 8, 8, 3)), jnp.arange(4)
      >>> augment_batch(mirror, jax.random.key(0), images, 2).shape
      (8, 8, 8, 3)
      >>> print(repeat_rows(labels, 2))
      [0 0 1 1 2 2 3 3]

    Source: Hoffer et al., "Augment your batch", arXiv 1901.09335.
    """
    rows = _num_rows(x)
    check_positive(num_copies=num_copies)
    keys = jax.random.split(key, (rows, num_copies))
    copies = jax.vmap(jax.vmap(augment, in_axes=(0, None)))(keys, x)
    return jax.tree.map(lambda a: a.reshape(rows * num_copies, *a.shape[2:]), copies)


def repeat_rows(x: Any, num_copies: int) -> Any:
    """Repeats every row, in the order of :func:`augment_batch`.

    Args:
      x: ``(N, ...)``, such as labels, or a pytree of arrays with ``N`` rows each.
      num_copies: number of copies ``M`` of each row.

    Returns:
      ``(N M, ...)``, the copies of one row next to each other; a pytree like ``x``.

    Raises:
      ValueError: if ``num_copies`` is no positive int, or ``x`` has no rows, or not as
        many in every array.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import repeat_rows
      >>> repeat_rows(jnp.array([3, 5]), 3)
      Array([3, 3, 3, 5, 5, 5], dtype=int32)

    Source: Hoffer et al., "Augment your batch", arXiv 1901.09335.
    """
    _num_rows(x)
    check_positive(num_copies=num_copies)
    repeat = functools.partial(jnp.repeat, repeats=num_copies, axis=0)
    return jax.tree.map(
        lambda a: laid_out_by_xla(repeat, jnp.asarray(a), like_x=True), x
    )


def _num_rows(x: Any) -> int:
    shapes = [jnp.shape(a) for a in jax.tree.leaves(x)]
    rows = {shape[:1] for shape in shapes}
    if len(rows) != 1 or () in rows:
        raise ValueError(
            f"Expected arrays with the same number of rows, got {shapes=}. "
            "Give each of them the rows as first axis."
        )
    ((count,),) = rows
    return count
