"""A mesh of all devices, and what a compiled program sends between them."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


def mesh() -> Mesh:
    """Returns all devices along the axis ``data``."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def collectives(function: Callable[..., Any], *args: Any) -> list[tuple[str, ...]]:
    """Returns the collective operations of a compiled program, and what they send."""
    text = jax.jit(function).lower(*args).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # "/*index=5*/" in long lists of types
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= ([^=]*?) ({kinds})(?:-start)?\(", text)
    return [(kind, *re.findall(r"\w+\[[\d,]*\]", types)) for types, kind in found]
