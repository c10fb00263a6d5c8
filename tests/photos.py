"""Photos of about the size of ImageNet's, and what is made of them in plain steps."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images


def photos(count: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Yields parts of scikit-learn's two photos, of ``(width, height)`` pixels."""
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        photo = whole[number % 2]
        left, top = rng.integers(np.subtract(photo.size, size), endpoint=True)
        yield photo.crop((left, top, left + size[0], top + size[1]))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain_crop(
    image: bytes, size: int, box: Any, flip: bool, gap: float | None = 2.0
) -> NDArray[np.uint8]:
    """Decodes, resizes and flips, a step each."""
    decoded = Image.open(io.BytesIO(image)).convert("RGB")
    resized = decoded.resize(
        (size, size), Image.Resampling.BILINEAR, box, reducing_gap=gap
    )
    pixels = np.asarray(resized)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
