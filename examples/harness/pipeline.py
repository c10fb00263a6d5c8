"""Images from the disk to a batch: folders or ArrayRecord files, read with Grain.

What a batch holds depends on the seed and its number alone, so that a training that
goes on reads on where it was, with as many processes as it then has.
"""

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from harness import crops
from harness.crops import Encoded
from harness.data import DataError
from harness.records import EXTENSION, read_example

# Of ImageNet's training images, by which most published networks are normalized.
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
STD = np.array([0.229, 0.224, 0.225], np.float32) * 255
_PADDING = -1  # label of images that only fill a batch
Batch = dict[str, NDArray[Any]]


class Source(Protocol):
    """Encoded images by their number."""

    def __len__(self) -> int:
        """Returns how many there are."""

    def __getitem__(self, index: Any) -> Encoded:
        """Reads one."""


@dataclasses.dataclass(frozen=True, repr=False)  # of a million files: Grain asks for it
class Folder:
    """Image files in a folder for each class; classes are in alphabetical order."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Lists a folder's files.

        Raises:
          DataError: if it has no images in folders.
        """
        classes = sorted(each.name for each in path.iterdir() if each.is_dir())
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in crops.SUFFIXES
        ]
        if not found:
            raise DataError(
                f"Expected a folder of images for each class in {path}, found none."
            )
        files, labels = zip(*found, strict=True)
        return cls(files, labels, tuple(classes))

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self.files)

    def __getitem__(self, index: Any) -> Encoded:
        """Reads one."""
        file = self.files[index]
        return Encoded(str(file), file.read_bytes(), self.labels[index])


class Records:
    """Records of ArrayRecord files, a ``tf.train.Example`` each."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._records = ArrayRecordDataSource([str(file) for file in files])

    def __len__(self) -> int:
        """Returns how many images there are."""
        return len(self._records)

    def __getitem__(self, index: Any) -> Encoded:
        """Reads one."""
        name = f"record {index} of {self.files[0].parent}"
        try:
            return Encoded(name, *read_example(self._records[index]))
        except (DecodeError, KeyError, IndexError) as error:
            raise DataError(
                f"Expected a tf.train.Example with image and label in {name}: {error}."
            ) from error


class Splits(NamedTuple):
    """Images to train with and to evaluate."""

    train: Source
    test: Source
    num_classes: int


def find(folder: Path, num_classes: int | None = None) -> Splits:
    """Finds the images of a folder.

    Args:
      folder: with ``train`` and ``val``, each with a folder for each class; or with
        ArrayRecord files whose names say ``train``, and ``val`` or ``test``.
      num_classes: of ArrayRecord files, which do not tell; folders do.

    Raises:
      DataError: if it has neither.
    """
    if not folder.is_dir():
        raise DataError(f"Expected {folder} to be a folder.")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train, test = Folder.read(folder / "train"), Folder.read(folder / "val")
        if train.classes != test.classes:
            odd = sorted({*train.classes} ^ {*test.classes})
            raise DataError(
                f"Expected the same classes in train and val of {folder}, but "
                f"{odd[0]!r} is in one of them only."
            )
        if num_classes not in (None, len(train.classes)):
            raise DataError(
                f"Expected {num_classes} classes in {folder}, found "
                f"{len(train.classes)} folders."
            )
        return Splits(train, test, len(train.classes))
    files = sorted(folder.glob(f"*{EXTENSION}*"))
    training = [file for file in files if "train" in file.name]
    others = [file for file in files if re.search("val|test", file.name)]
    if not training or not others:
        raise DataError(
            f"Expected folders train and val, or ArrayRecord files *train*{EXTENSION}* "
            f"and *val*{EXTENSION}*, in {folder}, found neither."
        )
    if num_classes is None:
        raise DataError("ArrayRecord files need --num-classes, which they do not tell.")
    return Splits(Records(training), Records(others), num_classes)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes the arrays of a batch of image numbers.

    Attributes:
      source: the images.
      size: side of the result, in pixels.
      num_classes: what labels are below.
      skip: whether images that cannot be read are left out, instead of being an error.
    """

    source: Source
    size: int
    num_classes: int
    skip: bool

    def random_crop(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns a random part of an image, flipped or not.

        The next one takes the place of one that is left out; ``skipped`` counts them.
        """
        for skipped in range(len(self.source)):
            number = (index + skipped) % len(self.source)
            found = self._read(
                number, lambda image: crops.random(image, self.size, rng)
            )
            if found is not None:
                return {**found, "skipped": np.int32(skipped)}
        raise DataError("None of the images can be read.")

    def center(self, index: int) -> dict[str, Any]:
        """Returns an image's center; padding behind the end, and if it is left out."""
        if index < len(self.source):
            crop = functools.partial(crops.center, size=self.size)
            found = self._read(index, crop)
            if found is not None:
                return found
        pixels = np.zeros((self.size, self.size, 3), np.uint8)
        return {"image": pixels, "label": np.int32(_PADDING)}

    def _read(
        self, index: int, crop: Callable[[Encoded], NDArray[np.uint8]]
    ) -> dict[str, Any] | None:
        try:
            encoded = self.source[index]
            if not 0 <= encoded.label < self.num_classes:
                raise DataError(
                    f"Expected a label below {self.num_classes}, got {encoded.label} "
                    f"for {encoded.name}."
                )
            return {"image": crop(encoded), "label": np.int32(encoded.label)}
        except DataError:
            if self.skip:
                return None
            raise


class Input(Protocol):
    """Batches of one process: ``image``, ``label`` and, in training, ``skipped``."""

    @property
    def num_images(self) -> int:
        """Returns how many images there are to train with."""

    @property
    def num_classes(self) -> int:
        """Returns how many classes they have."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns ``(H, W, C)`` of an image."""

    def train(self, begin: int) -> Iterator[Batch]:
        """Returns batches without end, from the one of this number on."""

    def test(self, batch_size: int) -> Iterator[Batch]:
        """Returns all images once; the label of padding is negative."""


@dataclasses.dataclass(frozen=True)
class DiskInput:
    """Images from the disk.

    Attributes:
      splits: the images.
      size: side of the crops, in pixels.
      batch_size: in training, of all processes together.
      seed: of order, crops and flips.
      threads: that read and decode.
      skip: whether images that cannot be read are left out, instead of being an error.
    """

    splits: Splits
    size: int
    batch_size: int
    seed: int
    threads: int
    skip: bool

    @property
    def num_images(self) -> int:
        """Number of images to train with."""
        return len(self.splits.train)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.splits.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.size, self.size, 3

    def train(self, begin: int) -> Iterator[Batch]:
        """Returns batches without end, from the one of this number on."""
        batches = iter(self.batches(self.crops(), self.batch_size))
        grain.experimental.set_next_index(batches, begin)
        return batches

    def crops(self) -> grain.MapDataset[Any]:
        """Returns random crops of the images without end, shuffled in each epoch."""
        numbers = grain.MapDataset.range(self.num_images).seed(self.seed)
        reader = self._reader(self.splits.train)
        return numbers.shuffle().repeat().random_map(reader.random_crop)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """Returns all images once; the label of padding is negative."""
        count = len(self.splits.test)
        numbers = grain.MapDataset.range(count + -count % batch_size)
        centers = numbers.map(self._reader(self.splits.test).center)
        return iter(self.batches(centers, batch_size))

    def batches(
        self, images: grain.MapDataset[Any], batch_size: int
    ) -> grain.IterDataset[Batch]:
        """Returns this process's part of batches that all processes have together."""
        count = jax.process_count()
        size = batch_size // count
        # About metadata. Not around each image, as all threads share the filters.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        options = grain.ReadOptions(self.threads, prefetch_buffer_size=2 * size)
        part = images[jax.process_index() :: count]
        return part.to_iter_dataset(options).batch(size)

    def _reader(self, source: Source) -> _Reader:
        return _Reader(source, self.size, self.num_classes, self.skip)


@dataclasses.dataclass(frozen=True)
class FakeInput:
    """One batch of noise, again and again: to see how fast all but the input is.

    Attributes:
      size: side of the images, in pixels.
      batch_size: of all processes together.
      num_classes: number of classes.
      num_images: that an epoch should have; ImageNet's number.
    """

    size: int
    batch_size: int
    num_classes: int
    num_images: int = 1_281_167

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.size, self.size, 3

    def train(self, begin: int) -> Iterator[Batch]:
        """Returns the batch, without end."""
        images = self.batch_size // jax.process_count()
        rng = np.random.default_rng(0)
        return itertools.repeat(
            {
                "image": rng.integers(256, size=(images, *self.shape), dtype=np.uint8),
                "label": rng.integers(self.num_classes, size=images, dtype=np.int32),
                "skipped": np.zeros(images, np.int32),
            }
        )

    def test(self, batch_size: int) -> Iterator[Batch]:
        """Returns nothing."""
        return iter(())
