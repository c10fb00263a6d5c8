"""The normalizations that can be compared, and how to write them on a command line.

A method is the name of one, such as ``bn``, ``gn``, ``brn`` or ``none``, or a sampler
in short form: ``lattice``, ``bs:4``, ``fs:1/64``, ``vdn:2``, ``ns:1``, or two of them
mixed, ``lattice+vdn:4``. Amounts are images, for FS the share of each feature map, and
for the lattice positions of it; without them the default or the paper's are used. Any
other sampler is written as in Python: ``FeatureSampling(1/16, groups=1)``. After each
of them ``~3/4`` is the weight of the running statistics: ``lattice~3/4``. A method that
can measure a sample is told so with ``@``: ``brn@lattice``. ``ghost:4`` is batch norm
of four groups of images, ``ba:2`` of a batch in which each image is there twice,
augmented differently.
"""

import ast
import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax

import flax_sbn as sbn
from harness.command_line import unknown

# What each name is, and what it makes of the layers; see models.units.
_KINDS = {
    "bn": "batch",
    "flax": "flax",
    "gn": "group",
    "none": "none",
    "brn": "renorm",
    "ghost": "batch",
    "dbn": "diminishing",
    "l1": "l1",
    "range": "range",
    "bnet": "bnet",
    "ic": "ic",
    "kn": "kalman",
    "mixture": "mixture",
    "mabn": "moving_average",
    "frn": "filter_response",
    "batchless": "batchless",
    "nf": "norm_free",
    "bnp": "none",
    "shade": "batch",
    "ba": "batch",
}
# Kinds that can measure a sample, and those of them that fold into a convolution.
_SAMPLED = {"batch", "renorm", "diminishing", "l1", "range", "bnet", "ic", "kalman"}
_FOLDED = {"batch", "renorm", "diminishing", "l1", "range"}
_COUNTED = {"ghost": 4, "ba": 2}  # names that a number may follow
NAMES = (*_KINDS, "lattice", "ns", "bs", "fs", "vdn", "lattice+vdn", "fs+vdn", "bs+vdn")
DEFAULT = ("bn", "lattice", "ns:1", "bs:4", "fs:1/64", "vdn:2", "lattice+vdn:4")

_AMOUNTS = {"lattice": "8", "ns": "1", "bs": "4", "fs": "1/64", "vdn": "2"}
_SAMPLERS = {
    cls.__name__: cls
    for cls in (
        sbn.NaiveSampling,
        sbn.BatchSampling,
        sbn.CopySampling,
        sbn.FeatureSampling,
        sbn.LatticeSampling,
        sbn.VirtualSampling,
        sbn.MixedSampling,
    )
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A normalization to train with.

    Attributes:
      name: as the user wrote it; the label in tables and plots.
      kind: what the layers are: ``'batch'``, ``'flax'`` (flax's own batch norm),
        ``'group'``, ``'none'``, which has convolutions with a bias, or another of
        :mod:`models.units`.
      sampler: what the norm measures; None measures all of the batch.
      running_weight: how far the statistics of kind ``'batch'`` are moved towards the
        running ones.
      folded: whether the norm is folded into the layer before, if there is one.
      ghost_groups: groups of examples that are normalized separately in training.
      copies: how often each image is in the batch: batch augmentation.
      shade: whether SHADE is added to the loss.
      preconditioned: whether the gradients are preconditioned by the layers' inputs.
    """

    name: str
    kind: str = "batch"
    sampler: sbn.Sampler | None = None
    running_weight: float = 0.0
    folded: bool = False
    ghost_groups: int = 1
    copies: int = 1
    shade: bool = False
    preconditioned: bool = False

    def fold(self) -> "Method":
        """Returns the method folded, or as it is where nothing is sampled."""
        folded = self.sampler is not None and self.kind in _FOLDED
        return dataclasses.replace(self, folded=folded)

    @property
    def measures(self) -> bool:
        """Whether the layers have statistics that a sampler could measure."""
        return self.kind in _SAMPLED

    @property
    def starts_from_data(self) -> bool:
        """Whether parameters are initialized from real images."""
        return self.kind == "batchless"

    @property
    def options(self) -> dict[str, Any]:
        """What our batch normalization is told, besides what flax's is."""
        if not self.measures:
            return {}
        options: dict[str, Any] = {"sampler": self.sampler}
        if self.running_weight:
            options["running_weight"] = self.running_weight
        if self.ghost_groups > 1:
            options["ghost_groups"] = self.ghost_groups
        return options

    @property
    def virtual(self) -> sbn.VirtualSampling | None:
        """Which virtual examples the sampler expects in the batch, if any."""
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
    """Reads a method in any of its forms.

    Raises:
      ValueError: if it is none.

    Example:
      >>> method = parse("bs:4~3/4")
      >>> method.kind, method.sampler, method.running_weight
      ('batch', BatchSampling(num_samples=4, strata=1), 0.75)
      >>> parse("brn@lattice").sampler
      LatticeSampling(num_positions=8, min_values=128)
    """
    name, tilde, weight = text.partition("~")
    name, at, sampler = name.partition("@")
    method = parse_sampler(name) if "(" in name else parse_method(name)
    if at:
        if not method.measures or method.sampler is not None:
            raise ValueError(
                f"Expected a method that can measure a sample before @, got {text!r}."
            )
        sampled = parse_sampler(sampler) if "(" in sampler else parse_method(sampler)
        if sampled.sampler is None:
            raise ValueError(f"Expected a sampler behind @, got {text!r}.")
        method = dataclasses.replace(method, sampler=sampled.sampler)
    if tilde:
        running_weight = _weight(weight)
        if method.kind != "batch" or running_weight is None:
            raise ValueError(
                "Expected a weight in [0, 1] behind bn or a sampler such as bs:4~3/4, "
                f"got {text!r}."
            )
        method = dataclasses.replace(method, running_weight=running_weight)
    return dataclasses.replace(method, name=text)


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
    name, _, amount = text.partition(":")
    if name in _KINDS and (not amount or name in _COUNTED):
        return Method(text, _KINDS[name], **_own(name, amount))
    parts = text.split("+")
    what, names = ("a sampler", _AMOUNTS) if parts[1:] else ("a method", NAMES)
    for part in parts:
        if part.partition(":")[0] not in _AMOUNTS:
            raise ValueError(unknown(what, part, names))
    match [_parse_short(part) for part in parts]:
        case [sampler]:
            return Method(text, sampler=sampler)
        case [real, sbn.VirtualSampling() as virtual]:
            return Method(text, sampler=sbn.MixedSampling(real, virtual))
    raise ValueError(f"Expected at most a sampler+vdn, got {text!r}.")


def _own(name: str, amount: str) -> dict[str, Any]:
    """Returns what a name says besides the kind of its layers."""
    count = _COUNTED.get(name, 1)
    if amount:
        if not amount.isdecimal() or int(amount) < 1:
            raise ValueError(
                f"Expected {name}:N such as {name}:{count}, got {name}:{amount}."
            )
        count = int(amount)
    match name:
        case "ghost":
            return {"ghost_groups": count}
        case "ba":
            return {"copies": count}
        case "shade":
            return {"shade": True}
        case "bnp":
            return {"preconditioned": True}
    return {}


def _parse_short(text: str) -> sbn.Sampler:
    name, _, amount = text.partition(":")
    amount = amount or _AMOUNTS[name]
    try:
        if name == "fs":
            return sbn.FeatureSampling(float(Fraction(amount)))
        count = int(amount)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"Expected {name}:AMOUNT such as {name}:{_AMOUNTS[name]}, got {text!r}. "
            f"{error}"
        ) from error
    cls = {
        "lattice": sbn.LatticeSampling,
        "ns": sbn.NaiveSampling,
        "bs": sbn.BatchSampling,
        "vdn": sbn.VirtualSampling,
    }
    return cls[name](count)


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
            raise ValueError(unknown("a sampler", name, _SAMPLERS))
    raise ValueError(
        f"Expected numbers and {', '.join(_SAMPLERS)}, got {ast.unparse(node)!r}."
    )
