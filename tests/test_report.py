"""The page of results: its markers, the newest results, the numbers in its tables."""

import json
from pathlib import Path

import pytest

from harness import grid
from reports import curves, reliability_tables, report, studies, tables

ROOT = Path(__file__).parents[1]
PARTS = ("offset", "noise")
ABOUT = {
    "device": "Some GPU",
    "machine": "4 cores, Some CPU",
    "platform": "gpu",
    "dtype": "bfloat16",
    "rounds": 3,
    "versions": {"jax": "0.10.2"},
    "what": "time against flax's",
}


STUDY = """
epochs = 4
[[grids]]
norm = ["bn", "bs:4", "fs:1/64~3/4"]
seed = [0, 1]
[[grids]]
norm = ["gn"]
seed = [0]
"""


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
    markers = {
        kind: f"<!-- begin: {kind} -->\n<!-- end -->\n" for kind in tables.TABLES
    }
    results_of, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    (docs / "_static").mkdir(parents=True)
    (docs / "scaling.md").write_text(markers.pop("scaling") + markers.pop("decoding"))
    (docs / "benchmarks.md").write_text(
        f"# Mine\n{''.join(markers.values())}The end.\n"
    )
    (docs / "accuracy.md").write_text(
        "# Mine\n<!-- begin: noise -->\n<!-- end -->\n"
        "<!-- begin: modes -->\n<!-- end -->\n"
        "<!-- begin: ratio-short -->\n<!-- end -->\n"
    )
    (docs / "normalizers.md").write_text("# All of them\n")
    (docs / "reliability.md").write_text(
        "".join(
            f"<!-- begin: {name} -->\n<!-- end -->\n"
            for name in reliability_tables.TABLES
        )
    )
    results_of.mkdir(parents=True)
    (tmp_path / "examples" / "studies").mkdir(parents=True)
    (tmp_path / "examples" / "studies" / "ratio-short.toml").write_text(STUDY)
    for day, speed in ("01", 0.9), ("02", 0.5):
        rows = [
            step("resnet50", "Flax BN", 1.0),
            step("resnet50", "FS 1/64 folded", speed),
        ]
        if day == "01":
            rows.append(step("resnet18", "Flax BN", None, error="out of memory"))
        content = json.dumps(results(f"2026-11-{day}", *rows))
        (results_of / f"{day}.json").write_text(content)
    return tmp_path


def run(folder: Path, *more: str) -> int:
    return report.main(["--root", str(folder), *more])


def test_the_page_shows_the_newest_results_between_its_markers(folder) -> None:
    assert run(folder, "--check") == 1
    assert run(folder) == 0
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert page.startswith("# Mine\n<!-- begin: ")
    assert page.endswith("<!-- end -->\nThe end.\n")
    caption = (
        "**Some GPU, 4 cores, Some CPU, bfloat16**, 2026-11-02; medians of 3 rounds;"
    )
    assert f"{caption} jax 0.10.2." in page
    rows = [line.replace(" ", "") for line in page.splitlines() if "resnet" in line]
    assert rows == [
        "|resnet18|256|FlaxBN|outofmemory|-|2.50|-|61|",
        "|resnet50|256|FlaxBN|1,000|1.00|2.50|-|61|",
        "|resnet50|256|FS1/64folded|2,000|2.00|2.50|-|61|",
    ]


def test_check_fails_when_anything_is_out_of_date(folder) -> None:
    run(folder)
    assert run(folder, "--check") == 0
    chart = next(folder.glob("docs/_static/bench*-dark.svg"))
    chart.unlink()
    assert run(folder, "--check") == 1
    run(folder)
    (folder / "benchmarks" / "results" / "03.json").write_text(
        json.dumps(results("2026-11-03", step("resnet50", "Flax BN", 1.0)))
    )
    assert run(folder, "--check") == 1


def test_charts_that_the_page_no_longer_shows_are_removed(folder) -> None:
    old = folder / "docs" / "_static" / "bench-train_step-old-light.svg"
    old.touch()
    run(folder)
    assert not old.exists()


def test_a_page_without_the_markers_is_an_error(folder) -> None:
    (folder / "docs" / "benchmarks.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="begin: "):
        run(folder)


def trained(norm: str, seed: int, accuracy: float, loss: float, **other) -> str:
    """A line of results of a training."""
    return json.dumps(
        {
            "experiment": {"norm": norm, "seed": seed, "epochs": 4, **other},
            "train_loss": [9.0, 8.0, 3.0, loss],
            "test_accuracy": [0.1, 0.2, 0.3, accuracy],
            "measured": 0.25,
            "date": "2026-11-03",
            **ABOUT,
        }
    )


def test_a_study_is_compared_with_batch_norm_seed_by_seed(folder) -> None:
    path = folder / "examples" / "results" / "short.jsonl"
    path.parent.mkdir()
    lines = [
        trained("bn", 0, 0.50, 1.0),
        trained("bn", 1, 0.60, 1.1),
        trained("bs:4", 0, 0.48, 1.3),
        trained("bs:4", 1, 0.56, 1.5),
        trained("fs:1/64~3/4", 1, 0.61, 1.0),
        trained("bs:2", 0, 0.99, 0.0),  # of another study
    ]
    path.write_text("\n".join(lines) + "\n")
    assert run(folder) == 0
    page = (folder / "docs" / "accuracy.md").read_text()
    assert "**Short protocol**: resnet8, all training images of digits" in page
    assert "4 epochs, 1 to 2 seeds. 5 training runs (2 more to run) on Some GPU" in page
    rows = ["".join(line.split()) for line in page.splitlines() if "`" in line[:3]]
    rows = [row for row in rows if row.startswith("|")]
    assert rows == [
        "|`bn`|25.0%|55.0±7.1|-|3.00|1.05|-|",
        "|`bs:4`|25.0%|52.0±5.7|-3.0±1.0|3.00|1.40|+0.350±0.050|",
        "|`fs:1/64~3/4`|25.0%|61.0|+1.0|3.00|1.00|-0.100|",
    ]
    assert (folder / "docs" / "_static" / "study-ratio-short-dark.svg").exists()
    assert run(folder, "--check") == 0


def test_a_study_without_results_is_not_shown(folder) -> None:
    run(folder)
    page = (folder / "docs" / "accuracy.md").read_text()
    assert "<!-- begin: ratio-short -->\n<!-- end -->\n" in page
    assert not list(folder.glob("docs/_static/study*"))


def noise(sampler: str, batch_size: int, gradient: float) -> dict:
    """A result of a sampler."""
    errors = {f"{of}_{part}": 0.02 for of in ("mean", "log_var") for part in PARTS}
    return {
        "sampler": sampler,
        "batch_size": batch_size,
        "batches": 64,
        "measured": 0.125,
        "gradient": gradient,
        "gradient_error": 0.5 if gradient > 1 else 0.0,
        "statistics": [{"size": 32, **errors}],
    }


def test_the_noise_of_samples_is_shown_beside_the_studies(folder) -> None:
    rows = [
        noise("BatchSampling(8)", 128, 2.0),
        noise("a grid", 128, 0.123),
        noise("BatchSampling(8)", 8, 1e-12),
        noise("a grid", 8, 0.0451),
    ]
    network = {
        "settings": {"model": "resnet8", "width": 8, "epochs": 6},
        "train_size": 4096,
        "test_accuracy": 0.5,
    }
    result = results("2026-11-03", *rows) | {"benchmark": "noise"} | network
    (folder / "benchmarks" / "results" / "noise.json").write_text(json.dumps(result))
    assert run(folder) == 0
    page = (folder / "docs" / "accuracy.md").read_text()
    lines = ["".join(line.split()) for line in page.splitlines()]
    assert "|agrid|12.5%|0.12|0.045|" in lines
    assert "|`BatchSampling(8)`|12.5%|2.0±0.5|0|" in lines
    assert "|agrid|20,20|20,20|" in lines
    assert "for 6 epochs on 4,096 images of CIFAR-10 (test accuracy 50\xa0%)" in page
    for theme in ("light", "dark"):
        name = f"study-noise-some-gpu-bfloat16-{theme}.svg"
        assert f"_static/{name}" in page
        assert (folder / "docs" / "_static" / name).exists()
    assert run(folder, "--check") == 0


def test_normalizers_have_a_page_of_their_own(folder) -> None:
    grids = (
        '[[grids]]\nnorm = ["bn", "brn"]\nnorm_batch_size = 2\n'
        '[[grids]]\nnorm = ["bn", "frn"]\n'
    )
    examples, docs = folder / "examples", folder / "docs"
    (examples / "studies" / "normalizers-short.toml").write_text(f"epochs = 4\n{grids}")
    markers = "<!-- begin: normalizers-short -->\n<!-- end -->\n"
    (docs / "normalizers.md").write_text(f"# All of them\n{markers}")
    (examples / "results").mkdir()
    lines = [
        trained("bn", 0, 0.5, 1.0),
        trained("frn", 0, 0.4, 1.0),
        trained("bn", 0, 0.3, 1.0, norm_batch_size=2),
        trained("brn", 0, 0.35, 1.0, norm_batch_size=2),
    ]
    (examples / "results" / "short.jsonl").write_text("\n".join(lines) + "\n")
    assert run(folder) == 0
    page = (docs / "normalizers.md").read_text()
    rows = ["".join(line.split()) for line in page.splitlines() if line[:3] == "| `"]
    assert rows == ["|`bn`|30.0|50.0|", "|`brn`|35.0|-|", "|`frn`|-|40.0|"]
    charts = {path.name for path in docs.glob("_static/micro-batches-*")}
    assert charts == {
        f"micro-batches-normalizers-short-{theme}.svg" for theme in ("light", "dark")
    }
    assert "normalizers" not in (docs / "accuracy.md").read_text()
    assert run(folder, "--check") == 0


def test_a_study_by_images_is_a_table_of_images() -> None:
    grids = [{"norm": "bn"}, {"norm": ["bn", "gn"], "norm_batch_size": [2, 8]}]
    experiments = grid.experiments({"grids": grids})
    records = {
        experiment: {"test_accuracy": [0.1 * i]}
        for i, experiment in enumerate(experiments, start=1)
    }
    study = studies.Study("few-short", experiments, records)
    lines = [line.replace(" ", "") for line in studies.few_table(study).splitlines()]
    assert lines[0] == "|norm|2images|8images|all|"
    assert lines[2:] == ["|`bn`|20.0|40.0|10.0|", "|`gn`|30.0|50.0|-|"]


def study_of(norms, **of_norm) -> studies.Study:
    """A study with the losses and shares of each norm, the same for two seeds."""
    experiments = grid.experiments({"norm": norms, "seed": [0, 1]})
    records = {
        e: {
            "train_loss": [2.0, of_norm["loss"][e.norm] + 0.1 * e.seed],
            "test_accuracy": [0.1, 0.2],
            "measured": 0.1,
        }
        for e in experiments
    }
    return studies.Study("x-y", experiments, records)


def test_a_chart_of_shares_has_a_line_for_every_family() -> None:
    norms = ["bn", "lattice", "bs:1", "bs:2", "bs:2~3/4", "fs:1/4", "vdn:2", "ns:1"]
    study = study_of(norms, loss=dict.fromkeys(norms, 1.0))
    (axes,) = curves.ratio_chart(study, "black", "grey").axes
    drawn = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(drawn & {(s["color"], s["linestyle"]) for s in curves._STYLES}) == 6
    assert ("black", "--") in drawn


def test_a_chart_of_methods_shows_their_distance_from_batch_norm() -> None:
    loss = {"bn": 1.0, "lattice": 1.25, "fs:1/64": 1.5, "gn": 3.0}
    figure = curves.methods_chart(study_of([*loss], loss=loss), "black", "grey")
    losses, apart = figure.axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "batch norm",
        "LatticeSampling()",
        "FeatureSampling(1 / 64)",
    ]
    assert [line.get_ydata()[-1] for line in losses.lines] == [1.05, 1.3, 1.55]
    assert [list(line.get_ydata()) for line in apart.lines] == [
        [0, 0.25],
        [0, 0.5],
        [0, 0],
    ]


def test_the_committed_pages_are_up_to_date() -> None:
    assert report.main(["--check"]) == 0
