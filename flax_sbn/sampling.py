"""Which values are measured: the samplers.

A sampler is geometry. Given the extent of the measured axes (images first, then the
spatial axes) and a random key, it says which positions to look at. It never sees
values, so it applies alike to an activation and to its mask. Letters in shapes: ``N``
images, ``H W`` spatial axes (any number of them), ``C`` features.

To add a sampler, write one frozen dataclass with ``needs_key`` and ``parts``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_sbn.arguments import check_numbers, positive_ints
from flax_sbn.windows import EVERYTHING, Part, Start, Windows, random_tiles


@runtime_checkable
class Sampler(Protocol):
    """What a sampler provides. Any frozen dataclass with both members is a sampler."""

    @property
    def needs_key(self) -> bool:
        """Whether the positions are random."""

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the positions of measured axes of extent ``shape``, images first."""


def needs_key(sampler: Sampler | None) -> bool:
    """Whether a sampler draws positions, and so needs a random key.

    Raises:
      TypeError: if ``sampler`` is neither a sampler nor None.
    """
    if sampler is None:
        return False
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):
        raise TypeError(
            f"Expected a sampler such as BatchSampling(8), got {sampler=}. "
            "Use sampler=None to measure the whole batch."
        )
    return sampler.needs_key


def sampled_parts(
    sampler: Sampler | None,
    shape: tuple[int, ...],
    key: jax.Array | None,
    num_devices: int = 1,
) -> tuple[Part, ...]:
    """Returns what a sampler measures of measured axes of extent ``(N, *spatial)``.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if the sampler does not fit the shape, its key is missing, or
        ``num_devices`` that pool measure less than two values.
    """
    draws = needs_key(sampler)
    if sampler is None:
        return (EVERYTHING,)
    if not shape or math.prod(shape) == 0:
        raise ValueError(
            "Expected an input with images to sample from and no empty axis, got "
            f"measured axes of {shape=}. Leave empty batches out, or take sampler=None;"
            " is `axis` the feature axis?"
        )
    if draws and key is None:
        raise ValueError(
            f"Expected a random key for {sampler}, got {key=}. "
            "Pass key=jax.random.key(seed), a fresh one each step."
        )
    try:
        parts = sampler.parts(shape, key)
    except Exception as error:
        # JAX's own class for what it cannot tell of a shape has no name in JAX 0.10.0.
        if isinstance(error, ValueError) or all(isinstance(n, int) for n in shape):
            raise
        raise ValueError(
            f"Expected a shape that is known to hold the sample of {sampler}, got "
            f"measured axes of {shape=}. Export with what is known of it, as by "
            "jax.export.symbolic_shape('b', constraints=['b >= 8'])."
        ) from error
    count = num_devices * sum(part.num_values(shape) for part in parts)
    if isinstance(count, int) and count < 2:  # not symbolic, as in an export
        raise ValueError(
            f"Expected at least 2 measured values per feature, got 1 from {sampler} on "
            f"measured axes of {shape=}. Measure more images, or pool devices: "
            "axis_name."
        )
    return parts


def num_measured(sampler: Sampler | None, shape: tuple[int, ...]) -> int:
    """Returns how many values per feature a sampler measures.

    Args:
      sampler: a sampler, or None for every position.
      shape: extent of the measured axes, ``(N, *spatial)``.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if the sampler does not fit the shape.

    Example:
      >>> from flax_sbn import FeatureSampling, num_measured
      >>> num_measured(FeatureSampling(1 / 64), (128, 32, 32))  # 4 x 4 in each of 128
      2048
    """
    parts = sampled_parts(sampler, shape, jax.random.key(0))
    return sum(part.num_values(shape) for part in parts)


@dataclasses.dataclass(frozen=True)
class NaiveSampling:
    """Naive Sampling (NS): the last images of the batch, the same in every layer.

    The paper's baseline. It shows why positions have to be resampled in each layer.

    Attributes:
      num_samples: number of images measured.

    Raises:
      ValueError: if ``num_samples`` is not a positive int or exceeds the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import NaiveSampling, batch_statistics
      >>> x = jnp.array([[1.0], [2.0], [4.0], [6.0]])
      >>> batch_statistics(x, sampler=NaiveSampling(2)).mean
      Array([5.], dtype=float32)

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    num_samples: int

    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_ints(self, "num_samples")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the last ``num_samples`` images."""
        images, count = stratum_images(shape[0], 1, num_samples=self.num_samples)
        return (Part(1.0, (_images(shape, 1, images - count, count),)),)


@dataclasses.dataclass(frozen=True)
class BatchSampling:
    """Batch Sampling (BS): a contiguous run of images at a random place.

    The batch is tiled by runs of ``num_samples`` images and one of them is measured, so
    that every image is equally likely where ``num_samples`` divides the batch.

    Attributes:
      num_samples: number of images measured, in all strata together.
      strata: number of equal parts of the batch; each gives ``num_samples / strata``
        images at the same random offset. Use a stratum for each of several concatenated
        batches; otherwise only one of them is measured. With one stratum per data
        shard, no images move between devices. Strata are ours, not the paper's.

    Raises:
      ValueError: if a number is not a positive int, ``num_samples`` exceeds the batch,
        or ``strata`` does not divide both.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import BatchSampling, batch_statistics
      >>> x = jnp.array([[1.0], [1.0], [5.0], [5.0]])
      >>> means = [
      ...     batch_statistics(x, sampler=BatchSampling(2), key=jax.random.key(i)).mean
      ...     for i in range(8)
      ... ]
      >>> sorted({float(mean[0]) for mean in means})
      [1.0, 5.0]

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    num_samples: int
    strata: int = 1

    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive_ints(self, "num_samples", "strata")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses a run of images at one random offset in every stratum."""
        strata = self.strata
        images, count = stratum_images(shape[0], strata, num_samples=self.num_samples)
        assert key is not None
        (start,) = random_tiles(key, [images], [count])
        return (Part(1.0, (_images(shape, strata, start, count),)),)


@dataclasses.dataclass(frozen=True)
class FeatureSampling:
    r"""Feature Sampling (FS): one random patch of every feature map.

    The patch covers at least ``fraction`` of the spatial extent, with sides near
    :math:`L \cdot \mathit{fraction}^{1/d}` on :math:`d` spatial axes. It grows until
    there are ``min_values`` values per feature in the batch. Patches are drawn from a
    tiling of the map, so that every position is equally likely where the patch's side
    divides the map's.

    Attributes:
      fraction: least share of the spatial extent that is measured, in (0, 1].
      min_values: least number of values per feature, as far as the batch has that many.
        Ignored while the batch size is unknown, as in an export for any batch size.
      groups: the images are split into the largest number of equal runs that is at most
        ``groups``, each with a patch of its own, all of them spread over the map; None
        for a patch for every image. ``groups=1`` is the paper's FS, whose statistics
        contain the noise of a single place. ``groups`` and ``min_values`` are ours. A
        TPU gathers patches slowly: use :class:`LatticeSampling` there.

    Raises:
      TypeError: if ``fraction`` is not a number.
      ValueError: if ``fraction`` is outside (0, 1], another number is not a positive
        int, or the input has no spatial axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import FeatureSampling, batch_norm, num_measured
      >>> sampler = FeatureSampling(1 / 64)
      >>> num_measured(sampler, (128, 32, 32)) / (128 * 32 * 32) == 1 / 64
      True
      >>> x = jax.random.normal(jax.random.key(0), (128, 32, 32, 16))
      >>> y, statistics = batch_norm(x, sampler=sampler, key=jax.random.key(1))
      >>> y.shape, statistics.mean.shape
      ((128, 32, 32, 16), (16,))

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    fraction: float
    min_values: int = 32
    groups: int | None = None

    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(fraction=self.fraction)
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"Expected fraction in (0, 1], got fraction={self.fraction!r}. "
                "The paper uses 1/4 to 1/64."
            )
        positive_ints(self, "min_values")
        if self.groups is not None:
            positive_ints(self, "groups")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses a patch for each group of images."""
        images, *extent = shape
        if not extent:
            raise ValueError(
                f"Expected an input with spatial axes for {self}, got measured axes of "
                f"{shape=}. Use LatticeSampling or BatchSampling for inputs without."
            )
        check_known(self, extent)
        groups = images if self.groups is None else self._runs(images, self.groups)
        sides = self._sides(images, extent)
        assert key is not None
        starts = random_tiles(key, extent, sides, groups if groups != 1 else None)
        windows = Windows(groups, (0, *starts), (images // groups, *sides))
        return (Part(1.0, (windows,)),)

    def _runs(self, images: int, most: int) -> int:
        """Returns the largest number of equal runs of images, at most ``most``."""
        if isinstance(images, int):
            return next(n for n in range(min(most, images), 0, -1) if images % n == 0)
        if images % most:
            raise ValueError(
                f"Expected a batch size that is known to be divisible by groups={most},"
                f" got batch size {images}. Export with a symbolic batch size "
                f"'{most}*b', or with groups=None."
            )
        return most

    def _sides(self, images: int, extent: list[int]) -> list[int]:
        """Returns the patch's sides: about the same share of each axis."""
        share = self.fraction
        if isinstance(images, int):
            share = max(share, self.min_values / (images * math.prod(extent)))
        share = min(1.0, share)
        sides = list(extent)
        # Shortest axis first: what rounding up adds there, the longer ones save.
        order = sorted(range(len(extent)), key=lambda axis: extent[axis])
        for done, axis in enumerate(order):
            exact = extent[axis] * share ** (1 / (len(order) - done))
            sides[axis] = min(extent[axis], math.ceil(exact - 1e-9))
            share *= extent[axis] / sides[axis]
        return sides


@dataclasses.dataclass(frozen=True)
class CopySampling:
    """One copy of each image, where the batch holds several: batch augmentation.

    The batch consists of runs of ``num_copies`` images, as
    :func:`flax_sbn.augment_batch` makes them. Of each run one image is measured in its
    whole extent, drawn independently of the other runs. Copies of one image resemble
    each other, so the others would add little.

    Attributes:
      num_copies: number of copies of each image.

    Raises:
      ValueError: if ``num_copies`` is not a positive int or does not divide the batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import CopySampling, batch_statistics, repeat_examples
      >>> x = repeat_examples(jnp.array([[1.0], [3.0], [5.0]]), 2)
      >>> batch_statistics(x, sampler=CopySampling(2), key=jax.random.key(0)).mean
      Array([3.], dtype=float32)

    Source: the sampler is ours; for the copies see Hoffer et al., "Augment your batch",
    arXiv 1901.09335.
    """

    num_copies: int

    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive_ints(self, "num_copies")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses an image of every run of copies."""
        images = shape[0]
        if images % self.num_copies:
            raise ValueError(
                "Expected batch size divisible by num_copies, got "
                f"num_copies={self.num_copies} and batch size {images}. Make the batch "
                f"with augment_batch(augment, key, x, {self.num_copies})."
            )
        runs = images // self.num_copies
        assert key is not None
        chosen = jax.random.bits(key, (runs,), jnp.uint32) % np.uint32(self.num_copies)
        # Not computed again by all that read it.
        start = lax.optimization_barrier(chosen.astype(jnp.int32))
        return (Part(1.0, (_images(shape, runs, start, 1),)),)


@dataclasses.dataclass(frozen=True)
class VirtualSampling:
    """Virtual Dataset Normalization (VDN): measures virtual images only.

    The virtual images come from :func:`flax_sbn.append_virtual` at the network's input
    and leave by :func:`flax_sbn.drop_virtual` before the loss. Without them this
    measures the last images of the data, as Naive Sampling does.

    Attributes:
      num_virtual: number of virtual images, in all strata together.
      strata: number of equal parts of the batch, each of which ends with
        ``num_virtual / strata`` virtual images. With one part per data shard, no images
        move between devices.

    Raises:
      ValueError: if a number is not a positive int, ``num_virtual`` exceeds the batch,
        or ``strata`` does not divide both.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import VirtualSampling, append_virtual, batch_statistics
      >>> x = append_virtual(jnp.ones((6, 1)), jnp.array([[-3.0], [3.0]]))
      >>> batch_statistics(x, sampler=VirtualSampling(2))
      Statistics(mean=Array([0.], dtype=float32), var=Array([9.], dtype=float32))

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    num_virtual: int
    strata: int = 1

    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_ints(self, "num_virtual", "strata")

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the last images of every stratum."""
        return (Part(1.0, (self.split(shape)[1],)),)

    def split(self, shape: tuple[int, ...]) -> tuple[Windows, Windows]:
        """Returns the windows of the real and of the virtual images."""
        strata = self.strata
        images, count = stratum_images(shape[0], strata, num_virtual=self.num_virtual)
        real = images - count
        return _images(shape, strata, 0, real), _images(shape, strata, real, count)


@dataclasses.dataclass(frozen=True)
class MixedSampling:
    r"""Real and virtual images mixed: FS+VDN, BS+VDN.

    With weight ``w`` on the virtual part, the statistics are those of the mixed
    population:

    .. math::
      \begin{aligned}
      \mu &= w \mu_v + (1 - w) \mu_r \\
      v &= w v_v + (1 - w) v_r + w (1 - w) |\mu_v - \mu_r|^2
      \end{aligned}

    Attributes:
      real: sampler of the real images, which are all that it sees.
      virtual: the virtual images.
      virtual_weight: the weight ``w`` in [0, 1]. The paper mixes in a fixed proportion
        that it does not state; mixing moments with 0.5 is our formulation.

    Raises:
      TypeError: if ``real`` is not a sampler of images, ``virtual`` is not a
        VirtualSampling, or ``virtual_weight`` is not a number.
      ValueError: if ``virtual_weight`` is outside [0, 1], and as both samplers.

    Example:
      >>> from flax_sbn import FeatureSampling, MixedSampling, VirtualSampling
      >>> MixedSampling(FeatureSampling(1 / 64), VirtualSampling(4)).virtual_weight
      0.5

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    real: Sampler
    virtual: VirtualSampling
    virtual_weight: float = 0.5

    @property
    def needs_key(self) -> bool:
        """Whether the positions among the real images are random."""
        return needs_key(self.real)

    def __post_init__(self) -> None:
        if not isinstance(self.virtual, VirtualSampling):
            raise TypeError(
                f"Expected virtual to be a VirtualSampling, got {self.virtual!r}. "
                "Use MixedSampling(real, VirtualSampling(4))."
            )
        if isinstance(self.real, VirtualSampling | MixedSampling | None):
            raise TypeError(
                f"Expected real to be a sampler of the images, got real={self.real!r}. "
                "Use FeatureSampling or BatchSampling."
            )
        needs_key(self.real)
        check_numbers(virtual_weight=self.virtual_weight)
        if not 0 <= self.virtual_weight <= 1:
            raise ValueError(
                "Expected virtual_weight in [0, 1], got "
                f"virtual_weight={self.virtual_weight!r}. The default is 0.5."
            )

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> tuple[Part, ...]:
        """Chooses the virtual images, and positions in the others."""
        real, virtual = self.virtual.split(shape)
        seen = real.sampled_shape(shape)
        if seen[0] < 1:
            raise ValueError(
                f"Expected num_virtual < batch size for {self}, got "
                f"num_virtual={self.virtual.num_virtual} and batch size {shape[0]}. "
                "Append the virtual images to the data: append_virtual(x, virtual)."
            )
        w = self.virtual_weight
        return (
            Part(w, (virtual,)),
            *(
                Part((1 - w) * part.weight, (real, *part.windows))
                for part in self.real.parts(seen, key)
            ),
        )


def stratum_images(images: int, strata: int, **sample: int) -> tuple[int, int]:
    """Returns the images of one of ``strata`` equal parts of a batch, and its sample.

    ``sample`` is the number of sampled images, under the name that the user knows.

    Raises:
      ValueError: if the sample exceeds the batch, or either cannot be divided.
    """
    ((name, count),) = sample.items()
    if count > images:
        raise ValueError(
            f"Expected {name} <= batch size, got {name}={count} and batch size "
            f"{images}. "
            f"Use a smaller {name}, or sampler=None to measure the whole batch."
        )
    if images % strata or count % strata:
        raise ValueError(
            f"Expected batch size and {name} divisible by strata, got {strata=}, "
            f"{name}={count} and batch size {images}. Choose strata that divide both."
        )
    return images // strata, count // strata


def check_known(sampler: Sampler, extent: Sequence[int]) -> None:
    """Raises a ValueError if the size of a map is left open, as in an export."""
    if not all(isinstance(n, int) for n in extent):
        raise ValueError(
            f"Expected spatial axes of known extent for {sampler}, got {tuple(extent)}."
            " Export training for one image size, or with BatchSampling."
        )


def _images(shape: tuple[int, ...], runs: int, start: Start, count: int) -> Windows:
    """Returns ``count`` images of every run, in their whole extent."""
    spatial = shape[1:]
    return Windows(runs, (start, *[0] * len(spatial)), (count, *spatial))
