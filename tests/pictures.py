"""A folder of small real images, as ImageNet's are laid out, and what became of it."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorboard.backend.event_processing.event_accumulator import (
    TENSORS,
    EventAccumulator,
)
from tensorboard.util import tensor_util

from harness.data import load_digits

CLASSES, TRAIN, TEST = 3, 50, 21


def write_folder(folder):
    """Writes the digits 0 to 2."""
    digits = load_digits()
    for split, images, labels, count in (
        ("train", digits.train_images, digits.train_labels, TRAIN),
        ("val", digits.test_images, digits.test_labels, TEST),
    ):
        chosen = np.flatnonzero(labels < CLASSES)[:count]
        for index in chosen:
            path = folder / split / f"digit-{labels[index]}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(images[index, :, :, 0] * 15))
    return folder


def photos(count, size):
    """Yields parts of scikit-learn's two photos, of ``(width, height)`` pixels."""
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        photo = whole[number % 2]
        left, top = rng.integers(np.subtract(photo.size, size), endpoint=True)
        yield photo.crop((left, top, left + size[0], top + size[1]))


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format)
    return file.getvalue()


def logged(out, name="train/loss"):
    """Returns all values that were logged under a name, by step."""
    log = EventAccumulator(
        str(out), size_guidance={TENSORS: 0}, purge_orphaned_data=False
    )
    log.Reload()
    values = {}
    for event in log.Tensors(name):
        value = float(tensor_util.make_ndarray(event.tensor_proto))
        values.setdefault(event.step, []).append(value)
    return values
