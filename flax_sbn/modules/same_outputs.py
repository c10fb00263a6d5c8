"""Whether a model that was changed gives the outputs that it gave before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_same_outputs(
    before: Callable[..., Any], after: Callable[..., Any], inputs: tuple[Any, ...]
) -> None:
    """Raises a ValueError if outputs of two functions, trees of arrays, differ.

    The square root of their dtype's precision, relative to the largest, is no error.
    """
    with jax.default_matmul_precision("highest"):
        pairs = zip(
            jax.tree.leaves(before(*inputs)),
            jax.tree.leaves(after(*inputs)),
            strict=True,
        )
    for expected, actual in pairs:
        dtype = jnp.promote_types(actual.dtype, jnp.bfloat16)
        largest = float(jnp.max(jnp.abs(expected), initial=0.0))
        error = float(jnp.max(jnp.abs(actual - expected), initial=0.0))
        if not error <= float(jnp.finfo(dtype).eps) ** 0.5 * largest:
            raise ValueError(
                "Expected the outputs of before for the example inputs, got outputs "
                f"that differ by up to {error:.3g}, where the largest is {largest:.3g}."
                " Does the model change or share the kernels, or train?"
            )
