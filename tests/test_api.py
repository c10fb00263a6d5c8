"""The public names: each on the page of the API, and the same layers in both APIs."""

import re
from pathlib import Path

import pytest

import flax_sbn as sbn

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()
NAMESPACES = {
    "flax_sbn": sbn,
    "flax_sbn.alternatives": sbn.alternatives,
    "flax_sbn.linen": sbn.linen,
    "flax_sbn.nnx": sbn.nnx,
    "flax_sbn.optim": sbn.optim,
}


def documented() -> set[str]:
    """The full names of what the page documents."""
    found, module = set(), ""
    for directive, name in re.findall(
        r"(currentmodule|auto\w+):: ([\w.]+)", PAGE, re.MULTILINE
    ):
        if directive == "currentmodule":
            module = name
        else:
            found.add(name if name.startswith("flax_sbn.") else f"{module}.{name}")
    return found


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_documented(namespace):
    names = {f"{namespace}.{name}" for name in NAMESPACES[namespace].__all__}
    assert names - documented() - NAMESPACES.keys() == set()


@pytest.mark.parametrize("line", ["CITATION.cff: version: ", "CHANGELOG.md: ## "])
def test_the_version_is_the_same_everywhere(line):
    file, begin = line.split(": ", 1)
    assert f"\n{begin}{sbn.__version__}" in (ROOT / file).read_text()


def test_linen_and_nnx_have_the_same_layers():
    linen, nnx = (
        {name for name in api.__all__ if name[0].isupper()}
        for api in (sbn.linen, sbn.nnx)
    )
    assert nnx - linen == {"Loss", "OverwriteWithGradient"}  # kinds of variables
    assert linen <= nnx
