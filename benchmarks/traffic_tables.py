"""Traffic as tables: the figures of a target, and the kernels behind them."""

import collections
import re
from typing import NamedTuple

import tables
from kernels import Kernel

REFERENCES = {"BN": "flax BN", "none": "no norm"}  # by what the columns call them


class Column(NamedTuple):
    """A figure in the table: its name there and in a result, and how it is written."""

    label: str
    key: str
    unit: float = 1.0
    digits: int = 0


_COLUMNS = (
    Column("traffic, GB", "traffic_bytes", 1e9, 2),
    Column("outside convolutions", "outside_bytes", 1e9, 2),
    Column("XLA's count, GB", "bytes_accessed", 1e9, 2),
    Column("memory, GB", "temp_bytes", 1e9, 2),
    Column("kernels", "kernels"),
    Column("compile, s", "compile_seconds"),
)


def table(rows: tables.Rows) -> str:
    """Returns the figures of one target and model, with ratios to the references."""
    given = tables.by_variant(rows)
    columns = [c for c in _COLUMNS if any(row[c.key] is not None for row in rows)]
    header = ["variant"]
    for column in columns:
        header += [column.label, *(f"/{name}" for name in REFERENCES)]
    lines = []
    for row in rows:
        line = [row["variant"]]
        for column in columns:
            value = row[column.key]
            line.append(tables.number(value and value / column.unit, column.digits))
            for reference in REFERENCES.values():
                base = given.get(reference, {}).get(column.key)
                line.append(tables.number(value / base if value and base else None))
        lines.append(line)
    errors = [f"{row['variant']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([tables.markdown(header, lines, left=1), *errors])


def explain(found: list[Kernel], count: int) -> str:
    """Returns the largest kernels, and what the program's kernels mostly are."""
    largest = [
        [
            kernel.name,
            kernel.kind,
            _origin(kernel),
            tables.number(kernel.times * kernel.read / 1e6, 1),
            tables.number(kernel.times * kernel.written / 1e6, 1),
        ]
        for kernel in sorted(found, key=lambda kernel: -kernel.traffic)[:count]
    ]
    header = ["kernel", "kind", "from", "read, MB", "written, MB"]
    alike: dict[tuple[str, str], list[Kernel]] = collections.defaultdict(list)
    for kernel in found:  # numbers only tell layers and copies apart
        name = re.sub(r"[.\d]+$", "", kernel.name)
        alike[name, re.sub(r"_?\d+", "", _origin(kernel))].append(kernel)
    groups = sorted(alike.items(), key=lambda item: -_launches(item[1]))
    frequent = [
        [
            name,
            origin,
            tables.number(_launches(group), 0),
            tables.number(sum(kernel.traffic for kernel in group) / 1e6, 1),
        ]
        for (name, origin), group in groups[:count]
    ]
    return "\n".join(
        [
            tables.markdown(header, largest, left=3),
            "",
            tables.markdown(["kernels", "from", "number", "MB"], frequent, left=2),
        ]
    )


def _origin(kernel: Kernel) -> str:
    return kernel.op_name.removeprefix("jit(step)/")


def _launches(group: list[Kernel]) -> int:
    return sum(kernel.times for kernel in group)
