"""Virtual images: drawn, appended at the network's input, dropped before the loss.

Letters in shapes: ``N`` real images, ``V`` virtual images, ``...`` the shape of one
image.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.sampling import VirtualSampling
from flax_sbn.xla.sharding import laid_out_by_xla


def virtual_samples(
    key: jax.Array,
    num_virtual: int,
    shape: Sequence[int],
    mean: ArrayLike = 0.0,
    std: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    r"""Draws virtual images of independent Gaussian noise.

    .. math::
      x_v \sim \mathcal{N}(\mathit{mean}, \mathit{std}^2)

    The same key in every step gives a fixed virtual data set, which is better; a new
    key gives fresh images.

    Args:
      key: random key.
      num_virtual: number of images ``V``.
      shape: shape of one image, without the batch axis.
      mean: mean of the training data after its scaling; broadcasts to ``shape``, so
        that ``(C,)`` gives one for each channel.
      std: its standard deviation, likewise.
      dtype: floating dtype of the result.

    Returns:
      ``(V, *shape)``.

    Raises:
      ValueError: if ``mean`` or ``std`` does not broadcast to ``shape``.

    Example:
      >>> import jax
      >>> from flax_sbn import virtual_samples
      >>> virtual_samples(jax.random.key(0), 4, (32, 32, 3)).shape
      (4, 32, 32, 3)

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962, which does
    not state the distribution: Gaussian noise is our formulation.
    """
    shape = tuple(shape)
    of_image = []
    for name, value in (("mean", mean), ("std", std)):
        try:
            of_image.append(jnp.broadcast_to(jnp.asarray(value), shape)[None])
        except ValueError:
            raise ValueError(
                f"Expected {name} to broadcast to an image of {shape=}, got {name} of "
                f"shape {jnp.shape(value)}. Give a scalar, or one value per feature."
            ) from None
    noise = jax.random.normal(key, (num_virtual, *shape), dtype)
    return (of_image[0] + of_image[1] * noise).astype(dtype)


def append_virtual(x: ArrayLike, virtual: ArrayLike, strata: int = 1) -> jax.Array:
    """Appends virtual images to every stratum of the batch.

    Args:
      x: real images, ``(N, ...)``.
      virtual: virtual images, ``(V, ...)``; cast to the dtype of ``x``.
      strata: number of equal parts of the batch; each gets ``V / strata`` images behind
        its ``N / strata``. With one part a data shard, no images move between devices.

    Returns:
      ``(N + V, ...)``, to be measured by ``VirtualSampling(V, strata)``.

    Raises:
      ValueError: if the images differ in shape, ``strata`` does not divide both
        numbers, or images of numbers would be cast to integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import append_virtual
      >>> append_virtual(jnp.array([1, 2, 3, 4]), jnp.array([-1, -2]), strata=2)
      Array([ 1,  2, -1,  3,  4, -2], dtype=int32)

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """
    x, virtual = jnp.asarray(x), jnp.asarray(virtual)
    if x.ndim == 0 or virtual.shape[1:] != x.shape[1:] or virtual.ndim != x.ndim:
        raise ValueError(
            "Expected virtual images of the shape of the batch's, got virtual of shape "
            f"{virtual.shape} and a batch of shape {x.shape}. "
            f"Use virtual_samples(key, n, {x.shape[1:]})."
        )
    if jnp.issubdtype(virtual.dtype, jnp.inexact) > jnp.issubdtype(
        x.dtype, jnp.inexact
    ):
        raise ValueError(
            f"Expected a batch of floating dtype, got {x.dtype} and virtual images of "
            f"{virtual.dtype}. Scale the input to floats before appending to it."
        )
    if strata < 1 or x.shape[0] % strata or virtual.shape[0] % strata:
        raise ValueError(
            f"Expected real and virtual images divisible by strata, got {strata=}, "
            f"{x.shape[0]} real and {virtual.shape[0]} virtual images. "
            "Choose strata that divide both."
        )

    def appended(x: jax.Array, virtual: jax.Array) -> jax.Array:
        parts = [a.reshape(strata, -1, *a.shape[1:]) for a in (x, virtual)]
        return jnp.concatenate(parts, axis=1).reshape(-1, *x.shape[1:])

    return laid_out_by_xla(appended, x, virtual.astype(x.dtype), like_x=True)


def drop_virtual(y: ArrayLike, num_virtual: int, strata: int = 1) -> jax.Array:
    """Drops the virtual images again: the inverse of :func:`append_virtual`.

    Args:
      y: ``(N + V, ...)``, such as the network's output.
      num_virtual: the number of virtual images ``V``; with 0 nothing is dropped.
      strata: as given to :func:`append_virtual`.

    Returns:
      The real images, ``(N, ...)``.

    Raises:
      ValueError: if there are fewer images than ``num_virtual``, or ``strata`` does not
        divide both numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import drop_virtual
      >>> drop_virtual(jnp.array([1, 2, -1, 3, 4, -2]), 2, strata=2)
      Array([1, 2, 3, 4], dtype=int32)

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """
    y = jnp.asarray(y)
    if num_virtual == 0:
        return y
    real, _ = VirtualSampling(num_virtual, strata).split(y.shape)
    return laid_out_by_xla(lambda y: real.take(y, range(y.ndim)), y, like_x=True)
