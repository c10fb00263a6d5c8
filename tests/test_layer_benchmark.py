"""The layer benchmark: every variant is timed, and nothing is overwritten."""

import json

import pytest

from speed import layer


@pytest.mark.parametrize("what", ["norm", "block"])
def test_it_writes_a_ratio_for_every_variant(
    what, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(layer.LAYER_SHAPES, "resnet50-stem", (4, 4, 8))
    monkeypatch.setitem(layer.CONVOLUTIONS, "resnet50-stem", ((8, 8, 3), 7, 2))
    for table in layer.SAMPLERS, layer.BLOCKS:
        for name in table.keys() - {"Flax", "conv", "all", "Lattice"}:
            monkeypatch.delitem(table, name)
    path = tmp_path / "results" / "layer.json"
    argv = ["--what", what, "--shape", "resnet50-stem", "--batch-size", "8"]
    argv += ["--rounds", "3", "--json", str(path)]
    assert layer.main(argv) == 0
    report = json.loads(path.read_text())
    rows = {row["variant"]: row for row in report["results"]}
    expected = {"Flax", *layer.SAMPLERS} if what == "norm" else layer.BLOCKS.keys()
    assert rows.keys() == expected
    assert rows["Flax"]["ratio"] == 1
    assert all(row["ratio"] > 0 for row in rows.values())
    assert {"device", "dtype", "versions", "date"} <= report.keys()
    assert "Lattice" in capsys.readouterr().out
    if what == "block":
        assert rows["conv"]["own_milliseconds"] == 0

    before = path.read_text()
    with pytest.raises(SystemExit):
        layer.main(argv)
    assert path.read_text() == before


def test_a_dense_layer_has_no_patches() -> None:
    variants = layer.norms("mlp", "float32")
    assert "BS 4" in variants
    assert not [variant for variant in variants if "FS" in variant]


def test_a_dense_layer_is_no_block(tmp_path) -> None:
    with pytest.raises(SystemExit):
        layer.main(["--what", "block", "--shape", "mlp"])


def test_a_norm_is_charged_what_its_block_takes_more_in_the_same_round(
    monkeypatch,
) -> None:
    seconds = {
        "Flax": [4.0, 9.0, 5.0],
        "conv": [2.0, 5.0, 3.0],
        "Lattice": [3.0, 6.0, 4.0],
        "Lattice folded": [2.5, 5.5, 3.5],
        "BS 8 folded": [1.0, 4.0, 2.0],
    }
    monkeypatch.setattr(layer, "compiled_step", lambda *args: None)
    monkeypatch.setattr(layer, "interleaved", lambda steps, rounds: seconds)
    results = layer.measure("block", "resnet50-stage1", 2, "float32", rounds=3)
    own = {result.variant: result.own_ratio for result in results}
    assert own == {
        "Flax": 1,
        "conv": 0,
        "Lattice": 0.5,
        "Lattice folded": 0.25,
        "BS 8 folded": -0.5,
    }
