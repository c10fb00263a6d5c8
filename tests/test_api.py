"""The public names: each on a page of the API, and the same layers in both APIs."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flax_sbn as sbn
from docs import signatures

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(page.relative_to(DOCS)): page.read_text()
    for page in sorted((DOCS / "api").rglob("*.md"))
}
NAMESPACES = {
    "flax_sbn": sbn,
    "flax_sbn.alternatives": sbn.alternatives,
    "flax_sbn.linen": sbn.linen,
    "flax_sbn.nnx": sbn.nnx,
    "flax_sbn.optim": sbn.optim,
}


def documented(page: str) -> list[str]:
    """The full names of what a page documents."""
    found, module = [], ""
    for directive, name in re.findall(
        r"(currentmodule|auto(?:class|function)):: ([\w.]+)", page
    ):
        if directive == "currentmodule":
            module = name
        else:
            found.append(f"{module}.{name}")
    return found


def summarized(page: str) -> list[str]:
    """The full names in the table that opens a page."""
    table = re.search(r"<!-- summary -->(.*)<!-- end -->", page, re.DOTALL)
    return [f"flax_sbn.{name}" for name in re.findall(r"^   ([\w.]+)$", table[1], re.M)]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_documented(namespace):
    names = {f"{namespace}.{name}" for name in NAMESPACES[namespace].__all__}
    found = {name for page in PAGES.values() for name in documented(page)}
    assert names - found - NAMESPACES.keys() == set()


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"api/alternatives.md"}))
def test_a_page_opens_with_a_table_of_its_names(page):
    assert summarized(PAGES[page]) == documented(PAGES[page])
    assert f"{{include}} {page}" in (DOCS / "api.md").read_text()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_signatures_are_those_of_the_source(namespace):
    for name in NAMESPACES[namespace].__all__:
        if f"{namespace}.{name}" not in NAMESPACES:
            obj = getattr(NAMESPACES[namespace], name)
            what = "class" if isinstance(obj, type) else "function"
            written, _ = signatures.write(None, what, name, obj, None, "", "")
            assert not re.search(r"<|^\(\*args", written), name


def test_a_signature_is_short():
    written, returned = signatures.write(
        None, "function", "", sbn.update_running, None, "", ""
    )
    assert written == (
        "(running: Statistics, statistics: Statistics, momentum: float | Array, *, "
        "std_epsilon: float | None=None)"
    )
    assert returned == "Statistics"


def test_a_layer_takes_fields_of_the_class_it_derives_from():
    written, _ = signatures.write(
        None, "class", "", sbn.linen.BatchRenorm, None, "", ""
    )
    assert written.startswith("(use_running_average: bool | None=None, axis: int=-1")
    assert "epsilon: float=1e-5, dtype: DTypeLike | None=None" in written
    assert "running_weight: float=1.0" in written  # not the 0 of BatchNorm
    assert "r_max: Schedule=Ramp(begin=5000" in written
    assert "parent" not in written


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


LAYERS = [name for name in sbn.linen.__all__ if name[0].isupper()]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The values that a function's arguments have of themselves."""
    given = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in given
        if p.default not in (p.empty, None) and not inspect.isroutine(p.default)
    }


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_are_those_of_the_function_and_of_the_other_api(name):
    linen, nnx = getattr(sbn.linen, name), getattr(sbn.nnx, name)
    function = re.sub("(?<!^)(?=[A-Z][a-z])", "_", name).lower()
    by_place = [defaults(linen), defaults(nnx.__init__)]
    for functions in (sbn, sbn.alternatives):
        if function in functions.__all__:
            by_place.append(defaults(getattr(functions, function)))
    for own in by_place[1:]:
        shared = by_place[0].keys() & own.keys() - {"norm_cls", "conv"}
        assert {n: own[n] for n in shared} == {n: by_place[0][n] for n in shared}
