"""Counts the bytes that each kernel of a compiled program moves to and from HBM.

A kernel (fusion, custom call, copy, ...) reads its operands and writes its results,
each once. What moves less:

- of an operand that is only sliced or gathered from, the slices are read;
- ``dynamic-update-slice`` and ``scatter`` work in place: they write the update, and
  XLA has put a copy in front where it must not be in place;
- a convolution's or matrix product's scratch memory is not counted: how much of it is
  used, and how often, is the library's secret;
- arrays on the chip or on the host are not in HBM, see `hlo.Array`;
- names and shapes given anew (tuples, bitcasts, constants) move nothing;
- single numbers made of single numbers, outside any fusion, are no kernels: a TPU
  computes them, indices mostly, in the processor that starts the kernels.

Loops count as often as they are known to run, else once; of a conditional, the branch
that moves most counts. Caches are not modelled, so this is what a program asks for;
large arrays do not fit into them.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from compiled import flops
from compiled.hlo import Computation, Instruction, Module, parse

_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast"}  # custom calls on TPUs
# Any part of their result may need all of their operands.
_MIXING = {
    "conditional",
    "convolution",
    "custom-call",
    "dot",
    "fft",
    "get-tuple-element",
    "reduce",
    "reduce-window",
    "select-and-scatter",
    "sort",
    "tuple",
    "while",
}
_IN_PLACE = {"dynamic-update-slice", "scatter"}
# Custom calls whose last result is scratch memory.
_LIBRARIES = ("__cudnn$", "__cublas$")


class Kernel(NamedTuple):
    """A kernel and what it moves.

    Attributes:
      name: its name in the compiled program.
      kind: ``'convolution'``, ``'matrix product'``, ``'fusion'``, ``'copy'`` or else
        the HLO opcode or the custom call's target.
      read: bytes read from HBM, each time.
      written: bytes written to HBM, each time.
      op_name: the operation of the JAX program it stems from.
      times: how often it runs.
      cycles: the compiler's estimate of the time, each time, in cycles of the clock;
        None where it gives none, as for GPUs.
      flops: floating-point operations of convolutions and matrix products, each time.
      beside: whether it runs beside others: an asynchronous copy or slice.
    """

    name: str
    kind: str
    read: int
    written: int
    op_name: str
    times: int = 1
    cycles: int | None = None
    flops: int = 0
    beside: bool = False

    @property
    def traffic(self) -> int:
        """Bytes moved in all."""
        return self.times * (self.read + self.written)


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of an optimized HLO module in the order of the program.

    Example:
      >>> [kernel] = kernels('''HloModule double
      ...
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %x = f32[8]{0} parameter(0)
      ...   ROOT %sum = f32[8]{0} add(%x, %x)
      ... }
      ... ''')
      >>> kernel.kind, kernel.read, kernel.written
      ('add', 32, 32)
    """
    module = parse(text)
    return list(_kernels(module, module.entry))


def _kernels(module: Module, computation: Computation) -> Iterator[Kernel]:
    for instruction in computation.values():
        opcode = instruction.opcode
        beside = False
        if opcode.endswith("-done") and opcode != "async-done":
            # The pair as one instruction: its start says what, its end the result.
            beside = True
            start = computation[instruction.operands[0]]
            opcode = opcode.removesuffix("-done")
            instruction = dataclasses.replace(
                start, opcode=opcode, arrays=instruction.arrays
            )
        elif opcode.endswith("-start") and opcode != "async-start":
            continue
        if opcode in _FREE or instruction.target in _FREE_TARGETS:
            continue
        if _is_scalar(computation, instruction):
            continue
        called = [module.computations[name] for name in instruction.called()]
        match opcode:
            case "call" | "async-start":
                yield from _kernels(module, called[0])
            case "while":
                for kernel in [k for part in called for k in _kernels(module, part)]:
                    times = kernel.times * instruction.trip_count
                    yield kernel._replace(times=times)
            case "conditional":
                branches = [list(_kernels(module, branch)) for branch in called]
                yield from max(branches, key=lambda ks: sum(k.traffic for k in ks))
            case _:
                kernel = _kernel(module, computation, instruction)
                yield kernel._replace(beside=beside)


def _is_scalar(computation: Computation, instruction: Instruction) -> bool:
    """Whether an instruction makes a single number of single numbers."""
    if instruction.opcode == "copy" or instruction.target:
        return False
    calls = next(instruction.called(), None) is not None
    together = [instruction, *computation.operands(instruction)]
    return not calls and all(each.size == 1 for each in together)


def _kernel(
    module: Module, computation: Computation, instruction: Instruction
) -> Kernel:
    if instruction.opcode == "fusion":
        fused = module.computations[next(instruction.called())]
        updates = _updates(fused)
        needed = _needed(module, fused, updates)
        sizes = [needed[parameter.name] for parameter in fused.parameters()]
        written = sum(_written(fused, i, i in updates) for i in fused.results())
    else:
        in_place = instruction.opcode in _IN_PLACE
        operands = computation.operands(instruction)
        sizes = _sizes(module, instruction, operands, instruction.size, in_place)
        written = _written(computation, instruction, in_place)
    read: dict[str, int] = {}  # a kernel may take the same operand twice
    for name, size in zip(instruction.operands, sizes, strict=True):
        read[name] = read.get(name, 0) + size
    return Kernel(
        name=instruction.name,
        kind=_kind(module, instruction),
        read=sum(computation[name].nbytes(size) for name, size in read.items()),
        written=written,
        op_name=_op_name(module, instruction),
        cycles=instruction.cycles,
        flops=_flops(module, computation, instruction),
    )


def _updates(fused: Computation) -> list[Instruction]:
    """Results that a fusion updates in place, if it does nothing else."""
    results = fused.results()
    if all(
        i.opcode in _IN_PLACE and fused.origin(i.operands[0]).opcode == "parameter"
        for i in results
    ):
        return results
    return []


def _needed(
    module: Module, fused: Computation, updates: list[Instruction]
) -> dict[str, int]:
    """How many elements of each instruction's result are needed for the root."""
    needed = dict.fromkeys(fused, 0)
    needed[fused.root] = fused[fused.root].size
    for instruction in reversed(fused.values()):
        size = min(needed[instruction.name], instruction.size)
        if size:
            operands = fused.operands(instruction)
            sizes = _sizes(module, instruction, operands, size, instruction in updates)
            for name, part in zip(instruction.operands, sizes, strict=True):
                needed[name] += part
    return needed


def _sizes(
    module: Module,
    instruction: Instruction,
    operands: list[Instruction],
    size: int,
    in_place: bool,
) -> list[int]:
    """How many elements of each operand are needed for `size` of the result."""
    whole = [operand.size for operand in operands]
    match instruction.opcode:
        case "slice" | "dynamic-slice" | "gather":
            return [size, *whole[1:]]
        case "dynamic-update-slice":
            return [0 if in_place else size, *whole[1:]]
        case "scatter":
            # Arrays, indices and as many updates, which may be added to the arrays.
            updates = whole[len(whole) // 2 + 1 :]
            arrays = updates if in_place else whole[: len(updates)]
            return [*arrays, *whole[len(updates) :]]
        case "fusion" | "call":
            inner = module.computations[next(instruction.called())]
            needed = _needed(module, inner, [])
            return [needed[parameter.name] for parameter in inner.parameters()]
        case opcode if opcode in _MIXING:
            return whole
        case _:  # element by element, or in another order
            return [min(size, all_of_it) for all_of_it in whole]


def _written(computation: Computation, instruction: Instruction, in_place: bool) -> int:
    """Bytes of the result that a kernel writes."""
    if in_place:
        operands = computation.operands(instruction)
        if instruction.opcode == "scatter":
            return sum(update.nbytes() for update in operands[len(operands) // 2 + 1 :])
        return operands[1].nbytes()
    if instruction.target.startswith(_LIBRARIES) and len(instruction.arrays) > 1:
        return sum(array.nbytes() for array in instruction.arrays[:-1])
    return instruction.nbytes()


def _flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Operations of an instruction and of all that it is fused of."""
    called = [module.computations[name] for name in instruction.called()]
    return flops.operations(computation, instruction) + sum(
        _flops(module, inner, each) for inner in called for each in inner.values()
    )


def _kind(module: Module, instruction: Instruction) -> str:
    if instruction.target:
        if instruction.target.startswith("__cudnn$conv"):
            return "convolution"
        if instruction.target.startswith("__cublas$"):
            return "matrix product"
        return instruction.target
    opcodes = {i.opcode for i in _inside(module, instruction)}
    if "convolution" in opcodes:
        return "convolution"
    if "dot" in opcodes:
        return "matrix product"
    return instruction.opcode


def _op_name(module: Module, instruction: Instruction) -> str:
    names = [i.op_name for i in _inside(module, instruction) if i.op_name]
    return names[-1] if names else ""


def _inside(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """Yields the instructions of a fusion, and last the fusion itself."""
    for name in instruction.called():
        for inner in module.computations[name].values():
            yield from _inside(module, inner)
    yield instruction
