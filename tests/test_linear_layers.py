"""Folded convolutions against NumPy, and samples at every place, borders included."""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn.lattice import Lattice
from flax_sbn.linear_layers import make_convolution
from flax_sbn.windows import Part, Windows
from tests import cases, reference, samples, unfolded
from tests.closeness import assert_same_to_rounding
from tests.samples import KEY

INPUTS, OUTPUTS = 4, 8

# Sampler, extent, kernel, strides, padding, input and kernel dilation, groups.
REFERENCE = [
    ("NS", (9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
    ("BS", (9, 8), (3, 3), (2, 2), ((0, 1), (1, 1)), (1, 1), (1, 1), 2),
    ("BS-strata", (11,), (5,), (2,), ((3, -1),), (1,), (2,), 4),
    ("FS", (9, 12), (3, 2), (2, 1), ((2, 1), (0, 3)), (1, 1), (2, 1), 1),
    (
        "FS",
        (5, 6, 4),
        (3, 1, 2),
        (1, 2, 1),
        ((1, 1), (-1, 0), (0, 1)),
        *[(1, 1, 2)] * 2,
        4,
    ),
    ("FS-one-patch", (9, 7), (3, 3), (2, 3), ((2, 1), (3, 2)), (2, 3), (1, 2), 2),
    ("VDN", (9, 8), (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
    ("VDN-strata", (12,), (3,), (1,), ((2, 0),), (1,), (1,), 1),
    ("FS+VDN", (9, 8), (3, 3), (1, 1), ((-1, 2), (2, -2)), (1, 2), (2, 1), 1),
    ("BS+VDN", (9, 8), (4, 2), (3, 2), ((1, 2), (0, 1)), (1, 1), (1, 1), 2),
    # These measure 5 to 8 positions of larger maps.
    ("lattice", (9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
    ("lattice", (23,), (5,), (2,), ((3, -1),), (1,), (2,), 4),
    ("lattice", (9, 12), (3, 2), (2, 1), ((-1, 2), (2, -2)), (1, 2), (2, 1), 2),
    (
        "lattice",
        (5, 6, 4),
        (3, 1, 2),
        (1, 2, 1),
        ((1, 1), (-1, 0), (0, 1)),
        *[(1, 1, 2)] * 2,
        1,
    ),
    ("lattice+VDN", (9, 8), (3, 2), (2, 1), ((2, 1), (0, 3)), (2, 1), (1, 2), 1),
]


@pytest.mark.parametrize(
    ("name", "extent", "window", "strides", "padding", "lhs", "rhs", "groups"),
    REFERENCE,
)
def test_folded_convolutions_follow_the_equations(
    name, extent, window, strides, padding, lhs, rhs, groups, x64
):
    sampler = cases.SAMPLERS[name]
    taps = [
        reference.taps(*axis)
        for axis in zip(extent, window, strides, padding, lhs, rhs, strict=True)
    ]
    shape = (8, *(len(tap) for tap in taps), OUTPUTS)
    x = cases.inputs((8, *extent, INPUTS), "float64")
    kernel = cases.inputs((*window, INPUTS // groups, OUTPUTS), "float64", seed=1)
    scale, bias = cases.inputs((2, OUTPUTS), "float64", seed=2)
    residual, g = cases.inputs((2, *shape), "float64", seed=3)

    # A kernel for one group, zero where inputs and outputs are of different ones.
    same = np.kron(np.eye(groups), np.ones((INPUTS // groups, OUTPUTS // groups)))
    whole = same * np.concatenate([kernel] * groups, axis=-2)
    z = reference.contract("y", taps, x=x, kernel=whole)
    mean, var = samples.moments(z, sampler)
    total = reference.normalize(z, mean, var, scale, bias) + residual
    by_residual = np.where(total > 0, g, 0)
    by_z, by_scale, by_bias = reference.backward(
        z, by_residual, samples.shares(sampler, shape), scale
    )
    by_whole = same * reference.contract("kernel", taps, x=x, y=by_z)
    expected = (
        (np.maximum(total, 0), sbn.Statistics(mean, var)),
        {
            "x": reference.contract("x", taps, y=by_z, kernel=whole),
            "kernel": sum(np.split(by_whole, groups, axis=-2)),
            "scale": by_scale,
            "bias": by_bias,
            "residual": by_residual,
        },
    )

    def fold(**arguments):
        return sbn.conv_norm(
            **arguments,
            sampler=sampler,
            key=KEY,
            activation=sbn.relu,
            strides=strides,
            padding=padding,
            input_dilation=lhs,
            kernel_dilation=rhs,
            feature_group_count=groups,
        )

    arguments = {"x": x, "kernel": kernel, "scale": scale, "bias": bias}
    cotangents = (g, sbn.Statistics(np.zeros(OUTPUTS), np.zeros(OUTPUTS)))
    actual = unfolded.quick_jit(
        lambda given: unfolded.value_and_gradients(fold, given, cotangents)
    )({**arguments, "residual": residual})
    assert_same_to_rounding(actual, expected)


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """A patch at a given place, or one for each run of images."""

    starts: Any
    sizes: tuple[int, ...]
    runs: int = 1

    needs_key: ClassVar[bool] = False

    def parts(self, shape, key):
        sizes = (shape[0] // self.runs, *self.sizes)
        return (Part(1.0, (Windows(self.runs, (0, *self.starts), sizes),)),)


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        border=list(cases.BORDERS),
        strides=[(1, 1), (2, 3)],
        kernel_dilation=[(1, 1), (2, 1)],
        sizes=[(2, 2), (99, 1)],
    ),
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_a_patch_may_be_anywhere(case, x64):
    options = {
        "strides": case["strides"],
        "kernel_dilation": case["kernel_dilation"],
        **cases.border(case["border"], 2),
    }
    x = cases.inputs((2, 7, 8, 3), "float64")
    kernel = cases.inputs((3, 2, 3, 4), "float64", seed=1)
    conv = unfolded.quick_jit(functools.partial(unfolded.conv, **options))
    z = np.asarray(conv(x, kernel))
    extent = z.shape[1:-1]
    sizes = tuple(map(min, case["sizes"], extent))
    counts = [n - size + 1 for n, size in zip(extent, sizes, strict=True)]
    places = list(itertools.product(*map(range, counts)))

    def measure(x, starts, runs=1):
        sampler = Patch(starts, sizes, runs)
        return sbn.conv_norm(x, kernel, sampler=sampler, **options)[1]

    def moments(blocks):
        blocks = np.stack(blocks).reshape(-1, blocks[0].shape[-1])
        return sbn.Statistics(blocks.mean(0), blocks.var(0))

    def block(z, place):
        return z[:, *(slice(i, i + n) for i, n in zip(place, sizes, strict=True))]

    at = unfolded.quick_jit(measure)
    for place in places:
        assert_same_to_rounding(at(x, place), moments([block(z, place)]))
    # Where the place is known while tracing, too.
    last = unfolded.quick_jit(functools.partial(measure, starts=places[-1]))
    assert_same_to_rounding(last(x), moments([block(z, places[-1])]))

    # All at once: images of their own, which see another input each.
    many = np.concatenate([x + i for i in range(len(places))])
    each = np.split(conv(many, kernel), len(places))
    starts = jnp.asarray(places, jnp.int32).T
    assert_same_to_rounding(
        unfolded.quick_jit(functools.partial(measure, runs=len(places)))(many, starts),
        moments([block(z, place) for z, place in zip(each, places, strict=True)]),
    )


def conv_of_users(*args, **kwargs):
    """A convolution that is not JAX's own, but gives the same."""
    return jax.lax.conv_general_dilated(*args, **kwargs)


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        border=list(cases.BORDERS),
        rank=[1, 2, 3],
        strides=[(1, 1, 1), (2, 3, 1)],
        kernel_dilation=[(1, 1, 1), (2, 1, 3)],
        groups=[1, 2],
        function=[jax.lax.conv_general_dilated, conv_of_users],
    ),
    ids=lambda case: "-".join(getattr(v, "__name__", str(v)) for v in case.values()),
)
def test_each_position_of_a_lattice_is_the_output_there(case, x64):
    rank, groups = case["rank"], case["groups"]
    options = {
        "strides": case["strides"][:rank],
        "kernel_dilation": case["kernel_dilation"][:rank],
        **cases.border(case["border"], rank),
    }
    x = cases.inputs((2, *(7, 8, 6)[:rank], 4), "float64")
    window = (3, 2, 2)[:rank]
    kernel = cases.inputs((*window, 4 // groups, 4), "float64", seed=1)

    @unfolded.quick_jit
    def both(x, kernel):
        z = unfolded.conv(x, kernel, feature_group_count=groups, **options)
        extent = z.shape[1:-1]
        everywhere = [*itertools.product(*map(range, extent))]
        # All in one or two dimensions. An odd step: other lines, columns and planes.
        step = len(everywhere) // 100 * 2 + 1
        positions = tuple(everywhere[::step])
        part = Part(1.0, (Lattice(extent, (1,) * rank, positions),))
        convolution = make_convolution(
            window,
            groups=groups,
            precision=None,
            function=case["function"],
            **options,
        )
        expected = z.reshape(2, -1, *[1] * (rank - 1), 4)[:, ::step]
        padded, convolution = convolution.bordered(x)
        return convolution.at(padded, kernel, part, extent), expected

    assert_same_to_rounding(*both(x, kernel))


def test_padding_may_be_arrays():
    x, kernel = np.ones((4, 5, 3)), np.ones((3, 3, 2))
    padded = [
        sbn.conv_norm(x, kernel, padding=[(one, 1)], sampler=sbn.NaiveSampling(2))[0]
        for one in (1, np.array(1), jnp.int32(1))
    ]
    for y in padded[1:]:
        np.testing.assert_array_equal(y, padded[0])


@dataclasses.dataclass(frozen=True)
class Nested:
    """A patch for each half of the images, and one for each quarter in both."""

    needs_key: ClassVar[bool] = False

    def parts(self, shape, key):
        outer = Windows(2, (1, jnp.array([1, 0]), jnp.array([0, 2])), (2, 4, 4))
        inner = Windows(4, (0, jnp.array([2, 0, 1, 2]), 1), (1, 2, 3))
        return (Part(0.25, (outer, inner)), Part(0.75, (outer,)))


@pytest.mark.parametrize("border", ["SAME", "pairs", "dilated"])
def test_patches_may_be_in_patches(border, x64):
    options = {"strides": (1, 2), **cases.border(border, 2)}
    x = cases.inputs((8, 7, 12, 3), "float64")
    kernel = cases.inputs((3, 2, 3, 4), "float64", seed=1)
    sampler = Nested()

    @unfolded.quick_jit
    def all_three(x, kernel):
        z = unfolded.conv(x, kernel, **options)
        expected = sbn.batch_statistics(z, sampler=sampler)
        return z, expected, sbn.conv_norm(x, kernel, sampler=sampler, **options)[1]

    z, expected, actual = all_three(x, kernel)
    moments = samples.moments(z, sampler)
    assert_same_to_rounding(expected, sbn.Statistics(*moments))
    assert_same_to_rounding(actual, expected)
