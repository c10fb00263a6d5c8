"""Samplers and shapes that run through every general test, and the benchmarks' shapes.

Tests and benchmarks both read these tables: a sampler, or a shape, is one row here.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_sbn as sbn

LATTICE = sbn.LatticeSampling(2, min_values=32)
SAMPLERS: dict[str, sbn.Sampler] = {
    "NS": sbn.NaiveSampling(4),
    "BS": sbn.BatchSampling(4),
    "BS-strata": sbn.BatchSampling(4, strata=2),
    "FS-one-patch": sbn.FeatureSampling(1 / 4, min_values=8, groups=1),
    "FS": sbn.FeatureSampling(1 / 4),
    "copies": sbn.CopySampling(4),
    "VDN": sbn.VirtualSampling(4),
    "VDN-strata": sbn.VirtualSampling(4, strata=2),
    "FS+VDN": sbn.MixedSampling(sbn.FeatureSampling(1 / 4), sbn.VirtualSampling(4)),
    "BS+VDN": sbn.MixedSampling(
        sbn.BatchSampling(4), sbn.VirtualSampling(4, strata=2), virtual_weight=0.25
    ),
    "lattice": LATTICE,
    "lattice+VDN": sbn.MixedSampling(LATTICE, sbn.VirtualSampling(4)),
}
# Those that need more than examples. A lattice does not: without a map it measures all.
SPATIAL = {"FS-one-patch", "FS", "FS+VDN"}

# Small inputs by rank, features last.
SHAPES: dict[int, tuple[int, ...]] = {
    2: (16, 3),
    3: (16, 9, 3),
    4: (16, 6, 4, 3),
    5: (16, 2, 4, 3, 2),
}

DTYPES = ["float32", "bfloat16", "float16", "complex64", "float64"]


def pairwise(**options: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns few rows in which every two values of different options meet."""
    size = {name: len(values) for name, values in options.items()}
    missing = {
        ((m, a), (n, b))
        for m, n in itertools.combinations(options, 2)
        for a, b in itertools.product(range(size[m]), range(size[n]))
    }

    def gain(row: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        ordered = [(name, row[name]) for name in options if name in row]
        return missing & set(itertools.combinations(ordered, 2))

    # Where nothing is gained, anything may meet; the same in every run.
    choose = random.Random(0)
    rows = []
    while missing:
        row = dict(min(missing))
        for name in options:
            if name not in row:
                gains = [len(gain({**row, name: i})) for i in range(size[name])]
                best = [i for i, value in enumerate(gains) if value == max(gains)]
                row[name] = choose.choice(best)
        missing -= gain(row)
        rows.append(row)
    return [{name: options[name][row[name]] for name in options} for row in rows]


SAMPLER_RANKS = [
    (name, rank)
    for name, rank in itertools.product(SAMPLERS, SHAPES)
    if rank > 2 or name not in SPATIAL
]

# Every two of sampler, rank and dtype meet; rows alone have no patches.
SAMPLER_CASES: list[tuple[str, int, str]] = sorted(
    (row["name"], max(row["rank"], 3 if row["name"] in SPATIAL else 2), row["dtype"])
    for row in pairwise(name=list(SAMPLERS), rank=list(SHAPES), dtype=DTYPES)
)

# Padding and input dilation of convolutions with three spatial axes. With fewer axes
# they are the first of these values.
BORDERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SAME": ("SAME", (1, 1, 1)),
    "VALID": ("VALID", (1, 1, 1)),
    "SAME_LOWER": ("SAME_LOWER", (1, 1, 1)),
    "CIRCULAR": ("CIRCULAR", (1, 1, 1)),
    "REFLECT": ("REFLECT", (1, 1, 1)),
    "int": (3, (1, 1, 1)),
    "pairs": (((2, 1), (0, 3), (1, 1)), (1, 1, 1)),
    "negative": (((-1, 0), (1, -2), (-1, 1)), (1, 1, 1)),
    "dilated": (((2, 1), (0, 3), (1, 0)), (2, 3, 2)),
    "dilated-negative": (((-1, 2), (1, -3), (0, -1)), (3, 1, 2)),
}


def border(name: str, rank: int) -> dict[str, Any]:
    """Returns a row of ``BORDERS`` as options of a convolution of the given rank."""
    padding, input_dilation = BORDERS[name]
    if not isinstance(padding, str | int):
        padding = padding[:rank]
    return {"padding": padding, "input_dilation": input_dilation[:rank]}


# What one example of a batch normalization's input is, in real models: ResNet-50's stem
# and stages at 224 x 224, and a multilayer perceptron.
LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "resnet50-stem": (112, 112, 64),
    "resnet50-stage1": (56, 56, 64),
    "resnet50-stage1-out": (56, 56, 256),
    "resnet50-stage2-out": (28, 28, 512),
    "resnet50-stage3-out": (14, 14, 1024),
    "resnet50-stage4-out": (7, 7, 2048),
    "mlp": (1024,),
}


def layer_shape(name: str, batch_size: int) -> tuple[int, ...]:
    """Returns the input's shape of a layer of ``LAYER_SHAPES``."""
    return (batch_size, *LAYER_SHAPES[name])


def inputs(shape: Sequence[int], dtype: str = "float32", seed: int = 0) -> jax.Array:
    """Returns random data of mean 1 and standard deviation 2."""
    rng = np.random.default_rng(seed)
    x = 1 + 2 * rng.standard_normal(tuple(shape))
    if dtype.startswith("complex"):
        x = x + 2j * rng.standard_normal(tuple(shape))
    return jnp.asarray(x, dtype)
