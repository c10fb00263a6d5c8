"""What samplers measure, put into the reference's words; features last."""

import math
from collections.abc import Sequence

import jax
import numpy as np

import flax_sbn as sbn
from flax_sbn.lattice import Lattice
from flax_sbn.sampling import sampled_parts
from flax_sbn.windows import Selection, Windows
from tests import reference

KEY = jax.random.key(7)


# One compiled program each; samplers are static.
STATIC = ("sampler", "axis", "axis_name", "axis_index_groups", "use_fast_variance")
batch_statistics = jax.jit(sbn.batch_statistics, static_argnames=STATIC)
batch_norm = jax.jit(sbn.batch_norm, static_argnames=(*STATIC, "dtype"))


def take(selection: Selection, x: np.ndarray) -> np.ndarray:
    """Returns the values at the positions; features, if there are any, last."""
    if isinstance(selection, Lattice):
        values = x[:, *np.transpose(selection.positions)]
        return np.expand_dims(values, tuple(range(2, 1 + len(selection.cells))))
    assert isinstance(selection, Windows)
    return windows_taken(selection, x)


def windows_taken(windows: Windows, x: np.ndarray) -> np.ndarray:
    """Returns the values in the windows, run by run."""
    starts = [np.broadcast_to(start, windows.runs) for start in windows.starts]
    blocks = []
    for i, run in enumerate(np.split(x, windows.runs)):
        places = zip(starts, windows.sizes, strict=True)
        blocks.append(run[tuple(slice(s[i], s[i] + n) for s, n in places)])
    return np.concatenate(blocks)


def measured(
    sampler: sbn.Sampler | None, extent: Sequence[int], key: jax.Array | None = KEY
) -> tuple[list[np.ndarray], list[float]]:
    """Returns where each part of a sample lies, and the parts' weights."""
    wheres, weights = [], []
    for part in sampled_parts(sampler, tuple(extent), key):
        index = np.arange(math.prod(extent)).reshape(extent)
        for selection in part.windows:
            index = take(selection, index)
        wheres.append(np.zeros(extent, bool))
        wheres[-1].flat[index] = True
        weights.append(part.weight)
    return wheres, weights


def shares(
    sampler: sbn.Sampler | None,
    shape: Sequence[int],
    mask: np.ndarray | bool = True,
    key: jax.Array | None = KEY,
) -> np.ndarray:
    """Returns how much of the measured population each value is."""
    wheres, weights = measured(sampler, shape[:-1], key)
    wheres = [np.broadcast_to(where[..., None] & mask, shape) for where in wheres]
    return reference.shares(wheres, weights)


def moments(
    x: jax.Array, sampler: sbn.Sampler | None, mask: np.ndarray | bool = True
) -> reference.Moments:
    """Returns the moments of every part of the sample, mixed."""
    values = np.asarray(x)
    wheres, weights = measured(sampler, x.shape[:-1])
    wheres = [np.broadcast_to(where[..., None] & mask, x.shape) for where in wheres]
    return reference.mix(
        [reference.moments(values, where) for where in wheres], weights
    )
