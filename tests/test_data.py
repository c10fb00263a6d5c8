"""The data sets of the examples: every form of CIFAR-10 reads alike, damage is told."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import tasks
from harness.data import DataError, load_cifar10, load_digits

PER_FILE = 4


class Malicious:
    """Runs code when it is unpickled, unless the reader refuses."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6 * PER_FILE, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.arange(6 * PER_FILE) % 10


def planes(images: np.ndarray) -> np.ndarray:
    """The official layout: red, green and blue planes one after the other."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def names(pattern: str, test: str) -> list[str]:
    return [pattern.format(i) for i in range(1, 6)] + [test]


def write_python(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for i, name in enumerate(names("data_batch_{}", "test_batch")):
        part = slice(i * PER_FILE, (i + 1) * PER_FILE)
        batch = {b"data": planes(images[part]), b"labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_binary(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    records = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
    for i, name in enumerate(names("data_batch_{}.bin", "test_batch.bin")):
        (folder / name).write_bytes(
            records[i * PER_FILE : (i + 1) * PER_FILE].tobytes()
        )


def write_jpeg(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    arrays = {}
    for split, part in (
        ("train", slice(5 * PER_FILE)),
        ("test", slice(-PER_FILE, None)),
    ):
        files = []
        for image in images[part]:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = labels[part].astype(np.uint8)
    np.savez(folder / "cifar10_jpeg.npz", **arrays)


WRITERS = {
    "data_batch_1": write_python,
    "data_batch_1.bin": write_binary,
    "cifar10_jpeg.npz": write_jpeg,
}


def test_digits_are_the_real_scans_and_the_test_split_is_held_out() -> None:
    digits = load_digits()
    assert digits.train_images.shape == (1347, 8, 8, 1)
    assert digits.test_images.shape == (450, 8, 8, 1)
    assert set(digits.test_labels) == set(digits.train_labels) == set(range(10))
    assert digits.train_images.dtype == np.uint8
    assert digits.limited(7).train_images.shape == (7, 8, 8, 1)


def test_sequences_hide_one_digit_of_their_class() -> None:
    found, digits = tasks.load_sequences(), load_digits()
    assert found.train_images.shape == (1000, 512, 1)
    for images, labels, ink, classes in (
        (
            found.train_images,
            found.train_labels,
            digits.train_images,
            digits.train_labels,
        ),
        (found.test_images, found.test_labels, digits.test_images, digits.test_labels),
    ):
        hidden = np.round(ink.reshape(-1, 64) * (255 / 16)).astype(np.uint8)
        whole = {
            lines.tobytes(): label for lines, label in zip(hidden, classes, strict=True)
        }
        for image, label in zip(images[:20, :, 0], labels[:20], strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(image, 64)
            there = {whole.get(np.ascontiguousarray(w).tobytes()) for w in windows}
            assert there == {None, label}


def test_scenes_label_the_pixels_of_digits() -> None:
    found, again = tasks.load_scenes(), tasks.load_scenes()
    assert found.test_images.shape == (250, 64, 64, 1)
    assert found.test_labels.shape == (250, 64, 64)
    np.testing.assert_array_equal(found.train_labels, again.train_labels)
    np.testing.assert_array_equal(found.train_images, again.train_images)
    on_digits = found.train_labels < 10
    assert 0.1 < on_digits.mean() < 0.2
    assert found.train_images[..., 0][on_digits].min() > 4 * 255 / 16
    assert set(np.unique(found.train_labels)) == set(range(11))
    with pytest.raises(ValueError, match="image size that divides 64 x 64 of scenes"):
        found.resized(32)


@pytest.mark.parametrize("nested", [False, True], ids=["itself", "one level down"])
@pytest.mark.parametrize("marker", ["data_batch_1", "data_batch_1.bin"])
def test_official_forms_read_exactly(tmp_path, images, labels, marker, nested) -> None:
    folder = tmp_path / "cifar-10" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    WRITERS[marker](folder, images, labels)
    dataset = load_cifar10(tmp_path)
    np.testing.assert_array_equal(dataset.train_images, images[:-PER_FILE])
    np.testing.assert_array_equal(dataset.test_images, images[-PER_FILE:])
    np.testing.assert_array_equal(dataset.train_labels, labels[:-PER_FILE])
    np.testing.assert_array_equal(dataset.test_labels, labels[-PER_FILE:])


def test_jpeg_form_reads_to_compression(tmp_path, labels) -> None:
    smooth = np.linspace(0, 200, 32)[:, None, None] + np.arange(3) * 20
    images = np.broadcast_to(smooth[:, :, :], (6 * PER_FILE, 32, 1, 3)).repeat(32, 2)
    write_jpeg(tmp_path, images.astype(np.uint8), labels)
    dataset = load_cifar10(tmp_path)
    assert dataset.train_images.shape == (5 * PER_FILE, 32, 32, 3)
    error = dataset.train_images.astype(float) - images[: 5 * PER_FILE]
    assert abs(error).mean() < 3
    np.testing.assert_array_equal(dataset.test_labels, labels[-PER_FILE:])


def test_missing_and_empty_folders_are_told(tmp_path) -> None:
    with pytest.raises(DataError, match=r"to be a folder, got .*nowhere"):
        load_cifar10(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"found none of data_batch_1, .*archive"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("marker", list(WRITERS))
def test_a_truncated_file_is_told_by_name(tmp_path, images, labels, marker) -> None:
    WRITERS[marker](tmp_path, images, labels)
    whole = (tmp_path / marker).read_bytes()
    (tmp_path / marker).write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(DataError, match=f"{marker}.*damaged"):
        load_cifar10(tmp_path)


def test_a_batch_that_lost_whole_images_is_told(tmp_path, images, labels) -> None:
    write_binary(tmp_path, images, labels)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[: 2 * 3073])
    with pytest.raises(DataError, match=r"of one size, got .*'data_batch_3.bin': 2"):
        load_cifar10(tmp_path)


def test_a_missing_batch_is_told_by_name(tmp_path, images, labels) -> None:
    write_binary(tmp_path, images, labels)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin.*No such file"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize(
    "batch",
    [
        {b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]},
        {b"data": np.zeros((2, 3072), np.uint8)},
        [1, 2],
    ],
    ids=["pixels", "labels", "no labels", "no dictionary"],
)
def test_pickles_of_another_form_are_told(tmp_path, images, labels, batch) -> None:
    write_python(tmp_path, images, labels)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=r"data_batch_2.*damaged"):
        load_cifar10(tmp_path)


def test_a_pickle_cannot_run_code(tmp_path, images, labels, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_python(tmp_path, images, labels)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(DataError, match="refers to"):
        load_cifar10(tmp_path)
    assert not (tmp_path / "harm").exists()
