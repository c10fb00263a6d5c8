"""A folder of small real images, as ImageNet's are laid out, and what became of it."""

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
    TENSORS,
    EventAccumulator,
)
from tensorboard.util import tensor_util

from harness.data import load_digits
from tests.photos import encoded

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
            path.write_bytes(
                encoded(Image.fromarray(images[index, :, :, 0] * 15), "PNG")
            )
    return folder


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
