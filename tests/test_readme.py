"""The README's examples, each copied into a file of its own and run."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import journal
from grid import experiment_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.S)
    if ">>>" not in block
]


def test_the_drop_in_example_is_there_and_short() -> None:
    (block,) = BLOCKS
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run_from_a_file(block, tmp_path) -> None:
    path = tmp_path / "example.py"
    path.write_text(block)
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(128, 10)\n"


def test_named_commands_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^([a-z]+ )*{target}( [a-z]+)*:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_figures_are_those_of_the_committed_results() -> None:
    path = ROOT / "examples" / "results" / "digits" / "results.json"
    for row in json.loads(path.read_text())["methods"]:
        mean, spread = 100 * row["test_accuracy"], 100 * row["spread"]
        cells = f"{100 * row['measured']:.1f} % | {mean:.1f} ± {spread:.1f} %"
        assert f"| {row['method']} | {cells} |" in README

    path = ROOT / "examples" / "results" / "digits-mlp" / "results.json"
    rows = {row["method"]: row for row in json.loads(path.read_text())["methods"]}
    few, some, all_rows, virtual = (
        100 * rows[name]["test_accuracy"] for name in ("bs:4", "bs:8", "bn", "vdn:4")
    )
    assert f"{few:.1f} % instead of {all_rows:.1f} %" in README
    moved = 100 * rows["bs:4~3/4"]["test_accuracy"]
    assert f"{moved:.1f} % with `running_weight=0.75`" in README
    edges = " ".join((ROOT / "docs" / "sharp_edges.md").read_text().split())
    assert f"reaches {all_rows:.1f} % of test accuracy with all rows" in edges
    assert f"{some:.1f} % with `BatchSampling(8)`, and {few:.1f} % with" in edges
    assert f"{virtual:.1f} % with four of them" in edges

    ratios = [
        result["ratio"]
        for dtype in ("float32", "bfloat16")
        for result in json.loads(
            (ROOT / "benchmarks" / "results" / f"layer-cpu-{dtype}.json").read_text()
        )["results"]
        if result["variant"] not in ("flax", "all")
    ]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of" in README


def test_accuracies_of_the_study_are_those_of_the_committed_results() -> None:
    def accuracy(norm: str, rows: int | None = None) -> str:
        found = [
            100 * record["test_accuracy"][-1]
            for record in journal.read(ROOT / "examples" / "results" / "reduced.jsonl")
            for experiment in [experiment_of(record)]
            if (experiment.norm, experiment.rows) == (norm, rows)
            and experiment.dtype == "float32"
            and experiment.fold == (rows is None)
            and experiment.fresh_virtual
        ]
        assert len(found) == 3
        return f"{statistics.mean(found):.1f} %"

    for text in (
        f"{accuracy('fs:1/64')} in the study below, BN {accuracy('bn')}",
        f"two rows at a time: {accuracy('fs:1/64+vdn:2~3/4', 2)}, where BN has "
        f"{accuracy('bn', 2)} and group norm {accuracy('gn')}",
        f"which needs more of the training step, {accuracy('mabn', 2)}",
    ):
        assert text in " ".join(README.split())


def test_accuracies_of_binary_networks_are_those_of_the_committed_results() -> None:
    path = ROOT / "examples" / "results" / "binary8" / "results.json"
    found = {
        row["method"]: f"{100 * row['test_accuracy']:.1f} %"
        for row in json.loads(path.read_text())["methods"]
    }
    page = (ROOT / "docs" / "normalizers" / "norm_free.md").read_text()
    assert (
        f"{found['bn']} with BN, {found['nf']} with the three ingredients, and "
        f"{found['none']} with BN removed"
    ) in " ".join(page.split())


def test_training_times_are_those_of_the_committed_results() -> None:
    path = ROOT / "benchmarks" / "results" / "train-step-cpu-float32.json"
    ratio = {
        (row["variant"], row["batch_size"]): row["ratio"]
        for row in json.loads(path.read_text())["results"]
    }
    small, large = (ratio["FS 1/64 folded", size] for size in (32, 128))
    for text in (
        f"takes {small:.2f} of the time in batches of 32, {large:.2f} in those of 128",
        f"`BatchSampling(8)` of 32 rows takes {ratio['BS 8 folded', 32]:.2f}.",
    ):
        assert text in " ".join(README.split())


def test_traffic_is_that_of_the_committed_results() -> None:
    def rows(target: str) -> dict[str, dict[str, float]]:
        path = ROOT / "benchmarks" / "results" / f"traffic-{target}-resnet50.json"
        results = json.loads(path.read_text())["results"]
        return {row["variant"]: row for row in results}

    def cells(variant: str) -> Iterator[str]:
        few = variant.replace("FS 1/64", "FS 1/64 groups=8")
        for target, name in (("h200", variant), ("v5e", few)):
            given = rows(target)
            row, bn = given[name], given["flax BN"]
            for key in ("traffic_bytes", "temp_bytes"):
                ratio = f" ({row[key] / bn[key]:.2f} x)" if row is not bn else ""
                yield f"{row[key] / 1e9:.1f} GB{ratio}"

    for variant in ("flax BN", "FS 1/64 folded", "no norm"):
        assert f"| {variant} | {' | '.join(cells(variant))} |" in README
    bn, folded, none = (
        rows("h200")[name] for name in ("flax BN", "FS 1/64 folded", "no norm")
    )
    for row, key, text in (
        (folded, "traffic_bytes", "**{:.2f} x the bytes**"),
        (folded, "temp_bytes", "**{:.2f} x the temporary memory**"),
        (none, "traffic_bytes", "would move {:.2f} x"),
        (folded, "compile_seconds", "takes {:.1f} times as long"),
    ):
        assert text.format(row[key] / bn[key]) in " ".join(README.split())
