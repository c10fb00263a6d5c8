"""Whether a Linen layer sees its variables as they are stored.

Lifted transformations hand them on, stacked or sliced; a wrapper such as
``flax.linen.WeightNorm`` computes others of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal, Var

# What moves values, and computes nothing.
_MOVES = {
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "dynamic_slice",
    "pvary",
    "reshape",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}
_MARK = "as stored: "

Path = tuple[str, ...]


def mark(layer: nn.Module) -> None:
    """Marks in the program that is traced what a layer finds as its variables."""
    for (collection, *path), value in _flat(layer.variables).items():
        checkpoint_name(value, _name((collection, *layer.path, *path)))


def changed_variables(function: Callable[[Any], Any], variables: Any) -> list[Path]:
    """Returns the paths of marked variables that are not those in ``variables``."""
    flat = _flat(variables)

    def call(*values: Any) -> Any:
        nested = dict(zip(flat, values, strict=True))
        return function(traverse_util.unflatten_dict(nested))

    jaxpr = jax.make_jaxpr(call)(*flat.values()).jaxpr
    names = [_name(path) for path in flat for _ in jax.tree.leaves(flat[path])]
    origins = dict(zip(jaxpr.invars, names, strict=True))
    changed = {marked for marked, origin in _marks(jaxpr, origins) if marked != origin}
    return [path for path in flat if _name(path) in changed]


def _name(path: Path) -> str:
    return f"{_MARK}{path}"


def _flat(variables: Any) -> dict[Path, Any]:
    return traverse_util.flatten_dict(nn.meta.unbox(variables))


def _marks(jaxpr: Jaxpr, origins: dict[Var, str]) -> Iterator[tuple[str, str | None]]:
    """Yields the marks in a program, each with the variable that is found there.

    ``origins`` are the variables that it is given; those that it hands on are added.
    """
    for eqn in jaxpr.eqns:
        given = [None if isinstance(v, Literal) else origins.get(v) for v in eqn.invars]
        name = str(eqn.params.get("name", ""))
        if name.startswith(_MARK):
            yield name, given[0]
        handed_on = given[:1] if eqn.primitive.name in _MOVES else []
        for inner in _programs(eqn.params):
            # Operands that choose or count come first.
            known = zip(reversed(inner.invars), reversed(given), strict=False)
            inside = {v: origin for v, origin in known if origin}
            yield from _marks(inner, inside)
            handed_on = [
                None if isinstance(v, Literal) else inside.get(v) for v in inner.outvars
            ]
        results = zip(eqn.outvars, handed_on, strict=False)
        origins |= {v: origin for v, origin in results if origin}


def _programs(params: Any) -> list[Jaxpr]:
    """Returns the programs in the parameters of an operation."""
    found = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(params)]
    return [leaf for leaf in found if isinstance(leaf, Jaxpr)]
