"""The kernels behind a compiled step's traffic, as tables."""

import collections
import re

from compiled.kernels import Kernel
from reports import tables


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
