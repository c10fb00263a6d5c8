"""Lists what the devices of a compiled program send each other: its collectives.

A collective counts as often as it is known to run, in loops too; the two halves of one
that is started and awaited count once. What a device sends is that of the usual ring:
of ``S`` bytes on ``k`` devices an all-reduce sends ``2 (k - 1) / k S``, and a gather, a
scatter or an exchange ``(k - 1) / k S``, where ``S`` is the whole that is gathered or
scattered. A permutation sends all that the device has.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from compiled.hlo import Array, Computation, Instruction, Module, parse

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: one of ``KINDS``.
      arrays: what each device hands in.
      group: number of devices that take part together.
      times: how often it runs.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: int
    times: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of what each device hands in, each time."""
        return sum(array.nbytes() for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all."""
        others = self.group - 1
        match self.kind:
            case "all-reduce":
                share = 2 * others / self.group
            case "all-gather":  # a part of the whole is handed in
                share = others
            case "collective-permute":
                share = 1
            case _:
                share = others / self.group
        return self.times * self.nbytes * share


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of an optimized HLO module, ``compiled.as_text()``.

    Those of a single device, which send nothing, are left out.
    """
    module = parse(text)
    header, _, _ = text.partition("\n")
    devices = math.prod(
        int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    )
    found = _collectives(module, module.entry, devices)
    return [each for each in found if each.group > 1]


def _collectives(
    module: Module, computation: Computation, devices: int, times: int = 1
) -> Iterator[Collective]:
    for instruction in computation.values():
        if instruction.opcode in ("async-update", "async-done"):
            continue  # they name once more what async-start calls
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            operands = computation.operands(instruction)
            # Wherever they lie: a TPU sends from the memory on its chip, too.
            arrays = tuple(
                array._replace(in_hbm=True)
                for operand in operands
                for array in operand.arrays
            )
            yield Collective(kind, arrays, _group(instruction, devices), times)
        for name in instruction.called():
            runs = times * instruction.trip_count
            yield from _collectives(module, module.computations[name], devices, runs)


def _group(instruction: Instruction, devices: int) -> int:
    """Returns how many devices take part; without a list of groups, all of them.

    Groups are written as ``{{0,1},{2,3}}``, as ``[2,2]<=[4]`` (groups, size), or as
    axes of a mesh, ``mesh['a'=2,'b'=2] {'b'}``, of which ``'a':(1)2`` is a part.
    """
    attributes = instruction.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices
