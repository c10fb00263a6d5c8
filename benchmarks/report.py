"""Writes the committed results into docs/benchmarks.md: tables, captions and charts.

Reads the JSON of benchmarks/results and replaces what stands between the markers of the
page, such as ``<!-- begin: block -->`` and ``<!-- end -->``; the rest of the page is
left alone. Of each device and case the newest result counts. ``--check`` writes
nothing and fails if the page is not up to date.
"""

import argparse
import collections
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

# What tells reports and cases apart: of equal ones the newest is shown.
_REPORT = ("benchmark", "device", "dtype")
_CASE = ("target", "model", "batch_size", "layer", "shape")
_CHART = "bench"  # what the names of all charts begin with

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Updates or checks the page and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args(argv)

    reports = newest(read(args.results))
    old = args.page.read_text()
    new = replace_sections(
        old, {kind: section(kind, reports) for kind in tables.TABLES}
    )
    static = args.page.parent / "_static"
    charts = {static / name for name in re.findall(rf"_static/({_CHART}[\w.-]+)", new)}
    there = set(static.glob(f"{_CHART}-*"))
    if args.check:
        if new == old and charts == there:
            return 0
        print(f"{args.page} is out of date: run {Path(__file__).name}", file=sys.stderr)
        return 1
    for report in reports:
        plots.draw(report, static)
    for path in there - charts:
        path.unlink()
    args.page.write_text(new)
    return 0


def read(folder: Path) -> list[Report]:
    """Returns all reports of a folder, the newest first."""
    named = [
        (path.stem, json.loads(path.read_text())) for path in folder.glob("*.json")
    ]
    named.sort(key=lambda item: (item[1]["date"], item[0]), reverse=True)
    return [report for _, report in named]


def newest(reports: Sequence[Report]) -> list[Report]:
    """Returns reports without the cases that one before them has too.

    A case is what is compared with each other: the variants of a model or layer. Each
    report gets the stem of the file names of its chart.
    """
    seen: set[tuple[str, ...]] = set()
    count: collections.Counter[str] = collections.Counter()
    kept = []
    for report in reports:
        about = tuple(report[name] for name in _REPORT if name in report)
        cases = [
            (*about, *(str(row.get(name)) for name in _CASE))
            for row in report["results"]
        ]
        rows = [
            row
            for row, case in zip(report["results"], cases, strict=True)
            if case not in seen
        ]
        seen.update(cases)
        if not rows:
            continue
        stem = re.sub(r"\W+", "-", " ".join((_CHART, *about))).lower()
        count[stem] += 1
        if count[stem] > 1:
            stem += f"-{count[stem]}"
        kept.append({**report, "results": rows, "stem": stem})
    return kept


def section(kind: str, reports: Sequence[Report]) -> str:
    """Returns what stands between the markers of a kind of benchmark."""
    chosen = [report for report in reversed(reports) if report["benchmark"] == kind]
    chosen.sort(key=lambda report: report.get("platform") == "cpu")  # those come last
    parts = []
    for report in chosen:
        parts += [caption(report), *images(report), tables.TABLES[kind](report)]
    return "\n\n".join(parts or ["No results yet."])


def caption(report: Report) -> str:
    """Returns device, versions and date of a table."""
    if "device" in report:
        where = f"{report['device']}, {report['machine']}"
    else:
        targets = dict.fromkeys(row["target"] for row in report["results"])
        where = f"Compiled for {', '.join(targets)}"
    rounds = f"; medians of {report['rounds']} rounds" if "rounds" in report else ""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    date = report["date"][:10]
    return f"**{where}, {report['dtype']}**, {date}{rounds}; {versions}."


def images(report: Report) -> list[str]:
    """Returns the chart of a report, if it has one, for each theme of the page."""
    return [
        f"```{{image}} _static/{name}\n:class: only-{theme}\n"
        f":alt: {report['what']}\n```"
        for theme, name in plots.files(report).items()
    ]


def replace_sections(page: str, sections: dict[str, str]) -> str:
    r"""Returns the page with new text between its markers.

    Raises:
      ValueError: if the page has no place, or two, for a section.

    Example:
      >>> page = "Speed\n<!-- begin: block -->\nold\n<!-- end -->\n"
      >>> replace_sections(page, {"block": "new"})
      'Speed\n<!-- begin: block -->\n\nnew\n\n<!-- end -->\n'
    """
    for name, text in sections.items():
        place = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        parts = place.split(page)
        if len(parts) != 4:
            raise ValueError(
                f"Expected the page to have one <!-- begin: {name} --> and then "
                f"<!-- end -->, got {len(parts) // 3}."
            )
        before, begin, end, after = parts
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    sys.exit(main())
