"""The minimal examples: short, and their loss falls."""

import re
import runpy

import pytest

from tests.test_readme import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("minimal_*.py"))


def test_there_are_three() -> None:
    names = [path.stem.removeprefix("minimal_") for path in SCRIPTS]
    assert names == ["functions", "linen", "nnx"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_learns_in_less_than_eighty_lines(path, capsys) -> None:
    assert len(path.read_text().splitlines()) < 80
    runpy.run_path(str(path))
    printed = capsys.readouterr().out
    losses = [*map(float, re.findall(r"loss ([\d.]+)", printed))]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    accuracy = re.search(r"test accuracy ([\d.]+)%", printed)
    assert float(accuracy.group(1)) > 90
