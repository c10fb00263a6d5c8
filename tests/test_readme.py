"""The README's examples, copied into a file and run, and its figures."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import journal
from harness.grid import Experiment, experiment_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_switching_a_model_is_one_line() -> None:
    (line,) = [line for line in BLOCKS[0].splitlines() if "this line is new" in line]
    assert line.startswith("model = sbn.linen.sample_norms(Net())")


def test_examples_print_what_is_shown(tmp_path) -> None:
    path = tmp_path / "example.py"
    path.write_text("\n".join(BLOCKS))
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(re.findall(r"```text\n(.*?)```", README, re.S))


def test_named_commands_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^([a-z]+ )*{target}( [a-z]+)*:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_figures_are_those_of_the_committed_results() -> None:
    path = ROOT / "examples" / "results" / "digits-mlp" / "results.json"
    rows = {row["method"]: row for row in json.loads(path.read_text())["methods"]}
    few, some, whole, virtual = (
        100 * rows[name]["test_accuracy"] for name in ("bs:4", "bs:8", "bn", "vdn:4")
    )
    moved = 100 * rows["bs:4~3/4"]["test_accuracy"]
    edges = " ".join((ROOT / "docs" / "sharp_edges.md").read_text().split())
    assert f"reaches a test accuracy of {whole:.1f} % with all examples" in edges
    assert f"{some:.1f} % with `BatchSampling(8)`, and {few:.1f} % with" in edges
    assert f"With `running_weight=0.75` four examples reach {moved:.1f} %." in edges
    assert f"stay the same in every step reach {virtual:.1f} %." in edges

    ratios = [
        result["ratio"]
        for dtype in ("float32", "bfloat16")
        for result in json.loads(
            (ROOT / "benchmarks" / "results" / f"layer-cpu-{dtype}.json").read_text()
        )["results"]
        if result["variant"] == "Lattice"
    ]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of" in README


def cifar10(width: int) -> list[tuple[Experiment, journal.Record]]:
    """Returns the main study's training runs with networks of a width."""
    records = journal.read(ROOT / "examples" / "results" / "main.jsonl")
    runs = [(experiment_of(record), record) for record in records]
    return [(e, r) for e, r in runs if (e.dataset, e.width) == ("cifar10", width)]


def test_accuracies_of_small_batches_are_those_of_the_committed_results() -> None:
    trained = cifar10(width=16)

    def accuracy(norm: str, images: int | None = 2) -> str:
        found = [
            100 * record["test_accuracy"][-1]
            for experiment, record in trained
            if (experiment.norm, experiment.norm_batch_size) == (norm, images)
        ]
        assert len(found) == 3
        return f"{statistics.mean(found):.1f} %"

    for text in (
        f"{accuracy('lattice~3/4')} with 2 images per device; batch norm reaches "
        f"{accuracy('bn')}, group norm {accuracy('gn', None)} |",
        f"| {accuracy('lattice+vdn:2~3/4')} there; two [virtual images]",
        f"| {accuracy('mabn')} there; measures everything",
        f"with small batches, batch norm reaches {accuracy('bn', None)} when all 128",
    ):
        assert text in " ".join(README.split())


def distances(norm: str, seeds: int) -> list[str]:
    """Last loss and test accuracy, in points, less batch norm's of the same seed."""
    records = {
        (experiment.norm, experiment.seed): record
        for experiment, record in cifar10(width=32)
    }
    pairs = [(records[norm, seed], records["bn", seed]) for seed in range(seeds)]
    cells = []
    for unit, places, key in ((1, 3, "train_loss"), (100, 1, "test_accuracy")):
        apart = [unit * (one[key][-1] - bn[key][-1]) for one, bn in pairs]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        cells.append(f"{statistics.mean(apart):+.{places}f} ± {error:.{places}f}")
    return cells


def test_accuracies_of_the_main_study_are_those_of_the_committed_results() -> None:
    found: dict[str, list[float]] = {}
    for experiment, record in cifar10(width=32):
        accuracy = 100 * record["test_accuracy"][-1]
        found.setdefault(experiment.norm, []).append(accuracy)
    bn, lattice = (
        f"{statistics.mean(found[norm]):.1f} ± {statistics.stdev(found[norm]):.1f} %"
        for norm in ("bn", "lattice")
    )
    count = len(found["lattice"])
    assert len(found["bn"]) == count
    loss, _ = distances("lattice", count)
    _, patch = distances("fs:1/64", len(found["fs:1/64"]))
    assert patch.startswith("-")
    assert f"(1 / 64)` ends {patch[1:]} points below batch norm;" in README
    words = {3: "three", 4: "four", 5: "five"}
    assert (
        f"a ResNet-8 reaches {bn} with batch norm and {lattice} with "
        "`LatticeSampling()`. "
        f"Their final training losses differ by {loss} "
        f"([{words[count]} training runs each]"
    ) in " ".join(README.split())


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
    small, large = (ratio["Lattice folded", size] for size in (32, 128))
    assert (
        f"takes {small:.2f}\u00d7 as long as one with batch norm at batch size 32, and "
        f"{large:.2f}\u00d7 at batch size 128."
    ) in " ".join(README.split())


def test_traffic_is_that_of_the_committed_results() -> None:
    def rows(target: str, model: str = "resnet50") -> dict[str, dict[str, float]]:
        path = ROOT / "benchmarks" / "results" / f"traffic-{target}-{model}.json"
        results = json.loads(path.read_text())["results"]
        return {row["variant"]: row for row in results}

    found = {target: rows(target) for target in ("h200", "v5e")}

    def ratio(target: str, variant: str, key: str, digits: int = 2) -> str:
        given = found[target]
        return f"{given[variant][key] / given['Flax BN'][key]:.{digits}f}\u00d7"

    def cells(variant: str) -> Iterator[str]:
        for target, key, unit, of in (
            ("h200", "traffic_bytes", 1e9, "GB"),
            ("h200", "temp_bytes", 1e9, "GB"),
            ("v5e", "estimated_cycles", 1e6, "M"),
            ("v5e", "temp_bytes", 1e9, "GB"),
        ):
            apart = f" ({ratio(target, variant, key)})" if variant != "Flax BN" else ""
            yield f"{found[target][variant][key] / unit:.1f} {of}{apart}"

    for variant in ("Flax BN", "Lattice folded", "no norm"):
        assert f"| {variant} | {' | '.join(cells(variant))} |" in README
    readme = " ".join(README.split())
    for target, variant, key, text in (
        ("h200", "Lattice folded", "traffic_bytes", "{} the memory traffic"),
        ("h200", "Lattice folded", "temp_bytes", "{} the temporary memory"),
        ("v5e", "Lattice folded", "estimated_cycles", "{} the estimated cycles"),
        ("v5e", "Lattice folded", "temp_bytes", "{} the memory.**"),
    ):
        assert text.format(ratio(target, variant, key)) in readme
    for target, text in (
        ("h200", "**Compiling** takes {} times as long on the GPU"),
        ("v5e", "On the TPU it takes {} times as long"),
    ):
        slower = ratio(target, "Lattice folded", "compile_seconds", 1)[:-1]
        assert text.format(slower) in readme
    dense = rows("h200", "densenet121")
    less = dense["Lattice folded"]["traffic_bytes"] / dense["Flax BN"]["traffic_bytes"]
    assert f"still moves [{less:.2f}\u00d7]" in readme
