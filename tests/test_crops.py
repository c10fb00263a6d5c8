"""What a network sees of an image: which part of it, and which pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from harness import crops
from tests import photos
from tests.photos import plain_crop

SIZE = 500, 375  # of a usual photo of ImageNet


def encoded(image, format="PNG"):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return crops.Encoded("an image", photos.encoded(image, format), 0)


@pytest.mark.parametrize(("format", "size"), [("JPEG", 224), ("JPEG", 94), ("PNG", 32)])
def test_pixels_are_those_of_the_plain_steps(format, size) -> None:
    flips = set()
    for seed, photo in enumerate(photos.photos(6, SIZE)):
        image, rng = encoded(photo, format), np.random.default_rng(seed)
        box, flip = crops._random_box(rng, *SIZE), rng.random() < 0.5
        flips.add(flip)
        found = crops.random(image, size, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, plain_crop(image.image, size, box, flip))
        expected = plain_crop(image.image, size, crops._center_box(*SIZE), flip=False)
        np.testing.assert_array_equal(crops.center(image, size), expected)
    assert flips == {False, True}


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_jpeg_decoded_smaller_is_about_as_near_to_exact_resampling(size) -> None:
    box = crops._center_box(*SIZE)
    drafted, reduced = [], []
    for photo in photos.photos(4, SIZE):
        image = encoded(photo, "JPEG")
        exact = plain_crop(image.image, size, box, False, gap=None).astype(float)
        plain = plain_crop(image.image, size, box, False)
        drafted.append(np.abs(crops.center(image, size) - exact).mean())
        reduced.append(np.abs(plain - exact).mean())
    assert 0 < np.mean(drafted) < 1.2 * np.mean(reduced) < 1.5  # of 255


@pytest.mark.parametrize(
    ("size", "factor"), [(224, 1), (82, 1), (81, 2), (41, 2), (40, 4), (20, 8), (1, 8)]
)
def test_a_jpeg_keeps_two_pixels_a_pixel(size, factor) -> None:
    # The center is 328 pixels wide.
    image = Image.open(io.BytesIO(photos.encoded(Image.new("RGB", SIZE), "JPEG")))
    box = crops._center_box(*SIZE)
    assert crops._draft(image, box, size) == tuple(edge / factor for edge in box)
    assert image.size == tuple(-(-side // factor) for side in SIZE)


def test_the_center_of_an_image_is_evaluated() -> None:
    # Of 32 x 64 pixels: the middle 28 x 28.
    image = np.zeros((32, 64, 3), np.uint8)
    image[2:30, 18:46] = 200
    pixels = crops.center(encoded(image), 7)
    np.testing.assert_array_equal(pixels[1:-1, 1:-1], 200)
    assert pixels.min() > 100  # at the edge, pixels outside have a share


def test_crops_are_inside_of_area_and_aspect_and_flipped_by_half() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crops._random_box(rng, 80, 60) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0
    assert right.max() == 80
    assert bottom.max() == 60
    width, height = right - left, bottom - top
    area, aspect = width * height / 4800, width / height
    assert 0.07 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.7 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.4
    # The larger crops do not fit; of those that are drawn first, the mean is 0.54.
    assert 0.4 < area.mean() < 0.54
    gradient = np.tile(np.arange(0, 256, 8, np.uint8)[None, :, None], (32, 1, 3))
    image = encoded(gradient)
    found = [crops.random(image, 8, rng) for _ in range(400)]
    flipped = np.mean([int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in found])
    assert 0.42 < flipped < 0.58


def test_a_very_long_image_is_cropped_at_its_center() -> None:
    rng = np.random.default_rng(0)
    assert crops._random_box(rng, 1000, 2) == (499, 0, 501, 2)


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_every_mode_becomes_three_channels(mode, format) -> None:
    gray = np.full((9, 9), 100, np.uint8)
    converted = Image.fromarray(gray).convert("RGB").convert(mode)
    image = crops.center(encoded(converted, format), 4)
    assert image.shape == (4, 4, 3)
    np.testing.assert_allclose(image, 100, atol=3)
