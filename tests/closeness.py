"""The one tolerance of all tests: rounding, growing with the number of values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def eps(dtype: str) -> float:
    """Returns the relative spacing of a dtype's numbers."""
    return float(jnp.finfo(dtype).eps)


def tolerance(
    expected: Any, dtype: str = "float32", num: float = 1, c: float = 4.0
) -> float:
    """Returns how far what is close may be off; see `assert_close`."""
    magnitude = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(c * eps(dtype) * num**0.5 * magnitude)


def assert_close(
    actual: Any,
    expected: Any,
    dtype: str = "float32",
    num: float = 1,
    c: float = 4.0,
) -> None:
    """Asserts equality to ``c * eps(dtype) * sqrt(num)``, relative to the largest.

    Args:
      actual: what the library gives, of any dtype.
      expected: the truth in float64, or another result of the library.
      dtype: that of the least precise step.
      num: how many values are added up for each result.
      c: rounding errors on the way.
    """
    # Not NumPy's: it has no bfloat16.
    actual, expected = (np.asarray(a) for a in (actual, expected))
    wide: Any = np.complex128 if np.iscomplexobj(expected) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    assert actual.shape == expected.shape
    atol = tolerance(expected, dtype, num, c)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_trees_close(actual: Any, expected: Any, **options: Any) -> None:
    """Asserts that arrays and keys of a tree are another's; see `assert_close`."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, e in pairs:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = map(jax.random.key_data, (a, e))
        assert_close(a, np.float64(e), **options)


def assert_same_to_rounding(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Asserts that each array of a tree is another's, relative to its largest value."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(actual),
        strict=True,
    )
    for (path, e), a in pairs:
        assert a.dtype == e.dtype
        np.testing.assert_allclose(
            a,
            e,
            rtol=0,
            atol=rtol * np.abs(e).max(initial=0.0),
            err_msg=jax.tree_util.keystr(path),
        )
