"""A part of an encoded image, decoded and resized: what a network sees of it."""

import functools
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.data import DataError

Pixels = NDArray[np.uint8]  # (H, W, 3)
_Box = tuple[float, float, float, float]  # left, top, right, bottom
SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp"}
# What Pillow raises for an image that is damaged, or none.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_CENTER = 224 / 256  # share of an image's shorter side that is evaluated
_GAP = 2.0  # where an image is reduced first, so many pixels a pixel are left


class Encoded(NamedTuple):
    """An image as it is on the disk.

    Attributes:
      name: where it is.
      image: JPEG, or another format that Pillow reads.
      label: class index.
    """

    name: str
    image: bytes
    label: int


def random(encoded: Encoded, size: int, rng: np.random.Generator) -> Pixels:
    """Returns a random part, flipped or not, of ``size`` by ``size`` pixels.

    Raises:
      DataError: if the image cannot be read to its end.
    """
    crop = _read(encoded, functools.partial(_random_box, rng), size)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)


def center(encoded: Encoded, size: int) -> Pixels:
    """Returns the center, of ``size`` by ``size`` pixels.

    Raises:
      DataError: if the image cannot be read to its end.
    """
    return np.asarray(_read(encoded, _center_box, size))


def _read(
    encoded: Encoded, choose: Callable[[int, int], _Box], size: int
) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded.image))
        box = _draft(image, choose(*image.size), size)
        if image.mode != "RGB":  # convert() copies what is RGB already
            image = image.convert("RGB")
        bilinear = Image.Resampling.BILINEAR
        return image.resize((size, size), bilinear, box, reducing_gap=_GAP)
    except UNREADABLE as error:
        raise DataError(f"Expected an image in {encoded.name}: {error}.") from error


def _draft(image: Image.Image, box: _Box, size: int) -> _Box:
    """Has a JPEG decoded smaller, by 2, 4 or 8, where it would be reduced anyway.

    Returns:
      The box in the image as it will be decoded.
    """
    full, height = image.size
    left, top, right, bottom = box
    wanted = (
        math.ceil(full * _GAP * size / (right - left)),
        math.ceil(height * _GAP * size / (bottom - top)),
    )
    drafted = image.draft(None, wanted)  # None, of other formats
    if drafted is None:
        return box
    scale = drafted[1][2] / full
    return left * scale, top * scale, right * scale, bottom * scale


def _random_box(rng: np.random.Generator, width: int, height: int) -> _Box:
    """Draws a crop: its area, its aspect ratio, and then its place."""
    low, high = np.log(_ASPECT)
    for _ in range(10):
        area = width * height * rng.uniform(*_AREA)
        aspect = np.exp(rng.uniform(low, high))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return _center_box(width, height, 1.0)


def _center_box(width: int, height: int, share: float = _CENTER) -> _Box:
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
