"""What the benchmarks that only compile share: options, results, progress, versions."""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from compiled.targets import TARGETS
from harness.command_line import add_names
from harness.measuring import describe_device
from models import IMAGE_SHAPES
from speed import timing
from speed.step import Step

R = TypeVar("R", bound="Result")

_COMPILERS = ("jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu")


@dataclasses.dataclass(kw_only=True)
class Result:
    """One training step, compiled for one target.

    Attributes:
      compile_seconds: CPU time to trace and compile, of all threads.
      error: why there are no figures.
    """

    target: str
    model: str
    batch_size: int
    variant: str
    compile_seconds: float | None = None
    error: str | None = None

    def describe(self) -> str:
        """Says what is compiled."""
        return f"{self.target}, {self.model}: {self.variant}"

    def compile(self, step: Callable[[], Step]) -> Any:
        """Makes and compiles a step; returns None and notes why if it cannot be."""
        begin = _cpu_seconds()
        function, args = step()
        try:
            compiled = function.lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:  # too large for the device's memory
            self.error = str(error).partition("\n")[0]
            return None
        self.compile_seconds = _cpu_seconds() - begin
        return compiled


def _cpu_seconds() -> float:
    """CPU time of this process and of compilers that it has started."""
    return time.process_time() + sum(os.times()[2:4])


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    targets: Iterable[str],
    variants: Iterable[str],
    default: Iterable[str],
) -> None:
    """Adds the options that all of them have.

    Args:
      parser: to add to.
      targets: compiled for if none are named.
      variants: normalizations to choose from.
      default: those compiled if none are named.
    """
    add_names(parser, "--target", TARGETS, targets)
    add_names(parser, "--model", IMAGE_SHAPES, ("resnet50",))
    add_names(parser, "--variant", variants, default)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of the computation (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="new file for the numbers (default: one in benchmarks/results)",
    )


def new_report(benchmark: str, what: str, dtype: str) -> dict[str, Any]:
    """Returns a report without results: what they are of, versions, and the date."""
    description = describe_device()
    for key in ("device", "platform", "runtime"):
        del description[key]
    description["versions"] |= {
        package.name: package.version
        for package in metadata.distributions()
        if package.name in _COMPILERS
    }
    return {
        "benchmark": benchmark,
        "what": what,
        **description,
        "dtype": dtype,
        "results": [],
    }


def fill_in(
    results: Sequence[R], measure: Callable[[R], None], report: dict[str, Any], to: Path
) -> dict[str, Any]:
    """Compiles one step after the other, with a bar of how many are left.

    Args:
      results: what to compile.
      measure: fills in a result.
      report: they are added to, and which is written to a file after each.
      to: the file.

    Returns:
      A report of these results alone, for a table.
    """
    begin = len(report["results"])
    with _progress_bar() as bar:
        task = bar.add_task("", total=len(results))
        for result in results:
            bar.update(task, description=result.describe())
            measure(result)
            report["results"].append(dataclasses.asdict(result))
            timing.write(to, report)
            bar.advance(task)
    return {"results": report["results"][begin:]}


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
