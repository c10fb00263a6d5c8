"""Compiles training steps for devices that are not there, and adds up what they move.

For each target, model and normalization: the bytes that the kernels of the compiled
step read from and write to the device's memory (HBM), in all and outside convolutions,
the temporary memory, the kernels and the compile time, each also relative to flax's
BatchNorm and to no normalization. The figures are repeatable, but they are traffic, not
time. Needs the compilers of the targets, which `make traffic` installs, but no device.
Prints tables and writes JSON, anew after each step.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import tables
import targets
import timing
from explain import explain
from kernels import Kernel, kernels
from measuring import check_positive, describe_device
from models import IMAGE_SHAPES
from step import VARIANTS, training_step
from targets import TARGETS, MissingCompilerError

_DEFAULT = ("flax BN", "BS 8 folded", "FS 1/64 folded", "no norm")
_COMPILERS = ("jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu")


@dataclasses.dataclass
class Result:
    """One training step, compiled for one target.

    Attributes:
      traffic_bytes: moved to and from HBM by all kernels, see `kernels`.
      outside_bytes: the part of it outside convolutions.
      temp_bytes: temporary memory: all but arguments and results.
      kernels: launches of kernels, copies among them.
      bytes_accessed: XLA's own count, memory on the chip included; TPUs only.
      compile_seconds: CPU time to trace and compile, of all threads.
      error: why there are no figures.
    """

    target: str
    model: str
    batch_size: int
    variant: str
    traffic_bytes: int | None = None
    outside_bytes: int | None = None
    temp_bytes: int | None = None
    kernels: int | None = None
    bytes_accessed: int | None = None
    compile_seconds: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    targets.look_for_no_devices()
    args = parse(argv)
    try:
        devices = {name: TARGETS[name].device(name) for name in args.target}
    except MissingCompilerError as error:
        timing.say(str(error))
        return 1
    timing.say(f"Numbers go to {args.json}")
    results: list[Result] = []
    report: dict[str, Any] = {
        "benchmark": "traffic",
        "what": "HBM traffic of one SGD-momentum training step, as compiled",
        **describe(),
        "dtype": args.dtype,
    }
    for target, model in itertools.product(args.target, args.model):
        batch_size = args.batch_size or TARGETS[target].batch_size
        largest = {}
        with progress_bar() as bar:
            task = bar.add_task("", total=len(args.variant))
            for variant in args.variant:
                bar.update(task, description=f"{target}, {model}: {variant}")
                result = Result(target, model, batch_size, variant)
                largest[variant] = measure(result, devices[target], args.dtype)
                results.append(result)
                report["results"] = [dataclasses.asdict(each) for each in results]
                timing.write(args.json, report)
                bar.advance(task)
        case = {"results": report["results"][-len(args.variant) :]}
        print(f"\n{tables.traffic_table(case, ('flax BN', 'no norm'))}")
        if args.explain:
            for variant, found in largest.items():
                print(f"\n{target}, {model}, {variant}\n")
                print(explain(found, args.explain))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="""examples:
  traffic.py --target v5e --model resnet18 --explain 10
  traffic.py --variant "flax BN" "FS 1/64 folded" "no norm"
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_names(option: str, choices: Iterable[str], default: Iterable[str]) -> None:
        parser.add_argument(
            option,
            nargs="+",
            choices=tuple(choices),
            default=list(default),
            metavar="NAME",
            help=f"any of {', '.join(choices)} (default: {', '.join(default)})",
        )

    add_names("--target", TARGETS, ("h200", "v5e"))
    add_names("--model", IMAGE_SHAPES, ("resnet50",))
    add_names("--variant", VARIANTS, _DEFAULT)
    sizes = ", ".join(f"{name} {TARGETS[name].batch_size}" for name in TARGETS)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help=f"images (default: {sizes})"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the computation (default: %(default)s)",
    )
    parser.add_argument(
        "--explain",
        type=int,
        nargs="?",
        const=20,
        metavar="N",
        help="also list the N largest kernels, and the N most frequent kinds "
        "(without N: %(const)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="new file for the numbers (default: one in benchmarks/results)",
    )
    args = parser.parse_args(argv)
    check_positive(parser, args, "batch_size", "explain")
    args.json = timing.new_path(parser, args.json, "traffic")
    return args


def measure(result: Result, device: Any, dtype: str) -> list[Kernel]:
    """Compiles a step for a device, fills in the result, and returns the kernels."""
    method = VARIANTS[result.variant]
    sharding = jax.sharding.SingleDeviceSharding(device)
    begin = _cpu_seconds()
    step = training_step(result.model, method, result.batch_size, dtype)
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.args,
    )
    try:
        compiled = step.function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:  # too large for the device's memory
        result.error = str(error).partition("\n")[0]
        return []
    result.compile_seconds = _cpu_seconds() - begin
    found = kernels(compiled.as_text())
    result.traffic_bytes = sum(kernel.traffic for kernel in found)
    result.outside_bytes = sum(k.traffic for k in found if k.kind != "convolution")
    result.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    result.kernels = sum(kernel.times for kernel in found)
    if cost := compiled.cost_analysis():  # GPUs give none
        result.bytes_accessed = int(cost["bytes accessed"])
    return found


def _cpu_seconds() -> float:
    """CPU time of this process and of compilers that it has started."""
    return sum(os.times()[:4])


def describe() -> dict[str, Any]:
    """Returns versions, the machine that compiles, and the date."""
    description = describe_device()
    for key in ("device", "platform", "runtime"):
        del description[key]
    description["versions"] |= {
        package.name: package.version
        for package in metadata.distributions()
        if package.name in _COMPILERS
    }
    return description


def progress_bar() -> Progress:
    """Returns the bar of one target and model, apart from the results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


if __name__ == "__main__":
    sys.exit(main())
