"""Writes the committed results into the documentation: tables, captions and charts.

``docs/benchmarks.md``, ``docs/scaling.md`` (many devices) and ``docs/reliability.md``
get the results in benchmarks/results, the newest of each device and case.
``docs/accuracy.md`` gets the studies in examples/ and the noise of samples,
``docs/normalizers.md`` the study of all normalizers, and ``docs/tutorial.md`` a run of
``make demo``. Only text between the markers of a page, such as
``<!-- begin: block -->`` and ``<!-- end -->``, is replaced. ``--check`` writes nothing
and fails if a page is out of date.
"""

import collections
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import comparison
from harness.command_line import Parser
from reports import (
    curves,
    modes_table,
    noise_table,
    plots,
    reliability_tables,
    studies,
    tables,
    theme,
)

ROOT = Path(__file__).parents[2]

# What tells reports and cases apart: of equal ones the newest is shown.
_REPORT = ("benchmark", "device", "dtype")
_CASE = ("target", "model", "batch_size", "layer", "shape", "library")
# What the names of charts begin with, a page each.
_BENCH, _NETWORK, _RELIABILITY = "bench", "network", "reliability"
_STUDY, _NORMALIZERS, _DEMO = "study", "micro-batches", "demo"

Report = dict[str, Any]


class Page(NamedTuple):
    """A page of the documentation, and what is to stand on it.

    Attributes:
      path: of the page.
      charts: what the names of all its charts begin with.
      sections: texts by the names of their markers.
      draw: draws the charts into a folder.
    """

    path: Path
    charts: str
    sections: dict[str, str]
    draw: Callable[[Path], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Updates or checks the pages and returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only check the pages")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="root of the repository"
    )
    args = parser.parse_args(argv)
    found = studies.read(args.root / "examples")
    reports = newest(read(args.root / "benchmarks" / "results"))
    pages = [
        *result_pages(args.root, reports),
        *study_pages(args.root, found, reports),
        *demo_pages(args.root),
    ]
    old = [page for page in pages if not update(page, write=not args.check)]
    for page in old if args.check else ():
        print(f"{page.path} is out of date: run {Path(__file__).name}", file=sys.stderr)
    return int(args.check and bool(old))


def result_pages(root: Path, reports: Sequence[Report]) -> list[Page]:
    """Returns the pages of results: of one device, of many, and of reliability."""
    many = {"scaling", "decoding"}
    one = tables.TABLES.keys() - many
    return [
        result_page(root / "docs" / name, charts, found, reports)
        for name, charts, found in (
            ("benchmarks.md", _BENCH, {k: (k, tables.TABLES[k]) for k in one}),
            ("scaling.md", _NETWORK, {k: (k, tables.TABLES[k]) for k in many}),
            ("reliability.md", _RELIABILITY, reliability_tables.TABLES),
        )
    ]


def result_page(
    path: Path,
    charts: str,
    found: Mapping[str, tuple[str, Callable[[Report], str]]],
    reports: Sequence[Report],
) -> Page:
    """Returns a page of results; what was not measured yet is not on it.

    Args:
      path: of the page.
      charts: what the names of its charts begin with.
      found: by name of a section, the kind of its reports and their table.
      reports: of all kinds.
    """
    kinds = {kind for kind, _ in found.values()}
    kinds &= {report["benchmark"] for report in reports}

    def draw(folder: Path) -> None:
        for report in reports:
            if report["benchmark"] in kinds:
                plots.draw(report, charts, folder)

    sections = {
        name: section(kind, table, reports, charts)
        for name, (kind, table) in found.items()
        if kind in kinds
    }
    return Page(path, charts, sections, draw)


def study_pages(
    root: Path, found: Sequence[studies.Study], reports: Sequence[Report]
) -> list[Page]:
    """Returns the pages of accuracies: of all studies, and of all normalizers.

    What samples do to gradients stands on the first of them.
    """
    apart = [study for study in found if study.kind == "normalizers"]
    others = [study for study in found if study.kind != "normalizers"]
    path = root / "docs" / "accuracy.md"
    table = {
        "noise": ("noise", noise_table.noise_table),
        "modes": ("modes", modes_table.modes_table),
    }
    return [
        joined(
            study_page(path, _STUDY, others), result_page(path, _STUDY, table, reports)
        ),
        study_page(root / "docs" / "normalizers.md", _NORMALIZERS, apart),
    ]


def study_page(path: Path, charts: str, found: Sequence[studies.Study]) -> Page:
    """Returns a page of studies; of which nothing was trained yet are not on it."""
    found = [study for study in found if study.started]

    def draw(folder: Path) -> None:
        for study in found:
            curves.draw(study, charts, folder)

    sections = {}
    for study in found:
        names = curves.files(study, charts)
        shown = images(names, curves.ALT.get(study.kind, ""))
        sections[study.name] = studies.section(study, shown)
    return Page(path, charts, sections, draw)


def demo_pages(root: Path) -> list[Page]:
    """Returns the page with a run of the demonstration, if there is one."""
    folder = root / "examples" / "results" / "digits"
    if not folder.exists():
        return []
    demo = comparison.Report.read(folder)
    files = {name: f"{_DEMO}-digits-{name}.svg" for name in theme.THEMES}

    header, lines = demo.cells()
    section = [
        f"**{demo.about['title']}**, {demo.about['machine']}, "
        f"{demo.about['date'][:10]}; {tables.versions(demo.about)}.",
        tables.markdown(header, lines, left=1),
        *images(files, "Training loss and test error of the methods by epoch"),
    ]
    return [
        Page(
            root / "docs" / "tutorial.md",
            _DEMO,
            {"demo": "\n\n".join(section)},
            lambda static: theme.save(lambda *_: demo.figure(), files, static),
        )
    ]


def joined(page: Page, more: Page) -> Page:
    """Returns a page with the sections and charts of both."""

    def draw(folder: Path) -> None:
        page.draw(folder)
        more.draw(folder)

    return page._replace(sections=page.sections | more.sections, draw=draw)


def update(page: Page, *, write: bool) -> bool:
    """Writes a page and its charts, if wanted; returns whether they were up to date."""
    old = page.path.read_text()
    new = replace_sections(old, page.sections)
    static = page.path.parent / "_static"
    named = re.findall(rf"_static/({page.charts}[\w.-]+)", new)
    charts = {static / name for name in named}
    there = set(static.glob(f"{page.charts}-*"))
    if write:
        page.draw(static)
        for path in there - charts:
            path.unlink()
        page.path.write_text(new)
    return new == old and charts == there


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
        stem = re.sub(r"\W+", "-", " ".join(about)).lower()
        count[stem] += 1
        if count[stem] > 1:
            stem += f"-{count[stem]}"
        kept.append({**report, "results": rows, "stem": stem})
    return kept


def section(
    kind: str, table: Callable[[Report], str], reports: Sequence[Report], prefix: str
) -> str:
    """Returns what stands between two markers: tables of a kind of benchmark."""
    chosen = [report for report in reversed(reports) if report["benchmark"] == kind]
    chosen.sort(key=lambda report: report.get("platform") == "cpu")  # those come last
    parts = []
    for report in chosen:
        charts = images(plots.files(report, prefix), report["what"])
        parts += [caption(report), *charts, table(report)]
    return "\n\n".join(parts)


def caption(report: Report) -> str:
    """Returns device, versions and date of a table."""
    if "device" in report:
        where = f"{report['device']}, {report['machine']}"
    else:
        targets = dict.fromkeys(row["target"] for row in report["results"])
        where = f"Compiled for {', '.join(targets)}"
    about = ", ".join([where, *([report["dtype"]] if "dtype" in report else [])])
    rounds = f"; medians of {report['rounds']} rounds" if "rounds" in report else ""
    date = report["date"][:10]
    return f"**{about}**, {date}{rounds}; {tables.versions(report)}."


def images(files: Mapping[str, str], alt: str) -> list[str]:
    """Returns a chart for each theme of the page, given its files by theme."""
    return [
        f"```{{image}} _static/{name}\n:class: only-{theme}\n:alt: {alt}\n```"
        for theme, name in files.items()
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
