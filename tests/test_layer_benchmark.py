"""The layer benchmark: every variant is timed, and nothing is overwritten."""

import json

import pytest

import layer


def test_it_writes_a_ratio_for_every_variant(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(layer.LAYER_SHAPES, "small", (4, 4, 8))
    monkeypatch.setattr(layer, "_MIN_SECONDS", 0.0)
    path = tmp_path / "results" / "layer.json"
    argv = ["--shape", "small", "--batch-size", "8", "--rounds", "3"]
    assert layer.main([*argv, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    ratios = {row["variant"]: row["ratio"] for row in report["results"]}
    assert ratios.keys() == {"flax", *layer.SAMPLERS}
    assert ratios["flax"] == 1
    assert all(ratio > 0 for ratio in ratios.values())
    assert {"device", "dtype", "versions", "date"} <= report.keys()
    assert "FS+VDN" in capsys.readouterr().out

    before = path.read_text()
    with pytest.raises(SystemExit):
        layer.main([*argv, "--json", str(path)])
    assert path.read_text() == before


def test_a_dense_layer_has_no_patches() -> None:
    variants = [r.variant for r in layer.measure("mlp", 8, "float32", rounds=1)]
    assert "BS 4" in variants
    assert not [variant for variant in variants if "FS" in variant]
