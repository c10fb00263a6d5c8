"""The benchmark of training steps: what it writes, and what it survives."""

import json

import jax
import pytest

from speed import train_step

ARGV = ["--model", "mlp", "--batch-size", "16", "--rounds", "1", "--variant"]


def test_it_writes_a_row_for_every_variant(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train_step, "_MIN_SECONDS", 0.0)
    path = tmp_path / "results" / "steps.json"
    argv = [*ARGV, "Flax BN", "BS 8 folded", "--json", str(path)]
    assert train_step.main(argv) == 0
    report = json.loads(path.read_text())
    rows = {row["variant"]: row for row in report["results"]}
    rows.pop(train_step.TORCH, None)
    assert rows.keys() == {"Flax BN", "BS 8 folded"}
    assert rows["Flax BN"]["ratio"] == 1
    for row in rows.values():
        speed = 16 / (row["milliseconds"] / 1e3)
        assert row["images_per_second"] == pytest.approx(speed)
        assert row["memory_bytes"] > 0
        assert row["error"] is None
    assert {"device", "dtype", "versions", "date"} <= report.keys()
    assert "BS 8 folded" in capsys.readouterr().out

    before = path.read_text()
    with pytest.raises(SystemExit):
        train_step.main(argv)
    assert path.read_text() == before


class Step:
    """Stands in for a compiled step; ``"BS 8"`` does not fit into memory."""

    memory_bytes = 1

    def __init__(self, model: str, variant: str, *_) -> None:
        self.variant = variant

    def start(self) -> int:
        if self.variant == "BS 8":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 2

    def __call__(self) -> None:
        pass


def test_a_variant_without_memory_is_noted_and_the_others_are_timed(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(train_step, "JaxStep", Step)
    monkeypatch.setattr(train_step, "_MIN_SECONDS", 0.0)
    path = tmp_path / "steps.json"
    assert train_step.main([*ARGV, "Flax BN", "BS 8", "--json", str(path)]) == 0
    reference, row, *_ = json.loads(path.read_text())["results"]
    assert (reference["ratio"], reference["peak_bytes"]) == (1, 2)
    assert (row["error"], row["ratio"]) == ("out of memory", None)


def test_other_errors_are_not_swallowed() -> None:
    row = train_step.Result("mlp", 16, "Flax BN")
    with pytest.raises(RuntimeError, match="shape"), train_step.noting(row):
        raise RuntimeError("wrong shape")
    assert row.error is None


def test_no_case_starts_when_the_time_is_up(tmp_path, capsys) -> None:
    argv = [*ARGV, "Flax BN", "--json", str(tmp_path / "steps.json"), "--minutes", "0"]
    assert train_step.main(argv) == 0
    assert "not measured: mlp with 16" in capsys.readouterr().err
