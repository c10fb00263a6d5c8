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


def test_the_tutorial_walks_through_all_of_the_code() -> None:
    """So that it can be read where nothing builds the pages."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", tutorial, re.S)
    _, linen, nnx = (path.read_text() for path in SCRIPTS)
    *script, nnx_step = ("".join(block.split()) for block in blocks)
    _, _, code = linen.partition('"""\n')
    assert "".join(script) == "".join(code.split())
    assert nnx_step in "".join(nnx.split())
