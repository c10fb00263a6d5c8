"""A mesh of all devices, and what a compiled program sends between them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compiled import collectives as reading


def mesh() -> Mesh:
    """Returns all devices along the axis ``data``."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def collectives(function: Callable[..., Any], *args: Any) -> list[tuple[str, ...]]:
    """Returns the collective operations of a compiled program, and what they send."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return [(each.kind, *map(str, each.arrays)) for each in reading.collectives(text)]
