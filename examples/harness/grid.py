"""A grid of training runs: every combination of the values that its options may take.

A grid is a table of option names, each with one value or a list of them, written on a
command line or in a TOML file. Where not all combinations are wanted, ``[[grids]]``
follow in the file, each with what it adds to the options before them. What one training
is made of is an :class:`Experiment`, which also names it: results are found by it.
"""

import dataclasses
import itertools
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import methods
from harness.command_line import RENAMED, unknown
from harness.journal import Record
from harness.methods import Method
from harness.networks import Settings
from harness.options import NAMES


class GridError(ValueError):
    """A grid names something that does not exist, or gives it a wrong value."""


@dataclasses.dataclass(frozen=True)
class Experiment(Settings):
    """All that decides how one training goes.

    Attributes:
      dataset: one of ``tasks.DATASETS``.
      train_size: number of training images; None for all.
      image_size: side of the images, averaged from larger ones; None for their own.
      norm: a method as in :mod:`methods`.
      fold: whether a sampled norm is folded.
      seed: of initialization, order, augmentation and sampling.
    """

    dataset: str = "digits"
    train_size: int | None = None
    image_size: int | None = None
    norm: str = "bn"
    fold: bool = True
    seed: int = 0

    def method(self) -> Method:
        """Returns the normalization."""
        method = methods.parse(self.norm)
        return method.fold() if self.fold else method


OPTIONS = {field.name: field for field in dataclasses.fields(Experiment)}


def read(path: Path) -> dict[str, Any]:
    """Reads a grid from a TOML file.

    Raises:
      GridError: if there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise GridError(f"Expected a grid in TOML in {path}: {error}.") from error


def experiments(grid: Mapping[str, Any], **given: Any) -> list[Experiment]:
    """Returns every combination, seeds changing fastest, each of them once.

    Args:
      grid: a value or a list of them by option; under ``'grids'``, a list of tables
        that are taken one by one with what stands beside them.
      **given: options that replace those of the grid.

    Raises:
      GridError: if an option does not exist, or a value does not fit it.

    Example:
      >>> found = experiments({"seed": [0, 1], "norm": ["bn", "gn"]})
      >>> [(experiment.norm, experiment.seed) for experiment in found]
      [('bn', 0), ('bn', 1), ('gn', 0), ('gn', 1)]
    """
    shared = {name: values for name, values in grid.items() if name != "grids"}
    grids = grid.get("grids", [{}])
    if not isinstance(grids, list) or not all(isinstance(one, dict) for one in grids):
        raise GridError(f"Expected [[grids]], a list of tables, got {grids!r}.")
    found = [one for more in grids for one in _product({**shared, **more, **given})]
    return list(dict.fromkeys(found))


def _product(grid: Mapping[str, Any]) -> Iterator[Experiment]:
    grid = {_renamed(name): values for name, values in grid.items()}
    for name in grid:
        if name not in OPTIONS:
            raise GridError(unknown("an option", name, OPTIONS))
    names = sorted(grid, key=list(OPTIONS).index)
    values = [list(_checked(name, grid[name])) for name in names]
    for chosen in itertools.product(*values):
        yield Experiment(**dict(zip(names, chosen, strict=True)))


def experiment_of(record: Record) -> Experiment:
    """Returns the experiment of a result; newer options have their defaults."""
    given = record["experiment"].items()
    return Experiment(**{RENAMED.get(name, name): value for name, value in given})


def setting_of(experiment: Experiment) -> Experiment:
    """Returns what the training runs with all seeds have in common."""
    return dataclasses.replace(experiment, seed=0)


def varied(experiments: Sequence[Experiment]) -> list[str]:
    """Returns the options in which experiments differ, the norm at least."""
    names = [
        name
        for name in OPTIONS
        if len({getattr(experiment, name) for experiment in experiments}) > 1
    ]
    return names or ["norm"]


def _renamed(name: str) -> str:
    """Returns today's name of an option."""
    if name in RENAMED:
        print(f"{name} is now {RENAMED[name]}", file=sys.stderr)
    return RENAMED.get(name, name)


def _checked(name: str, values: Any) -> Iterator[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        values = [values]
    if not values:
        raise GridError(f"Expected at least one value of {name}, got none.")
    for value in values:
        kind = OPTIONS[name].type
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
            raise GridError(f"Expected {name} of type {wanted}, got {value!r}.")
        if name in NAMES and value not in NAMES[name]:
            raise GridError(unknown(f"a {name}", value, NAMES[name]))
        if name == "norm":
            try:
                methods.parse(value)
            except ValueError as error:
                raise GridError(str(error)) from error
        if type(value) is int and value < (0 if name == "seed" else 1):
            raise GridError(f"Expected {name} to be positive, got {value}.")
        yield value
