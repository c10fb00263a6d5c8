"""Counts the floating-point operations of a compiled program: its products and sums.

Convolutions and matrix products count two for each number that is multiplied and
added, their zero padding among them, as the units for products compute it. All else,
elementwise operations and sums, counts nothing: its time is that of the memory.
"""

import math
import re

from hlo import Array, Computation, Instruction


def operations(computation: Computation, instruction: Instruction) -> int:
    """Returns the floating-point operations of one instruction, not of what it calls.

    Example:
      >>> from hlo import parse
      >>> module = parse('''HloModule product
      ...
      ... ENTRY %main (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
      ...   %x = f32[8,4]{1,0} parameter(0)
      ...   %w = f32[4,2]{1,0} parameter(1)
      ...   ROOT %y = f32[8,2]{1,0} dot(%x, %w), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
      ... }
      ... ''')
      >>> operations(module.entry, module.entry["y"])
      128
    """
    if instruction.opcode == "convolution" or "__cudnn$conv" in instruction.target:
        return _of_convolution(computation, instruction)
    if instruction.opcode == "dot" or "__cublas$" in instruction.target:
        return _of_product(computation, instruction)
    return 0


def _of_convolution(computation: Computation, instruction: Instruction) -> int:
    """Each value of the output is a sum over the kernel's values of one feature."""
    first, second = (_array(each) for each in computation.operands(instruction)[:2])
    output, kernel = _array(instruction), second
    # cuDNN's gradients are written as the convolution that they are gradients of.
    if "BackwardFilter" in instruction.target:
        output, kernel = second, output
    elif "BackwardInput" in instruction.target:
        output = first
    labels = _attribute(r"dim_labels=\w+_(\w+)->", instruction)
    terms = kernel.size // kernel.shape[labels.index("o")]
    # Of an input spread apart by zeros only the values are multiplied.
    apart = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    zeros = math.prod(map(int, apart[1].split("x"))) if apart else 1
    return 2 * output.size * terms // zeros


def _of_product(computation: Computation, instruction: Instruction) -> int:
    """Each value of the result is a sum over the contracted axes."""
    left = _array(computation.operands(instruction)[0])
    axes = _attribute(
        r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', instruction
    )
    terms = math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2 * _array(instruction).size * terms


def _array(instruction: Instruction) -> Array:
    """The result, or the first of several: others are scratch memory."""
    return instruction.arrays[0]


def _attribute(pattern: str, instruction: Instruction) -> str:
    match = re.search(pattern, instruction.attributes)
    if match is None:
        raise ValueError(f"Expected {pattern!r} in {instruction.attributes!r}.")
    return match[1]
