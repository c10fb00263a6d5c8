"""Images from the disk: what is found, what is read, and which batch holds what."""

import io
import re

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from harness import records
from harness.data import DataError
from harness.pipeline import DiskInput, FakeInput, Folder, find
from tests import pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures.write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(folder):
    """The same images in ArrayRecord files, in two of them to train with."""
    out = folder / "packed"
    out.mkdir()
    splits = find(folder)
    half = len(splits.train) // 2
    for name, source, numbers in (
        ("train-0", splits.train, range(half)),
        ("train-1", splits.train, range(half, len(splits.train))),
        ("validation", splits.test, range(len(splits.test))),
    ):
        encoded = [source[number] for number in numbers]
        write_records(out / f"{name}.array_record", encoded)
    return out


def write_records(path, images, names=("image", "label")) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image in images:
        example = records.Example()
        features = example.features.feature
        features[names[0]].bytes_list.value.append(image.image)
        features[names[1]].int64_list.value.append(image.label)
        writer.write(example.SerializeToString())
    writer.close()


def make(folder, *, batch_size=8, seed=0, skip=False, **options):
    return DiskInput(find(folder, **options), 8, batch_size, seed, 2, skip)


def taken(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same_batches(first, second) -> None:
    for one, other in zip(first, second, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_classes_are_folders_in_alphabetical_order(folder) -> None:
    splits = find(folder)
    assert splits.train.classes == ("digit-0", "digit-1", "digit-2")
    assert (len(splits.train), len(splits.test)) == (pictures.TRAIN, pictures.TEST)
    for number in range(len(splits.train)):
        encoded = splits.train[number]
        assert f"digit-{encoded.label}" in encoded.name
    assert splits.num_classes == pictures.CLASSES


def test_to_begin_takes_no_longer_with_many_files(folder) -> None:
    class File:
        def __repr__(self):
            raise AssertionError("names all files")

    few = find(folder)
    many = few._replace(train=Folder((File(),) * 9, (0,) * 9, ("a",)))
    DiskInput(many, 8, 3, 0, 1, False).train(0)
    str(many)


def test_an_epoch_has_every_image_once_and_the_next_another_order(folder) -> None:
    read = []

    class Spy:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            read.append(index)
            return self.source[index]

    splits = find(folder)
    disk = DiskInput(splits._replace(train=Spy(splits.train)), 8, 10, 0, 0, False)
    taken(disk.train(0), 2 * pictures.TRAIN // 10)
    epochs = read[: pictures.TRAIN], read[pictures.TRAIN : 2 * pictures.TRAIN]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(pictures.TRAIN)]
    assert epochs[0] != epochs[1]


def test_a_batch_is_told_by_seed_and_number(folder) -> None:
    batches = taken(make(folder).train(0), 9)  # more than an epoch
    assert_same_batches(taken(make(folder).train(4), 5), batches[4:])
    other = next(make(folder, seed=1).train(0))
    assert (other["image"] != batches[0]["image"]).any()


def test_records_are_read_as_files_are(folder, packed) -> None:
    of_records = make(packed, num_classes=3)
    assert of_records.num_images == pictures.TRAIN
    assert_same_batches(taken(of_records.train(3), 2), taken(make(folder).train(3), 2))
    assert_same_batches([*of_records.test(8)], [*make(folder).test(8)])


def test_older_names_of_features_are_known(folder, tmp_path) -> None:
    names = ("image/encoded", "image/class/label")
    images = [find(folder).train[i] for i in range(3)]
    for split in ("train", "test"):
        write_records(tmp_path / f"x-{split}.array_record-0-of-1", images, names)
    assert find(tmp_path, 3).test[2][1:] == images[2][1:]


@pytest.mark.parametrize("names", [("picture", "label"), ("image", "class")])
def test_records_without_image_or_label_are_an_error(folder, tmp_path, names) -> None:
    for split in ("train", "val"):
        path = tmp_path / f"{split}.array_record"
        write_records(path, [find(folder).train[0]], names)
    with pytest.raises(DataError, match=r"Expected a tf\.train\.Example with image"):
        find(tmp_path, 3).train[0]


def test_processes_share_each_batch(folder, monkeypatch) -> None:
    whole = taken(make(folder).train(2), 3)
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        parts.append((taken(make(folder).train(2), 3), [*make(folder).test(8)]))
    for number, batch in enumerate(whole):
        images = np.stack([parts[p][0][number]["image"] for p in range(2)], 1)
        np.testing.assert_array_equal(images.reshape(8, 8, 8, 3), batch["image"])
    labels = np.concatenate([batch["label"] for p in parts for batch in p[1]])
    assert len(labels) == 24  # of 21, in batches of 8
    assert sorted(labels[labels >= 0]) == sorted(find(folder).test.labels)


def test_the_last_batch_of_a_test_is_padded(folder) -> None:
    batches = [*make(folder).test(8)]
    assert [len(batch["label"]) for batch in batches] == [8, 8, 8]
    assert (batches[-1]["label"] < 0).tolist() == [False] * 5 + [True] * 3
    assert not batches[-1]["image"][5:].any()


def damaged(folder, tmp_path, count=1):
    """A copy in which some images are cut off."""
    copy = pictures.write_folder(tmp_path / "copy")
    files = find(copy).train.files[:count]
    for file in files:
        file.write_bytes(file.read_bytes()[:30])
    return copy, files


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path) -> None:
    copy, (file,) = damaged(folder, tmp_path)
    with pytest.raises(DataError, match=re.escape(str(file))):
        taken(make(copy).train(0), 7)


def test_the_next_image_takes_its_place(folder, tmp_path) -> None:
    copy, _ = damaged(folder, tmp_path, 3)
    batches = taken(make(copy, batch_size=10, skip=True).train(0), 5)  # an epoch
    skipped = np.concatenate([batch["skipped"] for batch in batches])
    assert sorted(skipped[skipped > 0]) == [1, 2, 3]
    whole = taken(make(folder, batch_size=10).train(0), 5)
    for batch, other in zip(batches, whole, strict=True):
        same = batch["skipped"] == 0
        np.testing.assert_array_equal(batch["image"][same], other["image"][same])


def test_damaged_metadata_is_no_warning(tmp_path) -> None:
    encoded = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\0"
    Image.new("RGB", (9, 9)).save(encoded, "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(encoded)
    for split in ("train", "val"):
        file = tmp_path / split / "a" / "0.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded.getvalue())
    assert len([*make(tmp_path).test(8)]) == 1


def test_without_a_single_image_that_can_be_read_there_is_an_error(
    folder, tmp_path
) -> None:
    copy, _ = damaged(folder, tmp_path, pictures.TRAIN)
    with pytest.raises(DataError, match="None of the images can be read"):
        next(make(copy, skip=True).train(0))


def test_a_label_that_is_no_class_is_an_error(packed) -> None:
    with pytest.raises(DataError, match=r"label below 2, got 2 for record \d+ of"):
        taken(make(packed, num_classes=2).train(0), 7)


def no_train(path) -> None:
    (path / "val" / "a").mkdir(parents=True)


def no_images(path) -> None:
    for split in ("train", "val"):
        (path / split / "a").mkdir(parents=True)


def other_classes(path) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        file = path / split / name / "0.png"
        file.parent.mkdir(parents=True)
        file.touch()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (no_train, "Expected folders train and val, or ArrayRecord files"),
        (no_images, "Expected a folder of images for each class"),
        (other_classes, "'a' is in one of them only"),
    ],
)
def test_folders_of_another_form_are_refused(tmp_path, build, message) -> None:
    build(tmp_path)
    with pytest.raises(DataError, match=message):
        find(tmp_path)


def test_the_number_of_classes_is_that_of_the_folders(folder, packed) -> None:
    with pytest.raises(DataError, match="Expected 5 classes"):
        find(folder, 5)
    with pytest.raises(DataError, match="--num-classes"):
        find(packed)


def test_noise_is_always_the_same() -> None:
    fake = FakeInput(8, 16, 5)
    first, second = taken(fake.train(0), 1), taken(fake.train(7), 1)
    assert_same_batches(first, second)
    assert first[0]["image"].shape == (16, 8, 8, 3)
    assert first[0]["label"].max() < 5
    assert not [*fake.test(8)]
