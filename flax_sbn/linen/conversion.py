"""Variables of plain Linen layers as those of folded ones, and back: names and biases.

What belongs together is what :func:`flax_sbn.linen.switch_report` has traced.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_sbn.modules.switching import Path, SwitchReport, written

# Called with the paths of a layer and its norm, returns that of the folded layer.
Names = Callable[[str, str], str]
Flat = dict[Path, Any]

_STATS = "batch_stats"


def to_folded_layers(
    variables: Mapping[str, Any], report: SwitchReport, *, names: Names | None = None
) -> dict[str, Any]:
    """Renames variables of layers and norms to those of :class:`ConvNorm`.

    ``Conv_0/kernel`` becomes ``ConvNorm_0/conv/kernel``, and ``BatchNorm_0/scale``
    ``ConvNorm_0/norm/scale``, for each norm that the report calls folded. For a dense
    layer the names are those of :class:`DenseNorm`. A bias of the layer is subtracted
    from the norm's running mean, the only place where it matters, and left out. The
    model with the folded layers then computes what the plain one does.

    You may pass other trees, such as optimizer states, along with the variables, under
    any key. They are renamed wherever they are nested as ``params`` or ``batch_stats``
    are. All else, sharding metadata included, stays as it is.

    The report depends on the sampler: :class:`flax_sbn.LatticeSampling` measures all of
    a small map, and has nothing to fold there. With ``BatchSampling(2)`` all norms
    that directly follow a layer are reported as folded.

    Args:
      variables: ``{"params": ..., "batch_stats": ...}`` of the plain model, and any
        other trees to rename.
      report: what becomes of the plain model's norms, from :func:`switch_report`.
      names: a function of the paths of a layer and of its norm, such as
        ``"Block_0/Conv_3"``, that returns the path of the folded layer. By default
        ``Conv_3`` becomes ``ConvNorm_3``, ``Dense_1`` becomes ``DenseNorm_1``, and a
        layer with another name keeps it.

    Returns:
      Variables of the same nesting.

    Raises:
      ValueError: if the report has no folded norm, or one that is called with several
        layers; if variables are missing or do not fit each other; if names clash.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         return nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))
      >>> x = jnp.ones((32, 16, 16, 3))
      >>> variables = Net().init(jax.random.key(0), x, train=True)
      >>> model = sbn.linen.sample_norms(Net())
      >>> report = sbn.linen.switch_report(model, x, train=True)
      >>> converted = sbn.linen.to_folded_layers(variables, report)
      >>> jax.tree.map(jnp.shape, converted["params"]["ConvNorm_0"])
      {'conv': {'kernel': (3, 3, 3, 4)}, 'norm': {'bias': (4,), 'scale': (4,)}}
    """
    params, stats = _flat_variables(variables)
    moves: dict[Path, Path] = {}
    biases: set[Path] = set()
    shifted = dict(stats)
    pairs = _pairs(report, names)
    for layer, norm, folded in pairs:
        kernel, mean = _kernel_and_mean(params, stats, layer, norm)
        # A scan adds an axis to both.
        dense = kernel.ndim - mean.ndim == 1
        moves[layer] = (*folded, "dense" if dense else "conv")
        moves[norm] = (*folded, "norm")
        bias = (*layer, "bias")
        if bias in params:
            biases.add(bias)
            shifted[*norm, "mean"] = _subtract(stats[*norm, "mean"], params[bias])
    _refuse_clashes([pair.folded for pair in pairs], (*params, *stats), moves)

    def convert(flat: Flat) -> Flat:
        return _rename({p: v for p, v in flat.items() if p not in biases}, moves)

    variables = {**variables, _STATS: unflatten_dict(shifted)}
    return _convert_like(variables, (params, stats), convert)


def to_plain_layers(
    variables: Mapping[str, Any],
    report: SwitchReport,
    *,
    names: Names | None = None,
    use_bias: bool = False,
) -> dict[str, Any]:
    """Renames variables of folded layers to those of layers and norms.

    The inverse of :func:`to_folded_layers`: see there.

    Args:
      variables: of the model with folded layers, and any other trees to rename.
      report: what becomes of the *plain* model's norms, from :func:`switch_report`.
      names: as they were given to :func:`to_folded_layers`.
      use_bias: whether the plain layers have a bias. It is zero, and so are its entries
        in the other trees. Its dtype and metadata are those of the norm's bias or, if
        there is none, of its scale.

    Returns:
      Variables of the same nesting.

    Raises:
      ValueError: as :func:`to_folded_layers`; or if a bias is wanted, and the norm has
        neither bias nor scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> pair = sbn.SwitchedNorm("bn", "folded", "cnn", "")
      >>> plain = sbn.linen.to_plain_layers(
      ...     variables, sbn.SwitchReport((pair,)), names=lambda layer, norm: ""
      ... )
      >>> jax.tree.map(jnp.shape, plain["params"])
      {'bn': {'bias': (4,), 'scale': (4,)}, 'cnn': {'kernel': (3, 3, 3, 4)}}
    """
    params, stats = _flat_variables(variables)
    moves: dict[Path, Path] = {}
    pairs = _pairs(report, names)
    for layer, norm, folded in pairs:
        dense = (*folded, "dense", "kernel") in params
        linear, inner = (*folded, "dense" if dense else "conv"), (*folded, "norm")
        _kernel_and_mean(params, stats, linear, inner)
        moves[linear], moves[inner] = layer, norm
    _refuse_clashes([*moves.values()], (*params, *stats), moves)

    def convert(flat: Flat) -> Flat:
        plain = _rename(flat, moves)
        if use_bias and flat.keys() == params.keys():
            for layer, norm, _ in pairs:
                plain[*layer, "bias"] = _zero_bias(plain, norm)
        return plain

    return _convert_like(variables, (params, stats), convert)


class _Pair(NamedTuple):
    layer: Path
    norm: Path
    folded: Path


def _pairs(report: SwitchReport, names: Names | None) -> list[_Pair]:
    """Returns the pairs of a report and what they become, each of which is unique."""
    name = names or _default_name
    called = dict.fromkeys((each.layer, each.norm) for each in report.norms)
    pairs = [
        _Pair(_path(layer), _path(norm), _path(name(layer, norm)))
        for layer, norm in called
        if layer
    ]
    if not pairs:
        raise ValueError(
            "Expected a report with folded norms, got none. Report on the plain model, "
            "sbn.linen.switch_report(sbn.linen.sample_norms(model), ...), with a "
            "sampler that measures less than all."
        )
    for what, paths in {
        "layer": [pair.layer for pair in pairs],
        "norm": [_path(norm) for _, norm in called],
        "name": [pair.folded for pair in pairs],
    }.items():
        if again := [path for path, times in Counter(paths).items() if times > 1]:
            raise ValueError(
                f"Expected each {what} in one pair of layer and norm, got "
                f"{_listed(again)} in several. Give the pairs names of their own in "
                "`names`, and leave shared modules out with `only` of sample_norms."
            )
    return pairs


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(repr(written(path)) for path in paths)


def _default_name(layer: str, norm: str) -> str:
    return re.sub(r"(^|/)(Conv|Dense)(_\d+)$", r"\1\2Norm\3", layer)


def _path(text: str) -> Path:
    return tuple(text.split("/")) if text else ()


def _flat_variables(variables: Mapping[str, Any]) -> tuple[Flat, Flat]:
    """Returns parameters and running statistics by their paths."""
    return _flat(variables.get("params", {})), _flat(variables.get(_STATS, {}))


def _flat(tree: Any) -> Flat:
    return flatten_dict(tree, keep_empty_nodes=True)


def _kernel_and_mean(params: Flat, stats: Flat, layer: Path, norm: Path) -> Any:
    """Returns what every pair has, and complains where it does not."""
    needed = {(*layer, "kernel"): params, (*norm, "mean"): stats}
    if missing := [path for path, given in needed.items() if path not in given]:
        raise ValueError(
            "Expected params and batch_stats of the layers and norms in the report, "
            f"got none of {_listed(missing)}. Pass what the init of the model "
            "returned, with the values replaced."
        )
    kernel, mean = (nn.meta.unbox(given[path]) for path, given in needed.items())
    if kernel.shape[-1] != mean.shape[-1]:
        raise ValueError(
            "Expected as many features of a layer as of its norm, got "
            f"{written(layer)}/kernel of shape {kernel.shape} and {written(norm)}/mean "
            f"of shape {mean.shape}. Report on the model that the variables are of."
        )
    return kernel, mean


def _refuse_clashes(
    new: list[Path], variables: Iterable[Path], moves: Mapping[Path, Path]
) -> None:
    """Complains if a new module is not alone at its path.

    ``variables`` are old paths, and ``moves`` has the new ones of modules by the old.
    """
    kept = {path[:-1] for path in variables} - moves.keys()
    for path in new:
        inside = [each for each in (*new, *kept) if each[: len(path)] == path]
        if len(inside) > 1:
            raise ValueError(
                f"Expected one module at {written(path)!r}, got "
                f"{_listed(sorted(inside))}. Return another path in `names`."
            )


def _rename(flat: Flat, moves: Mapping[Path, Path]) -> Flat:
    """Moves the variables of modules."""
    return {
        (*moves.get(path[:-1], path[:-1]), path[-1]): value
        for path, value in flat.items()
    }


def _convert_like(
    tree: Any, like: Iterable[Flat], convert: Callable[[Flat], Flat]
) -> Any:
    """Converts all in a tree that has the nested names of one of those given."""
    names = [flat.keys() for flat in like]

    def is_like(node: Any) -> bool:
        return isinstance(node, dict | FrozenDict) and _flat(node).keys() in names

    return jax.tree.map(
        lambda node: unflatten_dict(convert(_flat(node))) if is_like(node) else node,
        tree,
        is_leaf=is_like,
    )


def _subtract(mean: Any, bias: Any) -> Any:
    """Subtracts a bias, and keeps the box of the mean if it has one."""
    value, shift = nn.meta.unbox((mean, bias))
    return nn.meta.replace_boxed(mean, value - shift.astype(value.dtype))


def _zero_bias(params: Flat, norm: Path) -> Any:
    """Returns the zero bias of a layer, boxed or masked as the norm's parameters."""
    for name in ("bias", "scale"):
        if (*norm, name) in params:
            return jax.tree.map(jnp.zeros_like, params[*norm, name])
    raise ValueError(
        f"Expected a norm with a bias or a scale, got neither in {written(norm)}. A "
        "bias of the layer before it takes their form; do without use_bias=True."
    )
