"""The figures of reliability as Markdown: in the terminal and on their page."""

from collections.abc import Callable, Iterable
from typing import Any

from reports.tables import Report, markdown, number

Row = dict[str, Any]


def bad_examples_table(report: Report) -> str:
    """Returns what a bad example takes along: methods that are alike share lines."""
    found = [row for row in report["results"] if row["cure"] == "nothing"]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, rows in by_method(found).items():
        lines = tuple(
            (share(row), *outcome(row, report["shape"][0]))
            for row in rows
            if row["fill"] == "NaN"
        )
        single = [row for row in rows if row["fill"] == "one NaN" and row["examples"]]
        spread = share(single[0]) if single else "nowhere"
        alike.setdefault((lines, spread), []).append(name)
    table = [
        [", ".join(names), *line, spread] if i == 0 else ["", *line, ""]
        for (lines, spread), names in alike.items()
        for i, line in enumerate(lines)
    ]
    header = ["method", "bad example", "lost: output", "running statistics"]
    header += ["input's gradient", "parameters' gradients"]
    header += ["one NaN spreads from"]
    text = markdown(header, table, left=len(header))
    other = [
        name
        for name, rows in by_method(found).items()
        if _outcomes(rows, "inf") != _outcomes(rows, "NaN")
    ]
    but = f", except with {', '.join(other)}" if other else ""
    return f"{text}\n\nInfinities in place of NaN give the same result{but}."


def cures_table(report: Report) -> str:
    """Returns for how many methods something is lost, by what is done about it."""
    lines = []
    for cure in dict.fromkeys(row["cure"] for row in report["results"]):
        found = [
            row
            for row in report["results"]
            if row["cure"] == cure and row["fill"] == "NaN"
        ]
        methods = by_method(found)
        counts = [
            str(sum(any(row[lost] for row in rows) for rows in methods.values()))
            for lost in (
                "examples",
                "changed",
                "state",
                "example_gradients",
                "gradients",
            )
        ]
        lines.append([cure, str(len(methods)), *counts])
    header = [
        "remedy",
        "methods",
        "other examples lost",
        "other examples changed",
    ]
    header += ["running statistics lost", "other examples' gradients lost"]
    header += ["parameters' gradients lost"]
    return markdown(header, lines, left=1)


def extremes_table(report: Report) -> str:
    """Returns errors of output and gradient: a row a method, a column a case."""
    names = list(dict.fromkeys(row["case"] for row in report["results"]))
    lines = []
    for method, rows in by_method(report["results"]).items():
        cells = {row["case"]: verdict(row) for row in rows}
        lines.append([method, *(cells.get(name, "-") for name in names)])
    return markdown(["method", *names], lines, left=1)


def verdict(row: Row) -> str:
    """Returns the errors of output and gradient, or what went wrong."""
    if row["error"]:
        return "refused"
    if row["case"] == "empty mask" and row["kept"] is not None:
        kept = "kept" if row["kept"] else "changed"
        return kept if row["finite"] else f"{kept}, output NaN"
    if not row["finite"]:
        return "NaN"
    if row["zero"]:
        return "wrongly zero" if (row["y_error"] or 0) > 0.01 else "zero"
    if not row["finite_state"]:
        return "statistics lost"
    if not row["finite_gradients"]:
        return "gradient lost"
    if row["y_error"] is None:
        return "finite"
    return f"{row['y_error']:.0e}, {row['gradient_error']:.0e}"


def fuzz_table(report: Report) -> str:
    """Returns how many cases there were, by each of their properties."""
    lines = []
    for name in ("form", "dtype", "mesh", "sampler"):
        for value in dict.fromkeys(row[name] for row in report["results"]):
            rows = [row for row in report["results"] if row[name] == value]
            lines.append([name, value.replace("NoneType", "none"), *_counted(rows)])
    lines.append(["all", "", *_counted(report["results"])])
    header = ["", "", "compared", "refused", "failed", "worst error / allowed"]
    drawn = f"{report['layers']} layers, drawn with seed {report['seed']}:"
    return f"{drawn}\n\n{markdown(header, lines, left=2)}"


def _counted(rows: list[Row]) -> list[str]:
    counts = [
        sum(row["cases"] for row in rows if row["outcome"] == outcome)
        for outcome in ("compared", "refused", "failed")
    ]
    worst = [row["worst"] for row in rows if row["worst"] is not None]
    return [*map(str, counts), number(max(worst, default=None))]


def soak_table(report: Report) -> str:
    """Returns what there was after the warm-up and at the end."""
    lines = []
    for row in report["results"]:
        first, last = row["looks"][0], row["looks"][-1]
        most = max(look["resident_bytes"] or 0 for look in row["looks"])
        lines.append(
            [
                row["api"],
                row["method"],
                f"{first['step']:,} and {last['step']:,}",
                f"{first['arrays']} and {last['arrays']}",
                *(number(look["array_bytes"] / 1e3, 1) for look in (first, last)),
                *(_megabytes(look["resident_bytes"]) for look in (first, last)),
                _megabytes(most),
                str(last["programs"]),
            ]
        )
    header = ["", "norms", "steps", "arrays", "kB", "kB at the end", "process, MB"]
    header += ["at the end", "at most", "programs"]
    return markdown(header, lines, left=2)


def _megabytes(value: int | None) -> str:
    return number(value and value / 1e6, 1)


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns rows by their methods, in order."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def _outcomes(rows: list[Row], fill: str) -> list[Row]:
    return [{**row, "fill": ""} for row in rows if row["fill"] == fill]


def share(row: Row) -> str:
    """Returns for how many places a result holds."""
    if row["places"] == row["of"]:
        return "any"
    return f"{row['places']} of {row['of']}"


def outcome(row: Row, num_examples: int) -> list[str]:
    """Returns what is lost, in words."""

    def with_it(others: int) -> str:
        if others == 0:
            return "that example"
        return (
            "all examples" if others == num_examples - 1 else f"{others + 1} examples"
        )

    return [
        with_it(row["examples"]),
        "lost" if row["state"] else "kept",
        with_it(row["example_gradients"]),
        "lost" if row["gradients"] else "kept",
    ]


def resume_table(report: Report) -> str:
    """Returns what became of training runs that were interrupted, and the sums."""
    rows = report["results"]
    lines = [
        [
            str(number),
            str(row["killed"]),
            str(row["terminated"]),
            str(row["half_written"]),
            f"{row['steps']:,}",
            f"{row['repeated']:,}",
            str(row["missing"]),
            str(row["differing"]),
            "the same" if row["parameters_equal"] else "different",
        ]
        for number, row in enumerate(rows, 1)
    ]
    sums = (sum(int(line[i].replace(",", "")) for line in lines) for i in range(1, 8))
    lines.append(["all", *(f"{value:,}" for value in sums), ""])
    header = ["run", "SIGKILL", "SIGTERM", "checkpoints torn", "steps"]
    header += ["repeated", "losses missing", "losses differing", "parameters"]
    return markdown(header, lines, left=1)


# By the names of the page's markers: a kind of benchmark, and a table of its reports.
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "bad-examples": ("bad_examples", bad_examples_table),
    "cures": ("bad_examples", cures_table),
    "extremes": ("extremes", extremes_table),
    "fuzz": ("fuzz", fuzz_table),
    "soak": ("soak", soak_table),
    "resume": ("kill_and_resume", resume_table),
}
