"""The page of results: its markers, the newest results, the numbers in its tables."""

import json
from pathlib import Path

import pytest

import report
import tables

ROOT = Path(__file__).parents[1]
ABOUT = {
    "device": "Some GPU",
    "machine": "4 cores, Some CPU",
    "platform": "gpu",
    "dtype": "bfloat16",
    "rounds": 3,
    "versions": {"jax": "0.10.2"},
    "what": "time against flax's",
}


def step(model: str, variant: str, ratio: float | None, **fields) -> dict:
    row = {
        "model": model,
        "batch_size": 256,
        "variant": variant,
        "images_per_second": ratio and 1000 / ratio,
        "ratio": ratio,
        "memory_bytes": 2_500_000_000,
        "peak_bytes": None,
        "compile_seconds": 61.4,
        "error": None,
    }
    return {**row, **fields}


def results(date: str, *rows: dict) -> dict:
    return {**ABOUT, "benchmark": "train_step", "date": date, "results": list(rows)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A page without numbers, and results of two days."""
    markers = "".join(
        f"<!-- begin: {kind} -->\n<!-- end -->\n" for kind in tables.TABLES
    )
    (tmp_path / "page.md").write_text(f"# Mine\n{markers}The end.\n")
    (tmp_path / "_static").mkdir()
    for day, speed in ("01", 0.9), ("02", 0.5):
        rows = [
            step("resnet50", "flax BN", 1.0),
            step("resnet50", "FS 1/64 folded", speed),
        ]
        if day == "01":
            rows.append(step("resnet18", "flax BN", None, error="out of memory"))
        content = json.dumps(results(f"2026-11-{day}", *rows))
        (tmp_path / f"{day}.json").write_text(content)
    return tmp_path


def run(folder: Path, *more: str) -> int:
    argv = ["--results", str(folder), "--page", str(folder / "page.md"), *more]
    return report.main(argv)


def test_the_page_shows_the_newest_results_between_its_markers(folder) -> None:
    assert run(folder, "--check") == 1
    assert run(folder) == 0
    page = (folder / "page.md").read_text()
    assert page.startswith("# Mine\n<!-- begin: ")
    assert page.endswith("<!-- end -->\nThe end.\n")
    caption = (
        "**Some GPU, 4 cores, Some CPU, bfloat16**, 2026-11-02; medians of 3 rounds;"
    )
    assert f"{caption} jax 0.10.2." in page
    rows = [line.replace(" ", "") for line in page.splitlines() if "resnet" in line]
    assert rows == [
        "|resnet18|256|flaxBN|outofmemory|-|2.50|-|61|",
        "|resnet50|256|flaxBN|1,000|1.00|2.50|-|61|",
        "|resnet50|256|FS1/64folded|2,000|2.00|2.50|-|61|",
    ]


def test_check_fails_when_anything_is_out_of_date(folder) -> None:
    run(folder)
    assert run(folder, "--check") == 0
    chart = next(folder.glob("_static/bench*-dark.svg"))
    chart.unlink()
    assert run(folder, "--check") == 1
    run(folder)
    (folder / "03.json").write_text(
        json.dumps(results("2026-11-03", step("resnet50", "flax BN", 1.0)))
    )
    assert run(folder, "--check") == 1


def test_charts_that_the_page_no_longer_shows_are_removed(folder) -> None:
    old = folder / "_static" / "bench-train_step-old-light.svg"
    old.touch()
    run(folder)
    assert not old.exists()


def test_a_page_without_the_markers_is_an_error(folder) -> None:
    (folder / "page.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="begin: "):
        run(folder)


def test_the_committed_page_is_up_to_date() -> None:
    assert report.main(["--check"]) == 0
