"""The benchmark of decoders: every variant is timed and makes the pixels it should."""

import io
import json
import types

import numpy as np
import pytest
from PIL import Image

from speed import decoding
from tests import photos

SMALL = ("--photos", "2", "--images", "6", "--rounds", "1", "--threads", "2")


def test_it_writes_a_speed_for_every_variant(tmp_path, capsys) -> None:
    path = tmp_path / "results" / "decoding.json"
    argv = [*SMALL, "--decoders", "--side", "90", "--json", str(path)]
    assert decoding.main(argv) == 0
    report = json.loads(path.read_text())
    assert [row["variant"] for row in report["results"]] == 3 * [
        "decode: Pillow",
        "decode: Pillow, no array",
        "crop: Pillow",
        "crop: Pillow, step by step",
        "input: Pillow, 2 threads",
    ]
    assert [row["shape"] for row in report["results"][::5]] == [
        [500, 375],
        [120, 90],
        [2000, 1500],
    ]
    assert [row["ratio"] for row in report["results"][::5]] == [1, 1, 1]
    differences = [row["difference"] for row in report["results"]]
    assert differences[:10] == [0, 0, 0, 0, None] * 2
    assert max(differences[10:14]) < 1  # large ones may be decoded smaller
    assert all(row["images_per_second"] > 0 for row in report["results"])
    assert {"Pillow", "grain"} <= report["versions"].keys()
    assert "120 × 90 pixels" in capsys.readouterr().out

    before = path.read_text()
    with pytest.raises(SystemExit):
        decoding.main(argv)
    assert path.read_text() == before


def test_a_decoder_that_is_missing_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(decoding._MODULES, "opencv", ("no_such", "opencv-some"))
    argv = [*SMALL, "--decoders", "opencv", "--json", str(tmp_path / "new.json")]
    with pytest.raises(SystemExit) as error:
        decoding.main(argv)
    assert error.value.code == 2
    assert "pip install opencv-some" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_decoders_crop_and_flip_alike() -> None:
    def decode(file):
        return np.asarray(Image.open(io.BytesIO(file)))

    module = types.SimpleNamespace(decode_jpeg=decode)
    steps = decoding.variants({"simplejpeg": module}, 64)
    (photo,) = photos.photos(1, (300, 200))
    file = photos.encoded(photo)
    for number in range(6):
        expected = steps["crop: Pillow"](file, number)
        for name in "crop: simplejpeg, Pillow", "crop: Pillow, step by step":
            np.testing.assert_array_equal(steps[name](file, number), expected)
