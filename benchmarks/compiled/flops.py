"""Counts the floating-point operations of a compiled program: its products and sums.

Convolutions and matrix products count two for each number that is multiplied and
added. Zeros around and between a convolution's inputs are no such numbers. All else,
elementwise operations and sums, counts nothing: its time is that of the memory.
"""

import functools
import math
import re

from compiled.hlo import Array, Computation, Instruction


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
    """Each value of the output is a sum over a window and the input's features."""
    first, second = (_array(each) for each in computation.operands(instruction)[:2])
    x, kernel, y = first, second, _array(instruction)
    # cuDNN's gradients are written as the convolution that they are gradients of.
    if "BackwardFilter" in instruction.target:
        kernel, y = y, second
    elif "BackwardInput" in instruction.target:
        x, y = y, first
    of_x, of_kernel, of_y = (
        dict(zip(labels, array.shape, strict=True))
        for labels, array in zip(
            re.split("_|->", _attribute(r"dim_labels=([\w>-]+)", instruction)),
            (x, kernel, y),
            strict=True,
        )
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(o.split("=") for o in window[1].split()) if window else {}
    count = 2 * of_y["b"] * of_y["f"] * of_kernel["i"]
    for axis in range(len(of_kernel) - 2):
        name = str(axis)
        sides = (of_x[name], of_kernel[name], of_y[name])
        given = {key: value.split("x")[axis] for key, value in options.items()}
        count *= _products(
            *sides,
            stride=int(given.get("stride", 1)),
            before=int(given.get("pad", "0").partition("_")[0]),
            apart=int(given.get("lhs_dilate", 1)),
            dilation=int(given.get("rhs_dilate", 1)),
        )
    return count


@functools.cache
def _products(
    x: int, kernel: int, y: int, *, stride: int, before: int, apart: int, dilation: int
) -> int:
    """Returns how many pairs of values of input and kernel are multiplied on an axis.

    Args:
      x: extent of the input.
      kernel: of the kernel.
      y: of the output.
      stride: of the windows.
      before: padding before the input.
      apart: distance of the input's values, zeros between them.
      dilation: distance of the kernel's values.
    """
    places = (
        i * stride + j * dilation - before for i in range(y) for j in range(kernel)
    )
    return sum(0 <= at <= (x - 1) * apart and at % apart == 0 for at in places)


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
