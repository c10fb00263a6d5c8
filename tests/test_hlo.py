"""The byte counter, on programs whose traffic is known by hand."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from compiled.hlo import Array, parse
from compiled.kernels import Kernel, kernels

pytestmark = pytest.mark.optimized


def count(entry: str, computations: str = "") -> list[Kernel]:
    head = f"HloModule test\n\n{textwrap.dedent(computations)}\n"
    body = textwrap.indent(textwrap.dedent(entry), "  ")
    return kernels(f"{head}ENTRY %main () -> f32[] {{\n{body}\n}}\n")


def moved(entry: str, computations: str = "") -> tuple[int, int]:
    """Bytes read and written by a program of one kernel."""
    (kernel,) = count(entry, computations)
    return kernel.read, kernel.written


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        *[("pred", 6), ("s4", 3), ("u8", 6), ("f8e4m3fn", 6), ("bf16", 12)],
        *[("f32", 24), ("s64", 48), ("c64", 48), ("c128", 96), ("token", 0)],
    ],
)
def test_bytes_of_types(dtype, nbytes) -> None:
    assert Array(dtype, (2, 3)).nbytes() == nbytes


def test_a_kernel_reads_operands_and_writes_results() -> None:
    entry = """
        %x = f32[8,4]{1,0} parameter(0)
        %b = bf16[4]{0} parameter(1)
        ROOT %y = f32[8,4]{1,0} fusion(%x, %b), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/add"}
    """
    fused = """
        %fused (x: f32[8,4], b: bf16[4]) -> f32[8,4] {
          %b = bf16[4]{0} parameter(1)
          %c = f32[4]{0} convert(%b)
          %wide = f32[8,4]{1,0} broadcast(%c), dimensions={1}
          %x = f32[8,4]{1,0} parameter(0)
          ROOT %sum = f32[8,4]{1,0} add(%x, %wide)
        }
    """
    expected = Kernel("y", "fusion", 128 + 8, 128, "jit(f)/add")
    assert count(entry, fused) == [expected]


def test_an_operand_taken_twice_is_read_once() -> None:
    entry = """
        %x = f32[8]{0} parameter(0)
        ROOT %y = f32[8]{0} multiply(%x, %x)
    """
    assert moved(entry) == (32, 32)


@pytest.mark.parametrize(
    "slicing",
    [
        "slice(%wide), slice={[0:2], [0:4]}",
        "dynamic-slice(%wide, %i, %i), dynamic_slice_sizes={2,4}",
        "gather(%wide, %i), offset_dims={0,1}, slice_sizes={2,4}",
    ],
)
def test_an_operand_that_is_only_sliced_counts_as_its_slice(slicing) -> None:
    entry = """
        %x = bf16[100,4]{1,0} parameter(0)
        %i = s32[] parameter(1)
        ROOT %y = f32[2,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
    """
    fused = f"""
        %fused (x: bf16[100,4], i: s32[]) -> f32[2,4] {{
          %x = bf16[100,4]{{1,0}} parameter(0)
          %i = s32[] parameter(1)
          %wide = f32[100,4]{{1,0}} convert(%x)
          ROOT %part = f32[2,4]{{1,0}} {slicing}
        }}
    """
    index = 0 if slicing.startswith("slice") else 4
    assert moved(entry, fused) == (2 * 2 * 4 + index, 4 * 2 * 4)


def test_an_operand_that_is_sliced_and_summed_is_read_whole() -> None:
    entry = """
        %x = f32[100]{0} parameter(0)
        ROOT %y = (f32[4]{0}, f32[]) fusion(%x), kind=kInput, calls=%fused
    """
    fused = """
        %add (a: f32[], b: f32[]) -> f32[] {
          %a = f32[] parameter(0)
          %b = f32[] parameter(1)
          ROOT %c = f32[] add(%a, %b)
        }

        %fused (x: f32[100]) -> (f32[4], f32[]) {
          %x = f32[100]{0} parameter(0)
          %zero = f32[] constant(0)
          %part = f32[4]{0} slice(%x), slice={[0:4]}
          %sum = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%add
          ROOT %both = (f32[4]{0}, f32[]) tuple(%part, %sum)
        }
    """
    assert moved(entry, fused) == (400, 16 + 4)


def test_a_padded_tensor_is_not_there() -> None:
    """FeatureSampling pads, then slices: XLA reads what the slice needs."""
    entry = """
        %x = f32[100]{0} parameter(0)
        ROOT %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
    """
    fused = """
        %fused (x: f32[100]) -> f32[4] {
          %x = f32[100]{0} parameter(0)
          %zero = f32[] constant(0)
          %padded = f32[102]{0} pad(%x, %zero), padding=1_1
          ROOT %part = f32[4]{0} slice(%padded), slice={[8:12]}
        }
    """
    assert moved(entry, fused) == (16, 16)


UPDATE = """
    %fused (x: f32[100], u: f32[4], i: s32[]) -> f32[100] {
      %x = f32[100]{0} parameter(0)
      %u = f32[4]{0} parameter(1)
      %i = s32[] parameter(2)
      ROOT %y = f32[100]{0} dynamic-update-slice(%x, %u, %i)
    }
"""
ARGUMENTS = """
    %x = f32[100]{0} parameter(0)
    %u = f32[4]{0} parameter(1)
    %i = s32[] parameter(2)
"""


@pytest.mark.parametrize(
    "update",
    [
        "fusion(%x, %u, %i), kind=kLoop, calls=%fused",
        "dynamic-update-slice(%x, %u, %i)",
    ],
)
def test_an_update_in_place_counts_as_its_update(update) -> None:
    entry = f"{ARGUMENTS}    ROOT %y = f32[100]{{0}} {update}"
    assert moved(entry, UPDATE) == (16 + 4, 16)


def test_an_update_of_something_new_writes_all_of_it() -> None:
    fused = UPDATE.replace(
        "%x = f32[100]{0} parameter(0)",
        "%zero = f32[] constant(0)\n      %x = f32[100]{0} broadcast(%zero)",
    )
    fused = fused.replace("parameter(1)", "parameter(0)")
    fused = fused.replace("parameter(2)", "parameter(1)")
    call = "fusion(%u, %i), kind=kLoop, calls=%fused"
    entry = f"{ARGUMENTS}    ROOT %y = f32[100]{{0}} {call}"
    assert moved(entry, fused) == (16 + 4, 400)


def test_scatter_adds_in_place() -> None:
    entry = """
        %x = f32[100]{0} parameter(0)
        %i = s32[4,1]{1,0} parameter(1)
        %u = f32[4]{0} parameter(2)
        ROOT %y = f32[100]{0} scatter(%x, %i, %u), to_apply=%add
    """
    assert moved(entry) == (16 + 16 + 16, 16)


CONVOLUTION = """
    %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
    %w = bf16[4,3,3,4]{3,2,1,0} parameter(1)
    %conv.1 = (bf16[2,8,8,4]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %w), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(f)/conv(general)"}
    ROOT %y = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%conv.1), index=0
"""


def test_a_convolution_counts_without_its_scratch_memory() -> None:
    (kernel,) = count(CONVOLUTION)
    assert kernel == Kernel(
        "conv.1",
        "convolution",
        1024 + 288,
        1024,
        "jit(f)/conv(general)",
        flops=2 * 2 * 4 * 4 * (3 * 8 - 2) ** 2,  # not of the border
    )


def test_a_fused_convolution_is_one() -> None:
    entry = """
        %x = f32[8,4]{1,0} parameter(0)
        %w = f32[4,2]{1,0} parameter(1)
        ROOT %y = f32[8,2]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
    """
    fused = """
        %fused (x: f32[8,4], w: f32[4,2]) -> f32[8,2] {
          %x = f32[8,4]{1,0} parameter(0)
          %w = f32[4,2]{1,0} parameter(1)
          %conv = f32[8,2]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
          ROOT %y = f32[8,2]{1,0} negate(%conv)
        }
    """
    (kernel,) = count(entry, fused)
    assert (kernel.kind, kernel.flops) == ("convolution", 2 * 8 * 2 * 4)


WINDOW = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"


@pytest.mark.parametrize(
    ("shapes", "call", "operations"),
    [
        # In each direction 4 windows of 3 have 12 places, one of them in the padding.
        # cuDNN writes gradients as the convolution that they are gradients of.
        (
            ("bf16[2,8,8,5]", "bf16[6,3,3,5]", "bf16[2,4,4,6]"),
            f'custom-call(%a, %b), {WINDOW}, \
custom_call_target="__cudnn$convBiasActivationForward"',
            2 * 2 * 6 * 5 * 11 * 11,
        ),
        (
            ("bf16[2,8,8,5]", "bf16[2,4,4,6]", "bf16[6,3,3,5]"),
            f'custom-call(%a, %b), {WINDOW}, \
custom_call_target="__cudnn$convBackwardFilter"',
            2 * 2 * 6 * 5 * 11 * 11,
        ),
        (
            ("bf16[2,4,4,6]", "bf16[6,3,3,5]", "bf16[2,8,8,5]"),
            f'custom-call(%a, %b), {WINDOW}, \
custom_call_target="__cudnn$convBackwardInput"',
            2 * 2 * 6 * 5 * 11 * 11,
        ),
        # The same gradients as other compilers write them.
        (
            ("f32[2,8,8,5]", "f32[2,4,4,6]", "f32[3,3,5,6]"),
            "convolution(%a, %b), window={size=4x4 pad=1_0x1_0 rhs_dilate=2x2}, "
            "dim_labels=f01b_i01o->01bf",
            2 * 2 * 6 * 5 * 11 * 11,
        ),
        (
            ("f32[2,4,4,6]", "f32[3,3,5,6]", "f32[2,8,8,5]"),
            "convolution(%a, %b), window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2 "
            "rhs_reversal=1x1}, dim_labels=b01f_01oi->b01f",
            2 * 2 * 6 * 5 * 11 * 11,
        ),
        # A 1 x 1 convolution that takes its images for the kernel.
        (
            ("bf16[1,1,6,5]", "bf16[2,8,8,5]", "bf16[2,8,8,6]"),
            "convolution(%a, %b), window={size=8x8 pad=7_7x7_7 rhs_reversal=1x1}, "
            "dim_labels=01bf_o01i->f01b",
            2 * 2 * 6 * 5 * 8 * 8,
        ),
        # Two groups of features: a kernel sees half of the inputs.
        (
            ("f32[2,8,8,4]", "f32[3,3,2,6]", "f32[2,6,6,6]"),
            "convolution(%a, %b), window={size=3x3}, dim_labels=b01f_01io->b01f, "
            "feature_group_count=2",
            2 * (2 * 6 * 6 * 6) * (3 * 3 * 2),
        ),
        (
            ("bf16[7,8,4]", "bf16[7,4,2]", "bf16[7,8,2]"),
            "dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
            2 * (7 * 8 * 2) * 4,
        ),
        (
            ("bf16[4,8]", "bf16[4,2]", "bf16[8,2]"),
            'custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}',
            2 * (8 * 2) * 4,
        ),
        (("f32[8]", "f32[8]", "f32[8]"), "multiply(%a, %b)", 0),
    ],
)
def test_products_and_their_sums_are_counted(shapes, call, operations) -> None:
    a, b, result = shapes
    entry = f"""
        %a = {a} parameter(0)
        %b = {b} parameter(1)
        ROOT %y = {result} {call}
    """
    (kernel,) = count(entry)
    assert kernel.flops == operations


def test_new_names_and_shapes_move_nothing() -> None:
    entry = """
        %x = f32[8]{0} parameter(0)
        %c = f32[8]{0} constant({...})
        %b = f32[4,2]{1,0} bitcast(%x)
        ROOT %t = (f32[4,2]{1,0}, /*index=1*/f32[8]{0}) tuple(%b, /*index=1*/%c)
    """
    assert count(entry) == []


def test_single_numbers_of_single_numbers_are_no_kernels() -> None:
    entry = """
        %i = s32[] parameter(0)
        %x = s32[8]{0} parameter(1)
        %at = s32[] add(%i, %i)
        %one = s32[1]{0} dynamic-slice(%x, %at), dynamic_slice_sizes={1}
        %number = s32[] bitcast(%one)
        ROOT %c = s32[] copy(%number)
    """
    assert [kernel.name for kernel in count(entry)] == ["one", "c"]


def test_an_asynchronous_copy_counts_once_and_only_in_hbm() -> None:
    entry = """
        %x = f32[8]{0:T(128)} parameter(0)
        %start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
        %on_chip = f32[8]{0:T(128)S(1)} copy-done(%start)
        ROOT %y = f32[8]{0:T(128)} negate(%on_chip)
    """
    copy, negate = count(entry)
    assert (copy.kind, copy.read, copy.written) == ("copy", 32, 0)
    assert (copy.beside, negate.beside) == (True, False)
    assert (negate.read, negate.written) == (0, 32)


def test_an_asynchronous_slice_reads_its_slice() -> None:
    entry = """
        %x = f32[100]{0} parameter(0)
        %start = ((f32[100]{0}), f32[4]{0}, s32[]) slice-start(%x), slice={[0:4]}
        ROOT %y = f32[4]{0} slice-done(%start)
    """
    assert moved(entry) == (16, 16)


NEGATE = """
    %body (x: f32[8]) -> f32[8] {
      %x = f32[8]{0} parameter(0)
      ROOT %y = f32[8]{0} negate(%x)
    }

    %condition (x: f32[8]) -> pred[] {
      %x = f32[8]{0} parameter(0)
      ROOT %more = pred[] constant(true)
    }

    %nothing (x: f32[8]) -> f32[8] {
      ROOT %x = f32[8]{0} parameter(0)
    }
"""


@pytest.mark.parametrize(
    ("call", "times"),
    [
        ("call(%x), to_apply=%body", 1),
        ("async-start(%x), calls=%body", 1),
        ("while(%x), condition=%condition, body=%body", 1),
        (
            "while(%x), condition=%condition, body=%body, "
            'backend_config={"known_trip_count":{"n":"10"}}',
            10,
        ),
        ("conditional(%i, %x, %x), branch_computations={%nothing, %body}", 1),
    ],
)
def test_what_is_called_counts_as_often_as_it_runs(call, times) -> None:
    entry = f"""
        %x = f32[8]{{0}} parameter(0)
        %i = s32[] parameter(1)
        ROOT %y = f32[8]{{0}} {call}
    """
    (kernel,) = count(entry, NEGATE)
    assert kernel.times == times
    assert kernel.traffic == times * 64


def test_a_module_needs_an_entry() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty")


def test_a_real_program() -> None:
    x = jnp.zeros((1000,), jnp.float32)
    text = jax.jit(lambda x: (x + 1, x[:10] * 2)).lower(x).compile().as_text()
    found = kernels(text)
    assert sum(kernel.written for kernel in found) == 4000 + 40
    assert sum(kernel.read for kernel in found) == 4000 + 40 * (len(found) - 1)
