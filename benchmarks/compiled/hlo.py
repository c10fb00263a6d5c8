"""Reads an optimized HLO module, the text of what XLA's compiler made of a program.

Only what is needed to count bytes is kept: computations, their instructions in
the order in which they run, and the arrays that each one yields.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# An array's type: f32[8,4]{1,0:T(8,128)S(1)}. Tuples hold several of them.
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array in memory.

    Attributes:
      dtype: element type as HLO writes it, such as ``'bf16'``.
      shape: extents; a dynamic one, which HLO writes as ``<=8``, is its bound.
      in_hbm: whether it lies in the device's main memory, HLO's memory space 0; others
        are on the chip (a TPU's vector memory is space 1) or on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def nbytes(self, size: int | None = None) -> int:
        """Bytes of HBM that all elements take, or only `size` of them."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # tokens have none
        itemsize = 8 if self.dtype == "pred" else int(bits[1]) if bits else 0
        size = self.size if size is None else min(size, self.size)
        return -(-size * itemsize // 8) if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = arrays opcode(arguments), attributes``."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(_OPERAND.findall(self.arguments))

    @property
    def size(self) -> int:
        """Number of elements in all arrays."""
        return sum(array.size for array in self.arrays)

    def nbytes(self, size: int | None = None) -> int:
        """Bytes of HBM that the result takes, or only `size` of its elements."""
        if size is not None and len(self.arrays) == 1:
            return self.arrays[0].nbytes(size)
        return sum(array.nbytes() for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The operation of the JAX program it stems from; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """What a custom call calls; empty for other instructions."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of its time in cycles of the clock; TPUs only."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def trip_count(self) -> int:
        """How often a while loop runs; 1 if the compiler does not know."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(match[1]) if match else 1

    def called(self) -> Iterator[str]:
        """Names of the computations that run when it runs, but not its reducers."""
        for key, names in re.findall(r"(\w+)=(%[\w.\-]+|\{%[^}]*\})", self.attributes):
            if key in _CALLS or (key == "to_apply" and self.opcode == "call"):
                yield from _OPERAND.findall(names)


_CALLS = (
    "calls",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
)


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run; the root gives the result.

    Attributes:
      root: name of the root.
    """

    root: str = ""

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results `instruction` takes."""
        return [self[name] for name in instruction.operands]

    def results(self) -> list[Instruction]:
        """What yields the result: the root, or the parts of a tuple."""
        root = self[self.root]
        names = root.operands if root.opcode == "tuple" else (self.root,)
        return [self.origin(name) for name in names]

    def parameters(self) -> list[Instruction]:
        """What the computation is given, in order."""
        found = [i for i in self.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda parameter: int(parameter.arguments))

    def origin(self, name: str) -> Instruction:
        """The instruction `name`, or what it only gives another shape to."""
        instruction = self[name]
        while instruction.opcode == "bitcast":
            instruction = self[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: all of them, by name.
      entry: the one that runs first.
    """

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads a module as ``compiled.as_text()`` prints it.

    Raises:
      ValueError: if there is no entry computation.

    Example:
      >>> module = parse('''HloModule double
      ...
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %x = f32[8]{0} parameter(0)
      ...   ROOT %sum = f32[8]{0} add(%x, %x)
      ... }
      ... ''')
      >>> [(i.opcode, i.operands, i.nbytes()) for i in module.entry.values()]
      [('parameter', (), 32), ('add', ('x', 'x'), 32)]
    """
    computations: dict[str, Computation] = {}
    entry = None
    computation = Computation()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = computations[match[2]] = Computation()
            if match[1]:
                entry = computation
        elif match := _INSTRUCTION.match(line):
            computation[match[2]] = _parse_instruction(match[2], match[3])
            if match[1]:
                computation.root = match[2]
    if entry is None:
        raise ValueError("Expected an HLO module with an ENTRY computation.")
    return Module(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    arrays = tuple(
        Array(
            dtype,
            tuple(int(side.lstrip("<=")) for side in shape.split(",") if side),
            re.search(r"S\([1-9]", layout) is None,
        )
        for dtype, shape, layout in _ARRAY.findall(text[:end])
    )
    opcode, _, rest = text[end:].strip().partition("(")
    end = _closing("(" + rest, 0) - 2
    return Instruction(name, arrays, opcode, rest[:end], rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"Expected balanced parentheses, got {text!r}.")
