"""Compiles training steps for one and many devices, and adds up what they send.

Weak scaling: each device has the same number of images. For each target, model, number
of devices and normalization it reports the collective operations of the compiled step,
their bytes, and the bytes that each device sends over the network if they run in a
ring; see collectives.py. The figures are repeatable, but they are bytes, not time.
Needs the compilers of the targets, which `make traffic` installs, but no device. Prints
tables, and rewrites a JSON file after each step.
"""

import argparse
import collections
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from compiled import compiling, targets
from compiled.collectives import collectives
from compiled.targets import TARGETS, MissingCompilerError
from harness.command_line import Parser
from harness.measuring import check_positive
from harness.methods import Method
from reports import tables
from speed import step, timing


@dataclasses.dataclass(frozen=True)
class Pooled(Method):
    """A method whose layers pool the statistics of all devices of a mapped axis."""

    @property
    def options(self) -> dict[str, Any]:
        """What its layers are told."""
        return {**super().options, "axis_name": "data"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A normalization, and whether ``jax.shard_map`` gives each device its images."""

    method: Method
    mapped: bool = False


def _variants(*names: str) -> dict[str, Variant]:
    """Returns each method under jit, and its own and pooled statistics if mapped."""
    variants = {}
    for name in names:
        method = step.VARIANTS[name]
        variants[f"{name}, jit"] = Variant(method)
        variants[f"{name}, own"] = Variant(method, mapped=True)
        if method.kind != "none":
            pooled = Pooled(**vars(method))
            variants[f"{name}, pooled"] = Variant(pooled, mapped=True)
    return variants


VARIANTS = _variants("no norm", "Flax BN", "Lattice", "Lattice folded")


@dataclasses.dataclass(kw_only=True)
class Result(compiling.Result):
    """What one training step sends; ``batch_size`` is each device's.

    Attributes:
      devices: number of devices.
      kinds: how many collectives of each kind run.
      types: bytes that a device hands in to them, by type of the elements.
      sent_bytes: what a device sends if they run in a ring.
    """

    devices: int
    kinds: dict[str, int] | None = None
    types: dict[str, int] | None = None
    sent_bytes: int | None = None

    def describe(self) -> str:
        """Says what is compiled, and for how many devices."""
        return f"{self.devices} x {super().describe()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    targets.look_for_no_devices()
    args = parse(argv)
    try:
        meshes = {
            (name, count): Mesh(np.asarray(TARGETS[name].devices(name, count)), "data")
            for name, count in itertools.product(args.target, args.devices)
        }
    except (MissingCompilerError, ValueError) as error:
        timing.say(str(error))
        return 1
    timing.say(f"Numbers go to {args.json}")
    report = compiling.new_report(
        "scaling",
        "bytes over the network of one SGD-momentum training step, as compiled",
        args.dtype,
    )

    def compile_step(result: Result) -> None:
        measure(result, meshes[result.target, result.devices], args.dtype)

    for target, model in itertools.product(args.target, args.model):
        cases = [
            Result(
                target=target,
                model=model,
                batch_size=args.batch_size,
                variant=variant,
                devices=devices,
            )
            for devices, variant in itertools.product(args.devices, args.variant)
        ]
        filled = compiling.fill_in(cases, compile_step, report, args.json)
        print(f"\n{tables.scaling_table(filled)}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        __doc__,
        epilog="""variants: a normalization, and how the step is divided among devices:
  jit     one program of sharded arrays, statistics of the whole batch
  own     jax.shard_map, statistics of each device's own images
  pooled  jax.shard_map, statistics of all devices (axis_name)

examples:
  scaling.py --target v5e --devices 8 --model resnet18
  scaling.py --variant "no norm, jit" "Flax BN, jit" "FS 1/64 folded, own"
""",
    )
    compiling.add_arguments(
        parser, targets=("h200",), variants=VARIANTS, default=VARIANTS
    )
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        metavar="N",
        help="numbers of devices (default: 1 8 64)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images on each device (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_positive(parser, args, "batch_size")
    if min(args.devices) < 1:
        parser.error(f"--devices must be at least 1, got {min(args.devices)}")
    args.json = timing.new_path(parser, args.json, "scaling")
    return args


def measure(result: Result, mesh: Mesh, dtype: str) -> None:
    """Compiles a step for the devices of a mesh, and fills in the result."""
    variant = VARIANTS[result.variant]
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def make() -> step.Step:
        function, (state, images, labels, key) = step.training_step(
            result.model,
            variant.method,
            result.devices * result.batch_size,
            dtype,
            mesh if variant.mapped else None,
        )
        state, key = _laid_out((state, key), everywhere)
        images, labels = _laid_out((images, labels), rows)
        return step.Step(function, (state, images, labels, key))

    compiled = result.compile(make)
    if compiled is None:
        return
    found = collectives(compiled.as_text())
    kinds: collections.Counter[str] = collections.Counter()
    types: collections.Counter[str] = collections.Counter()
    for each in found:
        kinds[each.kind] += each.times
        for array in each.arrays:
            types[array.dtype] += each.times * array.nbytes()
    result.kinds, result.types = dict(kinds), dict(types)
    result.sent_bytes = round(sum(each.sent for each in found))


def _laid_out(args: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: x.update(sharding=sharding), args)


if __name__ == "__main__":
    sys.exit(main())
