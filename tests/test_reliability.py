"""The scripts behind the page of reliability, and what the page promises."""

import json

import pytest

from reliability import bad_examples, extremes, fuzz, normalizers, soak
from reports import reliability_tables


@pytest.mark.parametrize(
    ("name", "harmless"),
    [("vdn:4 folded", 12), ("bs:4", 12), ("fs:1/16", 0), ("lattice folded", 0)],
)
def test_a_bad_example_that_is_not_measured_harms_no_other(name, harmless) -> None:
    results = bad_examples.measure(name, "NaN")
    kept = [result for result in results if not result.state]
    assert sum(result.places for result in kept) == harmless
    assert all((result.examples, result.changed) == (0, 0) for result in kept)
    for result in results:
        if result.state:
            assert result.examples == bad_examples.SHAPE[0] - 1


def test_a_masked_example_of_zeros_harms_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bad_examples, "FILLS", {"NaN": bad_examples.FILLS["NaN"]})
    cures = {name: bad_examples.CURES[name] for name in ("nothing", "zero and mask")}
    monkeypatch.setattr(bad_examples, "CURES", cures)
    path = tmp_path / "results" / "examples.json"
    argv = ["--method", "fs:1/16", "--json", str(path)]
    assert bad_examples.main(argv) == 0
    worst, cured = json.loads(path.read_text())["results"]
    lost = ("examples", "changed", "state", "example_gradients", "gradients")
    assert [worst[name] for name in lost] == [15, 0, True, 15, True]
    assert [cured[name] for name in lost] == [0, 0, False, 0, False]
    lines = capsys.readouterr().out.replace(" ", "").splitlines()
    assert "|fs:1/16|any|allexamples|lost|allexamples|lost|nowhere|" in lines
    assert "|zeroandmask|1|0|0|0|0|0|" in lines
    with pytest.raises(SystemExit):
        bad_examples.main(argv)


def test_extremes_are_compared_with_float64(tmp_path, capsys) -> None:
    path = tmp_path / "extremes.json"
    cases = ["constant 1000.1", "mean 1e4", "empty mask", "one example"]
    argv = ["--method", "bs:4", "--case", *cases, "--json", str(path)]
    assert extremes.main(argv) == 0
    results = {row["case"]: row for row in json.loads(path.read_text())["results"]}
    assert results["constant 1000.1"]["y_error"] < 1e-5
    assert results["mean 1e4"]["y_error"] < 1e-2
    assert results["empty mask"]["kept"]
    assert results["one example"]["error"].startswith("Expected num_samples")
    assert "refused" in capsys.readouterr().out


def test_every_method_says_whether_it_takes_a_mask() -> None:
    without = {
        name
        for name, method in normalizers.METHODS.items()
        if not normalizers.takes_mask(method)
    }
    assert without == {
        "MovingAverageBatchNorm",
        "GroupNorm (flax)",
        "FilterResponseNorm",
    }


def test_random_layers_are_counted(tmp_path, capsys) -> None:
    path = tmp_path / "fuzz.json"
    argv = ["--layers", "2", "--data", "2", "--json", str(path)]
    assert fuzz.main(argv) == 0
    report = json.loads(path.read_text())
    assert report["failures"] == []
    assert sum(row["cases"] for row in report["results"]) >= 2
    assert "| all " in capsys.readouterr().out


def test_a_failure_is_written_down(tmp_path, monkeypatch) -> None:
    def fail(layer, data):
        raise AssertionError("off by one")

    monkeypatch.setattr(fuzz.fuzzing, "check", fail)
    path = tmp_path / "fuzz.json"
    assert fuzz.main(["--layers", "1", "--data", "1", "--json", str(path)]) == 1
    (failure,) = json.loads(path.read_text())["failures"]
    assert failure["error"] == "off by one"
    assert failure["layer"].startswith("Layer(form=")


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_training_keeps_its_memory_and_its_program(
    api, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(soak, "MODEL", "mlp")
    monkeypatch.setattr(soak, "NETWORKS", {api: soak.NETWORKS[api]})
    monkeypatch.setattr(soak, "METHODS", soak.METHODS[:1])
    path = tmp_path / "soak.json"
    argv = ["--steps", "6", "--every", "2", "--json", str(path)]
    assert soak.main(argv) == 0
    (row,) = json.loads(path.read_text())["results"]
    assert [look["programs"] for look in row["looks"]] == [1, 1, 1]
    assert "2 and 6" in capsys.readouterr().out


def test_more_arrays_or_programs_are_told() -> None:
    look = {"arrays": 3, "array_bytes": 12, "programs": 1, "loss": 1.0}
    assert not soak.grew([look, look])
    for worse in ({"arrays": 4}, {"programs": 2}, {"loss": float("nan")}):
        assert soak.grew([look, {**look, **worse}])


def test_every_table_is_of_a_script() -> None:
    kinds = {kind for kind, _ in reliability_tables.TABLES.values()}
    assert kinds == {"bad_examples", "extremes", "fuzz", "soak", "kill_and_resume"}
