"""Batch augmentation: every image several times in the batch, augmented independently.

Letters in shapes: ``N`` images, ``M`` copies of each, ``...`` the shape of one image.
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
    r"""Augments several copies of every image, each with a key of its own.

    .. math::
      y_{n M + m} = \mathit{augment}(\mathit{key}_{nm}, x_n), \qquad 0 \le m < M

    A loss that is the mean over the ``N M`` images averages the gradient over the
    copies.

    Args:
      augment: takes a key and one image, and returns the augmented image. It is mapped
        by :func:`jax.vmap`.
      key: random key, a fresh one each step.
      x: ``(N, ...)``, or a pytree of arrays with ``N`` images each, such as images with
        their boxes, of which ``augment`` gets one image together.
      num_copies: number of copies ``M`` of each image.

    Returns:
      What ``augment`` returns, with ``N M`` images, those of one image of ``x`` next to
      each other: to be measured by ``CopySampling(M)``. Labels that ``augment`` does
      not see go with them by :func:`repeat_examples`.

    Raises:
      ValueError: if ``num_copies`` is no positive int, or ``x`` has no images, or not
        as many in every array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import augment_batch, repeat_examples
      >>> def mirror(key, image):
      ...     return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
      >>> images, labels = jnp.zeros((4, 8, 8, 3)), jnp.arange(4)
      >>> augment_batch(mirror, jax.random.key(0), images, 2).shape
      (8, 8, 8, 3)
      >>> print(repeat_examples(labels, 2))
      [0 0 1 1 2 2 3 3]

    Source: Hoffer et al., "Augment your batch", arXiv 1901.09335.
    """
    images = _num_examples(x)
    check_positive(num_copies=num_copies)
    keys = jax.random.split(key, (images, num_copies))
    copies = jax.vmap(jax.vmap(augment, in_axes=(0, None)))(keys, x)
    return jax.tree.map(lambda a: a.reshape(images * num_copies, *a.shape[2:]), copies)


def repeat_examples(x: Any, num_copies: int) -> Any:
    """Repeats every example, in the order of :func:`augment_batch`.

    Args:
      x: ``(N, ...)``, such as labels, or a pytree of arrays with ``N`` examples each.
      num_copies: number of copies ``M`` of each example.

    Returns:
      ``(N M, ...)``, the copies of an example next to each other; a pytree like ``x``.

    Raises:
      ValueError: if ``num_copies`` is no positive int, or ``x`` has no examples, or not
        as many in every array.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import repeat_examples
      >>> repeat_examples(jnp.array([3, 5]), 3)
      Array([3, 3, 3, 5, 5, 5], dtype=int32)

    Source: Hoffer et al., "Augment your batch", arXiv 1901.09335.
    """
    _num_examples(x)
    check_positive(num_copies=num_copies)
    repeat = functools.partial(jnp.repeat, repeats=num_copies, axis=0)
    return jax.tree.map(
        lambda a: laid_out_by_xla(repeat, jnp.asarray(a), like_x=True), x
    )


def _num_examples(x: Any) -> int:
    shapes = [jnp.shape(a) for a in jax.tree.leaves(x)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"Expected arrays with the same number of examples, got {shapes=}. "
            "Give each of them the examples as first axis."
        )
    ((count,),) = counts
    return count
