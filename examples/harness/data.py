"""Real images as uint8 arrays: scikit-learn's digits, and CIFAR-10 in its three forms.

Every loader returns a :class:`Dataset`; a folder that does not hold what it should
raises :class:`DataError` with one line that says what is wrong and what to do.
"""

import dataclasses
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]
Labels = NDArray[np.int32]
Split = tuple[Images, Labels]


class DataError(Exception):
    """A data folder is missing, empty, damaged or of another form."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels of a classification task.

    Attributes:
      name: short name.
      train_images: ``(N, H, W, C)``, uint8; of sequences ``(N, L, C)``.
      train_labels: ``(N,)``, int32 class indices; of pixels ``(N, H, W)``.
      test_images: ``(M, H, W, C)``, likewise, held out.
      test_labels: ``(M,)``, likewise.
      num_classes: number of classes.
      augment: whether random crops and flips keep an image's class.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    num_classes: int
    augment: bool

    def limited(self, train_size: int | None) -> "Dataset":
        """Returns the data set with only its first ``train_size`` training images."""
        return dataclasses.replace(
            self,
            train_images=self.train_images[:train_size],
            train_labels=self.train_labels[:train_size],
        )

    def resized(self, size: int) -> "Dataset":
        """Returns the data set with smaller images: means of square blocks of pixels.

        Raises:
          ValueError: if the images are not square, ``size`` does not divide them, or
            pixels have labels.
        """
        height, width = (*self.train_images.shape, 1)[1:3]
        if height != width or height % size or self.train_labels.ndim > 1:
            raise ValueError(
                f"Expected an image size that divides {height} x {width} of "
                f"{self.name}, got {size}."
            )
        block = height // size

        def smaller(images: Images) -> Images:
            shape = (len(images), size, block, size, block, images.shape[-1])
            means = images.reshape(shape).mean((2, 4))
            return np.round(means).astype(np.uint8)

        return dataclasses.replace(
            self,
            train_images=smaller(self.train_images),
            test_images=smaller(self.test_images),
        )


def load_digits() -> Dataset:
    """Returns scikit-learn's 1,797 scans of digits, 8 x 8, a quarter held out."""
    # Here, as importing it takes a second, and no other data need it.
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    split = model_selection.train_test_split(
        digits.images.astype(np.uint8)[..., None],
        digits.target.astype(np.int32),
        test_size=0.25,
        stratify=digits.target,
        random_state=0,
    )
    train_images, test_images, train_labels, test_labels = split
    return Dataset(
        "digits",
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=10,
        augment=False,
    )


def load_cifar10(folder: Path) -> Dataset:
    """Reads CIFAR-10 from a folder, whichever of its forms is there.

    Args:
      folder: holds, itself or one level down, the official python form
        (``data_batch_1`` ...), the official binary form (``data_batch_1.bin`` ...) or
        ``cifar10_jpeg.npz`` (JPEG bytes with offsets and labels).

    Raises:
      DataError: if nothing of the kind is there, or a file is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"Expected --data-dir to be a folder, got {folder}.")
    forms: dict[str, Callable[[Path], tuple[Split, Split]]] = {
        "data_batch_1": _read_python,
        "data_batch_1.bin": _read_binary,
        "cifar10_jpeg.npz": _read_jpeg,
    }
    for marker, read in forms.items():
        for found in sorted([*folder.glob(marker), *folder.glob(f"*/{marker}")]):
            train, test = read(found.parent)
            return Dataset("cifar10", *train, *test, num_classes=10, augment=True)
    raise DataError(
        f"Expected CIFAR-10 in {folder}, found none of {', '.join(forms)}. Unpack the "
        "official archive (python or binary version) and give its folder."
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Loads the official pickles, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {
            ("numpy", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_python(folder: Path) -> tuple[Split, Split]:
    def read(name: str) -> Split:
        with _open(folder / name) as file:
            try:
                batch = _ArrayUnpickler(file, encoding="bytes").load()
                pixels, labels = batch[b"data"], batch[b"labels"]
            except Exception as error:
                raise _damaged(folder / name, error) from error
        return _images(np.asarray(pixels), labels, folder / name)

    return _train_and_test(read, "data_batch_{}", "test_batch")


def _read_binary(folder: Path) -> tuple[Split, Split]:
    def read(name: str) -> Split:
        with _open(folder / name) as file:
            records = np.frombuffer(file.read(), np.uint8)
        if records.size == 0 or records.size % 3073:
            raise _damaged(folder / name, f"{records.size} bytes are no whole records")
        records = records.reshape(-1, 3073)
        return _images(records[:, 1:], records[:, 0], folder / name)

    return _train_and_test(read, "data_batch_{}.bin", "test_batch.bin")


def _read_jpeg(folder: Path) -> tuple[Split, Split]:
    path = folder / "cifar10_jpeg.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return _decode(arrays, "train"), _decode(arrays, "test")
    except Exception as error:
        raise _damaged(path, error) from error


def _decode(arrays: Any, split: str) -> Split:
    data = arrays[f"{split}_bytes"].tobytes()
    offsets = arrays[f"{split}_offsets"].tolist()
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
            for start, stop in itertools.pairwise(offsets)
        ]
    )
    labels = arrays[f"{split}_labels"].astype(np.int32)
    if len(labels) != len(images) or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"{len(labels)} labels, images of shape {images.shape}")
    return images, labels


def _train_and_test(
    read: Callable[[str], Split], train: str, test: str
) -> tuple[Split, Split]:
    batches = {name: read(name) for name in map(train.format, range(1, 6))}
    sizes = {name: len(labels) for name, (_, labels) in batches.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"Expected CIFAR-10 batches of one size, got images {sizes}.")
    images, labels = zip(*batches.values(), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), read(test)


def _images(pixels: NDArray[Any], labels: Any, path: Path) -> Split:
    """Turns rows of 3072 bytes, channel by channel, into (N, 32, 32, 3)."""
    labels = np.asarray(labels, np.int32)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise _damaged(path, f"{pixels.dtype} pixels of shape {pixels.shape}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise _damaged(path, "labels outside 0 to 9")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"Expected the file {path}, got: {error.strerror}.") from error


def _damaged(path: Path, reason: object) -> DataError:
    return DataError(f"Expected CIFAR-10 data in {path}, but it is damaged: {reason}.")
