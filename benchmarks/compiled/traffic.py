"""Compiles training steps for devices that you need not have; adds up what they move.

For each target, model and normalization it reports the bytes that the kernels of the
compiled step read from and write to the device's memory (HBM), in all and outside
convolutions, the temporary memory, the number of kernels and the compile time, each
also relative to Flax's BatchNorm and to no normalization. The figures are repeatable,
but they are traffic, not time. The time from `roofline` is that of a model, not
measured. Needs the compilers of the targets, which `make traffic` installs, but no
device. Prints tables, and rewrites a JSON file after each step.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from compiled import compiling, roofline, targets
from compiled.explain import explain
from compiled.kernels import Kernel, kernels
from compiled.targets import TARGETS, MissingCompilerError
from harness.command_line import Parser
from harness.measuring import check_positive
from reports import tables
from speed import timing
from speed.step import VARIANTS, Step, training_step

_DEFAULT = ("Flax BN", "Lattice folded", "FS 1/64 folded", "BS 8 folded", "no norm")


@dataclasses.dataclass(kw_only=True)
class Result(compiling.Result):
    """The traffic of one training step.

    Attributes:
      traffic_bytes: moved to and from HBM by all kernels, see `kernels`.
      outside_bytes: the part of it outside convolutions.
      temp_bytes: temporary memory: all but arguments and results.
      kernels: launches of kernels, copies among them.
      bytes_accessed: XLA's own count, memory on the chip included; TPUs only.
      estimated_cycles: XLA's estimate of the time, in cycles of the clock; TPUs only,
        without the kernels that it has no estimate for.
      roofline_seconds: the time by a model, see `roofline`; not measured.
    """

    traffic_bytes: int | None = None
    outside_bytes: int | None = None
    temp_bytes: int | None = None
    kernels: int | None = None
    bytes_accessed: int | None = None
    estimated_cycles: int | None = None
    roofline_seconds: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    targets.look_for_no_devices()
    args = parse(argv)
    try:
        devices = {name: TARGETS[name].devices(name)[0] for name in args.target}
    except MissingCompilerError as error:
        timing.say(str(error))
        return 1
    timing.say(f"Numbers go to {args.json}")
    report = compiling.new_report(
        "traffic",
        "HBM traffic of one SGD-momentum training step, as compiled",
        args.dtype,
    )
    found: dict[str, list[Kernel]] = {}

    def compile_step(result: Result) -> None:
        found[result.describe()] = measure(result, devices[result.target], args.dtype)

    for target, model in itertools.product(args.target, args.model):
        batch_size = args.batch_size or TARGETS[target].batch_size
        cases = [
            Result(target=target, model=model, batch_size=batch_size, variant=variant)
            for variant in args.variant
        ]
        filled = compiling.fill_in(cases, compile_step, report, args.json)
        print(f"\n{tables.traffic_table(filled, ('Flax BN', 'no norm'))}")
        if args.explain:
            for name in map(Result.describe, cases):
                print(f"\n{name}\n\n{explain(found[name], args.explain)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        __doc__,
        epilog="""examples:
  traffic.py --target v5e --model resnet18 --explain 10
  traffic.py --variant "Flax BN" "FS 1/64 folded" "no norm"
""",
    )
    compiling.add_arguments(
        parser, targets=("h200", "v5e"), variants=VARIANTS, default=_DEFAULT
    )
    sizes = ", ".join(f"{name} {TARGETS[name].batch_size}" for name in TARGETS)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help=f"images (default: {sizes})"
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
    args = parser.parse_args(argv)
    check_positive(parser, args, "batch_size", "explain")
    args.json = timing.new_path(parser, args.json, "traffic")
    return args


def measure(result: Result, device: Any, dtype: str) -> list[Kernel]:
    """Compiles a step for a device, fills in the result, and returns the kernels."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def step() -> Step:
        method = VARIANTS[result.variant]
        function, args = training_step(result.model, method, result.batch_size, dtype)
        return Step(function, jax.tree.map(lambda x: x.update(sharding=sharding), args))

    compiled = result.compile(step)
    if compiled is None:
        return []
    found = kernels(compiled.as_text())
    result.traffic_bytes = sum(kernel.traffic for kernel in found)
    result.outside_bytes = sum(k.traffic for k in found if k.kind != "convolution")
    result.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    result.kernels = sum(kernel.times for kernel in found)
    if cost := compiled.cost_analysis():  # GPUs give none
        result.bytes_accessed = int(cost["bytes accessed"])
    estimates = [k.times * k.cycles for k in found if k.cycles is not None]
    result.estimated_cycles = sum(estimates) if estimates else None
    result.roofline_seconds = roofline.seconds(found, TARGETS[result.target], dtype)
    return found


if __name__ == "__main__":
    sys.exit(main())
