"""Smaller copies of images: how small, as similar, written once and as a whole."""

import io

import numpy as np
import pytest
from PIL import Image

import shrink
from tests import photos


@pytest.fixture
def folder(tmp_path):
    """Four photos of 500 x 375 and 300 x 400 pixels, and a small one."""
    for number, size in enumerate([(500, 375), (300, 400), (60, 40)]):
        for split in ("train", "val"):
            path = tmp_path / "photos" / split / "class" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            (photo,) = photos.photos(1, size)
            path.write_bytes(photos.encoded(photo, "JPEG"))
    return tmp_path / "photos"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(folder, *more):
    return shrink.main([str(folder), str(folder.parent / "small"), *more])


def test_copies_are_smaller_and_originals_are_as_before(folder, capsys) -> None:
    before = contents(folder)
    assert run(folder, "--side", "100") == 0
    assert capsys.readouterr().out == "6 written\n"
    assert contents(folder) == before
    copies = contents(folder.parent / "small")
    assert copies.keys() == before.keys()
    for name, copy in copies.items():
        original = Image.open(io.BytesIO(before[name]))
        image = Image.open(io.BytesIO(copy))
        if name.endswith("2.JPEG"):
            assert copy == before[name]
            continue
        assert sorted(image.size) == [100, 133]
        assert (image.width > image.height) == (original.width > original.height)
        exact = original.resize(image.size, Image.Resampling.LANCZOS)
        assert np.abs(np.subtract(image, exact, dtype=float)).mean() < 5  # of 255


def test_the_same_command_goes_on_and_overwrites_nothing(folder, capsys) -> None:
    mine = folder.parent / "small" / "val" / "class" / "0.JPEG"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(folder) == 0
    assert mine.read_text() == "mine"
    before = contents(mine.parents[2])
    assert run(folder, "--side", "64") == 0
    assert contents(mine.parents[2]) == before
    assert capsys.readouterr().out.endswith("6 there already\n")


@pytest.mark.parametrize("threads", ["1", "3"])
def test_images_that_cannot_be_read_are_named_and_left_out(
    folder, threads, capsys
) -> None:
    for number in (0, 2):  # one to be shrunk, and one to be copied
        file = folder / "train" / "class" / f"{number}.JPEG"
        file.write_bytes(file.read_bytes()[:-200])
    assert run(folder, "--threads", threads) == 1
    captured = capsys.readouterr()
    assert sorted(captured.out.strip().split(", ")) == ["2 unreadable", "4 written"]
    assert captured.err.count("Expected an image in ") == 2
    assert str(file) in captured.err
    assert len(contents(folder.parent / "small")) == 4


def test_a_copy_is_never_half_there(folder, monkeypatch, capsys) -> None:
    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert run(folder) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not contents(folder.parent / "small")


def test_ctrl_c_stops_and_the_same_command_goes_on(folder, monkeypatch, capsys) -> None:
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shrink, "track", interrupted)
        assert run(folder) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert run(folder) == 0
    assert contents(folder.parent / "small").keys() == contents(folder).keys()


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "CMYK"])
def test_formats_stay_and_modes_are_those_that_training_reads(mode, format) -> None:
    format = "JPEG" if mode == "CMYK" else format
    (photo,) = photos.photos(1, (90, 60))
    encoded = photos.encoded(photo.convert(mode), format)
    image = Image.open(io.BytesIO(shrink.shrink(encoded, 30, 90)))
    assert (image.format, image.size) == (format, (45, 30))
    exact = (
        Image.open(io.BytesIO(encoded)).convert("RGB").resize((45, 30), reducing_gap=2)
    )
    error = np.subtract(image.convert("RGB"), exact, dtype=float)
    assert np.abs(error).mean() < 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "x"], "Expected FROM to be a folder"),
        (["photos", "photos"], "Expected TO to be outside of FROM"),
        (["photos", "photos/small"], "Expected TO to be outside of FROM"),
        (["photos/train/empty", "x"], "found none"),
        (["photos", "x", "--side", "0"], "--side must be at least 1"),
    ],
)
def test_bad_options_are_told_by_the_parser(
    folder, monkeypatch, capsys, argv, message
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "train" / "empty").mkdir()
    with pytest.raises(SystemExit) as error:
        shrink.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["photos"]
