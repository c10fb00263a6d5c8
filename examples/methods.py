"""The normalizations that can be compared, and how to write them on a command line.

A method is ``bn``, ``flax`` (flax's own), ``gn`` or ``none``, or a sampler in short
form: ``ns:1``, ``bs:4``, ``fs:1/64``, ``vdn:2``, or two of them mixed,
``fs:1/64+vdn:4``. Amounts are rows, or for FS the share of each feature map; without
them the paper's are used. Any other sampler is written as in Python:
``FeatureSampling(1/16, groups=1)``. Behind each of them ``~3/4`` is the weight of the
running statistics: ``fs:1/64~3/4``.
"""

import ast
import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax

import flax_sbn as sbn

_KINDS = {"bn": "batch", "flax": "flax", "gn": "group", "none": "none"}
NAMES = (*_KINDS, "ns", "bs", "fs", "vdn", "fs+vdn", "bs+vdn")
DEFAULT = ("bn", "ns:1", "bs:4", "fs:1/64", "vdn:2", "fs:1/64+vdn:4")

_AMOUNTS = {"ns": "1", "bs": "4", "fs": "1/64", "vdn": "2"}
_SAMPLERS = {
    cls.__name__: cls
    for cls in (
        sbn.NaiveSampling,
        sbn.BatchSampling,
        sbn.FeatureSampling,
        sbn.VirtualSampling,
        sbn.MixedSampling,
    )
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A normalization to train with.

    Attributes:
      name: as the user wrote it; the label in tables and plots.
      kind: ``'batch'``, ``'flax'`` (flax's own batch normalization), ``'group'``, or
        ``'none'``, which has convolutions with a bias.
      sampler: what batch normalization measures; None measures all of the batch.
      running_weight: how far the statistics of kind ``'batch'`` are moved towards the
        running ones.
      folded: whether kind ``'batch'`` is folded into the layer before, if there is one.
    """

    name: str
    kind: str = "batch"
    sampler: sbn.Sampler | None = None
    running_weight: float = 0.0
    folded: bool = False

    def fold(self) -> "Method":
        """Returns the method folded, or as it is where nothing is sampled."""
        return dataclasses.replace(self, folded=self.sampler is not None)

    @property
    def options(self) -> dict[str, Any]:
        """What our batch normalization is told, besides what flax's is."""
        if self.kind != "batch":
            return {}
        return {"sampler": self.sampler, "running_weight": self.running_weight}

    @property
    def virtual(self) -> sbn.VirtualSampling | None:
        """Which virtual rows the sampler expects in the batch, if any."""
        sampler = self.sampler
        if isinstance(sampler, sbn.MixedSampling):
            sampler = sampler.virtual
        return sampler if isinstance(sampler, sbn.VirtualSampling) else None


@dataclasses.dataclass(frozen=True)
class Tally:
    """A sampler that counts what another one measures; it serves for shape tracing.

    Attributes:
      sampler: the sampler to count for; None measures everything.
      counts: appended to at each use: values measured and values in all.
    """

    sampler: sbn.Sampler | None
    counts: list[tuple[int, int]] = dataclasses.field(compare=False)

    @property
    def needs_key(self) -> bool:
        """Whether the sampler draws positions."""
        return self.sampler is not None and self.sampler.needs_key

    def parts(self, shape: tuple[int, ...], key: jax.Array | None) -> Any:
        """Chooses what the sampler chooses, and counts it."""
        self.counts.append((sbn.num_measured(self.sampler, shape), math.prod(shape)))
        sampler = self.sampler or sbn.NaiveSampling(shape[0])
        return sampler.parts(shape, key)


def parse(text: str) -> Method:
    """Reads a method in short form or a sampler as in Python, either with a weight.

    Raises:
      ValueError: if it is neither.

    Example:
      >>> parse("bs:4~3/4")  # doctest: +NORMALIZE_WHITESPACE
      Method(name='bs:4~3/4', kind='batch',
             sampler=BatchSampling(num_samples=4, strata=1),
             running_weight=0.75, folded=False)
    """
    name, tilde, weight = text.partition("~")
    method = parse_sampler(name) if "(" in name else parse_method(name)
    if not tilde:
        return method
    running_weight = _weight(weight)
    if method.kind != "batch" or running_weight is None:
        raise ValueError(
            "Expected a weight in [0, 1] behind bn or a sampler such as bs:4~3/4, got "
            f"{text!r}."
        )
    return dataclasses.replace(method, name=text, running_weight=running_weight)


def _weight(text: str) -> float | None:
    try:
        weight = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return None
    return weight if 0 <= weight <= 1 else None


def parse_method(text: str) -> Method:
    """Reads a method in short form.

    Raises:
      ValueError: if it is none.

    Example:
      >>> parse_method("fs:1/16").sampler
      FeatureSampling(fraction=0.0625, min_values=32, groups=None)
    """
    if text in _KINDS:
        return Method(text, _KINDS[text])
    try:
        parts = [_parse_short(part) for part in text.split("+")]
        match parts:
            case [sampler]:
                return Method(text, sampler=sampler)
            case [real, sbn.VirtualSampling() as virtual]:
                return Method(text, sampler=sbn.MixedSampling(real, virtual))
    except KeyError:
        pass
    raise ValueError(
        f"Expected a method such as {', '.join(NAMES)} or fs:1/64+vdn:4, got {text!r}."
    )


def _parse_short(text: str) -> sbn.Sampler:
    name, _, amount = text.partition(":")
    amount = amount or _AMOUNTS[name]
    try:
        if name == "fs":
            return sbn.FeatureSampling(float(Fraction(amount)))
        rows = int(amount)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"Expected {name}:AMOUNT such as {name}:{_AMOUNTS[name]}, got {text!r}. "
            f"{error}"
        ) from error
    cls = {
        "ns": sbn.NaiveSampling,
        "bs": sbn.BatchSampling,
        "vdn": sbn.VirtualSampling,
    }
    return cls[name](rows)


def parse_sampler(text: str) -> Method:
    """Reads a sampler written as in Python, without running it as code.

    Raises:
      ValueError: if it is not a call of one of the library's samplers.

    Example:
      >>> parse_sampler("BatchSampling(8, strata=4)").sampler
      BatchSampling(num_samples=8, strata=4)
    """
    try:
        sampler = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"Expected a sampler, got {text!r}. {error}") from error
    if not isinstance(sampler, sbn.Sampler):
        raise ValueError(f"Expected one of {', '.join(_SAMPLERS)}(...), got {text!r}.")
    return Method(text, sampler=sampler)


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _evaluate(left) / _evaluate(right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name in _SAMPLERS:
                return _SAMPLERS[name](
                    *map(_evaluate, args),
                    **{str(k.arg): _evaluate(k.value) for k in keywords},
                )
    raise ValueError(
        f"Expected numbers and {', '.join(_SAMPLERS)}, got {ast.unparse(node)!r}."
    )
