"""The benchmarks' numbers as Markdown: in the terminal and on the page of results."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

SPACE = "\N{NO-BREAK SPACE}"
Report = dict[str, Any]
Rows = list[dict[str, Any]]


class Column(NamedTuple):
    """A figure in a table: its name there and in a result, and how it is written."""

    label: str
    key: str
    unit: float = 1.0
    digits: int = 0


_TRAFFIC = (
    Column("traffic, GB", "traffic_bytes", 1e9, 1),
    Column("outside conv.", "outside_bytes", 1e9, 1),
    Column("XLA's, GB", "bytes_accessed", 1e9, 1),
    Column("memory, GB", "temp_bytes", 1e9, 2),
    Column("model, ms", "roofline_seconds", 1e-3, 1),
    Column("estimate, M cycles", "estimated_cycles", 1e6, 1),
    Column("kernels", "kernels"),
    Column("compile, CPU s", "compile_seconds"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Returns an aligned table; all but the first ``left`` columns hold numbers.

    Example:
      >>> print(markdown(["name", "time"], [["a", "1.0"], ["b", "10.0"]], left=1))
      | name | time |
      |------|-----:|
      | a    |  1.0 |
      | b    | 10.0 |
    """
    columns = list(zip(header, *rows, strict=True))
    width = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        texts = [
            cell.ljust(size) if i < left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(cells, width, strict=True))
        ]
        return f"| {' | '.join(texts)} |"

    rule = [
        "-" * (size + 2) if i < left else "-" * (size + 1) + ":"
        for i, size in enumerate(width)
    ]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def number(value: float | None, digits: int = 2) -> str:
    """Returns a number as text, and a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    r"""Returns a share as text.

    Example:
      >>> percent(0.125)
      '12.5\xa0%'
    """
    return f"{100 * value:.{digits}f}{SPACE}%"


def gigabytes(value: float | None) -> str:
    """Returns bytes in GB, of 10^9."""
    return number(None if value is None else value / 1e9)


def versions(record: Report) -> str:
    """Returns the versions of a result."""
    return ", ".join(f"{name} {v}" for name, v in record["versions"].items())


def variants(rows: Rows, *but: str) -> list[str]:
    """Returns the variants in order, but for some."""
    return [
        name
        for name in dict.fromkeys(row["variant"] for row in rows)
        if name not in but
    ]


def layer_table(report: Report) -> str:
    """Returns times relative to Flax's: a row a layer, a column a variant."""
    rows = report["results"]
    names = variants(rows, "Flax")
    lines = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        cells = by_variant(row for row in rows if tuple(row["shape"]) == shape)
        ratios = [number(cells[n]["ratio"]) if n in cells else "-" for n in names]
        flax = number(cells["Flax"]["milliseconds"], 1)
        lines.append(["×".join(map(str, shape)), flax, *ratios])
    return markdown(["input", "Flax, ms", *names], lines, left=1)


def block_table(report: Report) -> str:
    """Returns times of blocks, and each norm's own cost relative to Flax's."""
    rows = report["results"]
    ours = variants(rows, "Flax", "conv")
    lines = []
    for name in dict.fromkeys(row["layer"] for row in rows):
        cells = by_variant(row for row in rows if row["layer"] == name)
        lines.append(
            [
                "×".join(map(str, cells["Flax"]["shape"])),
                number(cells["conv"]["milliseconds"]),
                number(cells["Flax"]["own_milliseconds"]),
                *(number(cells[label]["own_ratio"]) for label in ours),
                *(number(cells[label]["ratio"]) for label in ours),
            ]
        )
    header = [
        "output",
        "convolution, ms",
        "Flax's norm, ms",
        *(f"{label}: norm" for label in ours),
        *(f"{label}: block" for label in ours),
    ]
    return markdown(header, lines, left=1)


def train_step_table(report: Report) -> str:
    """Returns speed and memory of training steps: a row a model, batch and variant."""
    lines = []
    models = list(dict.fromkeys(row["model"] for row in report["results"]))
    for row in sorted(
        report["results"],
        key=lambda row: (models.index(row["model"]), row["batch_size"]),
    ):
        ratio, speed = row["ratio"], row["images_per_second"]
        lines.append(
            [
                row["model"],
                str(row["batch_size"]),
                row["variant"],
                row["error"] or number(speed, 0 if speed >= 100 else 1),
                number(ratio and 1 / ratio),
                gigabytes(row["memory_bytes"]),
                gigabytes(row["peak_bytes"]),
                number(row["compile_seconds"], 0),
            ]
        )
    header = ["model", "batch", "variant", "images/s", "/ Flax BN"]
    header += ["compiled, GB", "in use, GB", "compile, s"]
    return markdown(header, lines, left=3)


def traffic_table(report: Report, references: Sequence[str] = ("Flax BN",)) -> str:
    """Returns bytes moved by compiled steps: a table a target, model and batch size.

    Args:
      report: what traffic.py writes.
      references: variants that the figures in parentheses are relative to.
    """
    parts = []
    for case, rows in _cases(report, "{model} on {target}, batch {batch_size}"):
        given = by_variant(rows)
        columns = [c for c in _TRAFFIC if any(row.get(c.key) for row in rows)]
        lines = []
        for row in rows:
            cells = []
            for column in columns:
                value = row.get(column.key)
                bases = [given.get(name, {}).get(column.key) for name in references]
                ratios = [
                    number(value / base if value and base else None) for base in bases
                ]
                text = number(value and value / column.unit, column.digits)
                cells.append(f"{text} ({', '.join(ratios)})")
            lines.append([row["variant"], *cells])
        header = ["variant", *(column.label for column in columns)]
        errors = [f"{row['variant']}: {row['error']}" for row in rows if row["error"]]
        relative = f"{case}; in parentheses relative to {' and '.join(references)}:"
        parts += [relative, markdown(header, lines, left=1), *errors]
    return "\n\n".join(parts)


def scaling_table(report: Report, reference: str = "no norm, jit") -> str:
    """Returns what devices send: a table a target and model, a row a variant.

    Args:
      report: what scaling.py writes.
      reference: variant that the figures in parentheses are relative to.
    """
    parts = []
    case_name = "{model} on {target}, {batch_size} images per device"
    for case, rows in _cases(report, case_name):
        counts = sorted({row["devices"] for row in rows})
        by_count = [by_variant(r for r in rows if r["devices"] == n) for n in counts]
        types = sorted({name for row in rows for name in row["types"] or ()})
        lines = []
        for name in variants(rows):
            given = [found.get(name, {}) for found in by_count]
            bases = [found.get(reference, {}).get("sent_bytes") for found in by_count]
            last = given[-1].get("types")
            lines.append(
                [
                    name,
                    *(_total(row.get("kinds")) for row in given),
                    *(_megabytes(last and last.get(each, 0)) for each in types),
                    *(
                        _megabytes(row.get("sent_bytes"), base)
                        for row, base in zip(given, bases, strict=True)
                    ),
                ]
            )
        header = [
            "variant",
            *(f"collectives, {count}" for count in counts),
            *(f"{each}, MB" for each in types),
            *(f"sent on {count}, MB" for count in counts),
        ]
        errors = [
            f"{row['variant']}, {row['devices']} devices: {row['error']}"
            for row in rows
            if row["error"]
        ]
        relative = f"{case}; in parentheses relative to {reference}:"
        parts += [relative, markdown(header, lines, left=1), *errors]
    return "\n\n".join(parts)


def decoding_table(report: Report) -> str:
    """Returns the speed of reading images: a table a size of files."""
    parts = []
    size = report["image_size"]
    case = "{shape[0]} × {shape[1]} pixels, {kilobytes:.0f} kB, with {library}"
    for name, rows in _cases(report, case):
        lines = [
            [
                row["variant"],
                number(row["images_per_second"], 0),
                number(1 / row["ratio"]),
                number(row["difference"], 2),
            ]
            for row in rows
        ]
        header = ["", "images/s", "/ decode: Pillow", "pixels differ by"]
        parts += [f"{name}; crops of {size} × {size}:", markdown(header, lines, left=1)]
    return "\n\n".join(parts)


def _cases(report: Report, name: str) -> Iterable[tuple[str, Rows]]:
    """Returns the rows of each case, named by a format of the fields of its rows."""
    cases: dict[str, Rows] = {}
    for row in report["results"]:
        cases.setdefault(name.format(**row), []).append(row)
    return cases.items()


def _total(kinds: dict[str, int] | None) -> str:
    return number(None if kinds is None else sum(kinds.values()), 0)


def _megabytes(value: float | None, base: float | None = None) -> str:
    """Returns bytes in MB, of 10^6, and relative to others if these are not zero."""
    text = number(None if value is None else value / 1e6, 1)
    return text if value is None or not base else f"{text} ({value / base:.3f})"


def by_variant(rows: Any) -> dict[str, dict[str, Any]]:
    """Returns rows by their variants."""
    return {row["variant"]: row for row in rows}


TABLES: dict[str, Callable[[Report], str]] = {
    "layer": layer_table,
    "block": block_table,
    "train_step": train_step_table,
    "traffic": traffic_table,
    "scaling": scaling_table,
    "decoding": decoding_table,
}
