"""The data sets by name; some of other kinds, made of digits: pixels, sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data import DataError, Dataset, Images, Labels, load_cifar10, load_digits

_COUNTS = 1000, 250  # for training, and for the test
_SIDE, _LENGTH = 64, 512  # of a scene, and of a sequence
_DIGITS, _PIECES = 6, 30  # in a scene
_SNIPPETS = 10  # in a sequence


def load(name: str, folder: Path | None = None) -> Dataset:
    """Returns one of ``DATASETS``; CIFAR-10 from a folder.

    Raises:
      DataError: if the folder is missing, or does not hold what it should.
    """
    if name in MADE:
        return MADE[name]()
    if folder is None:
        raise DataError(f"Expected --data-dir DIR for the dataset {name}.")
    return load_cifar10(folder)


def load_sequences() -> Dataset:
    """Returns sequences of 512 values; somewhere in each is a digit, line by line.

    Elsewhere there are pieces of digits, and noise. Sequences for the test hide digits
    that none for the training does. The same each time.
    """
    return _made("sequences", _sequence, num_classes=10)


def load_scenes() -> Dataset:
    """Returns digits on clutter, 64 x 64; a label for every pixel: which digit, or 10.

    Scenes for the test show digits that no scene for the training does. Clutter is
    pieces of digits, and noise. Later digits lie on earlier ones. The same each time.
    """
    return _made("scenes", _scene, num_classes=11)


def _made(name: str, make: Callable[..., Any], num_classes: int) -> Dataset:
    """Returns what is made of digits, by ``make(images, labels, rng)``."""
    digits, rng = load_digits(), np.random.default_rng(0)

    def some(images: Images, labels: Labels, count: int) -> tuple[Images, Labels]:
        made = [make(images[..., 0], labels, rng) for _ in range(count)]
        ink, classes = (np.stack(each) for each in zip(*made, strict=True))
        pixels = np.round(ink.clip(0, 16) * (255 / 16)).astype(np.uint8)
        return pixels[..., None], classes.astype(np.int32)

    train = some(digits.train_images, digits.train_labels, _COUNTS[0])
    test = some(digits.test_images, digits.test_labels, _COUNTS[1])
    return Dataset(name, *train, *test, num_classes=num_classes, augment=False)


def _sequence(images: Images, labels: Labels, rng: np.random.Generator) -> Any:
    ink = rng.normal(2, 1, _LENGTH)
    *others, i = rng.integers(len(images), size=_SNIPPETS + 1)
    for image in images[others]:
        start, line = rng.integers(_LENGTH - 16 + 1), rng.integers(8 - 2 + 1)
        ink[start : start + 16] = image[line : line + 2].ravel()
    start = rng.integers(_LENGTH - 64 + 1)
    ink[start : start + 64] = images[i].ravel()
    return ink, labels[i]


def _scene(images: Images, labels: Labels, rng: np.random.Generator) -> Any:
    ink = rng.normal(2, 1, (_SIDE, _SIDE))
    classes = np.full((_SIDE, _SIDE), 10, np.int32)

    def place(size: int) -> tuple[slice, slice]:
        top, left = rng.integers(_SIDE - size + 1, size=2)
        return slice(top, top + size), slice(left, left + size)

    for image in images[rng.integers(len(images), size=_PIECES)]:
        top, left = rng.integers(8 - 3, size=2)
        piece = image[top : top + 4, left : left + 4]
        where = place(4)
        ink[where] = np.maximum(ink[where], piece)
    for i in rng.integers(len(images), size=_DIGITS):
        where, digit = place(16), _enlarged(images[i])
        ink[where] = np.where(digit > 4, digit, ink[where])
        classes[where] = np.where(digit > 4, labels[i], classes[where])
    return ink, classes


def _enlarged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image.repeat(2, 0).repeat(2, 1)


# Those that need no files.
MADE = {"digits": load_digits, "sequences": load_sequences, "scenes": load_scenes}
DATASETS = ("cifar10", *MADE)
