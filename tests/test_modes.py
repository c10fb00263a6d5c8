"""The benchmark of training and evaluation mode: what it measures, by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from accuracy import modes
from harness.data import Dataset


def statistics(mean, var):
    return {"layer": {"norm": {"mean": jnp.array(mean), "var": jnp.array(var)}}}


def test_distances_are_in_deviations_and_logarithms() -> None:
    found = modes.distance(
        statistics([3.0, 0], [1.0, 1]), statistics([1.0, 0], [4.0, 1])
    )
    assert found == pytest.approx((0.5**0.5, np.log(4) / 2**0.5))


def test_every_epoch_of_every_method_is_measured(tmp_path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)

    def load(folder):
        images = rng.integers(0, 256, (256, 32, 32, 3), np.uint8)
        labels = rng.integers(0, 10, 256).astype(np.int32)
        return Dataset("cifar10", images, labels, images[:64], labels[:64], 10, True)

    monkeypatch.setattr(modes, "load_cifar10", load)
    path = tmp_path / "modes.json"
    argv = ["--data-dir", str(tmp_path), "--norm", "lattice", "--epochs", "2"]
    assert modes.main([*argv, "--images", "128", "--json", str(path)]) == 0
    first, last = json.loads(path.read_text())["results"]
    assert (first["epoch"], last["epoch"]) == (1, 2)
    for row in (first, last):
        assert all(0 <= row[name] <= 1 for name in ("running", "batch", "estimated"))
        # Running averages of so few steps lag behind.
        assert row["mean_error"] > 0.01
        assert row["log_var_error"] > 0.01
    assert "| `lattice` |     2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        modes.main([*argv, "--json", str(path)])
