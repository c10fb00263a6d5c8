"""Compares hundreds of layers drawn at random with the NumPy reference.

Forms, shapes, samplers, dtypes, masks and meshes of eight devices (of the CPU) are
those of ``tests/fuzzing.py``, of which the tests draw a few. A failure does not end the
run; it is recorded, with what is needed to repeat it. Prints a table and writes JSON.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before JAX starts; the tests have settings of their own
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it mostly compiles

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.command_line import Parser  # first: it says which package is missing

# isort: split
from hypothesis import HealthCheck, Phase, given, seed, settings

from harness.measuring import add_counts, describe_device
from reports import reliability_tables
from speed import timing
from tests import fuzzing

_KEEP = 100  # compiled programs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases and returns the exit status: 1 if any failed."""
    parser = Parser(__doc__)
    add_counts(
        parser,
        layers=(500, "number of layers, each of which is compiled"),
        data=(6, "inputs of each layer"),
        seed=(0, "seed of the layers and inputs"),
    )
    parser.add_argument(
        "--minutes", type=float, metavar="X", help="start no layer after X minutes"
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    path = timing.new_path(parser, args.json, "fuzz-{device}")
    deadline = timing.Deadline(args.minutes)
    report: dict[str, Any] = {
        "benchmark": "fuzz",
        "what": "random layers against the NumPy reference",
        **describe_device(),
        "devices": len(jax.devices()),
        "seed": args.seed,
        "results": [],
        "failures": [],
    }
    counts: Counter[tuple[str, ...]] = Counter()
    worst: dict[tuple[str, ...], float] = {}
    seen: set[fuzzing.Layer] = set()

    def write() -> None:
        fields = ("form", "dtype", "mesh", "sampler", "outcome")
        report["layers"] = len(seen)
        report["results"] = [
            {
                **dict(zip(fields, case, strict=True)),
                "cases": count,
                "worst": worst.get(case[:-1]) if case[-1] == "compared" else None,
            }
            for case, count in sorted(counts.items())
        ]
        timing.write(path, report)

    @seed(args.seed)
    @settings(
        max_examples=args.layers,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzing.layers(), fuzzing.SEEDS)
    def run(layer: fuzzing.Layer, first: int) -> None:
        if deadline.left() <= 0 or layer in seen:
            return
        kind = (layer.form, layer.dtype, layer.mesh, type(layer.sampler).__name__)
        for i in range(args.data):
            data = fuzzing.data(first + i)
            try:
                share = fuzzing.check(layer, data)
            except Exception as error:  # whatever it is, it is to be written down
                outcome, message = "failed", str(error)[:2000]
                failure = {"layer": repr(layer), "data": repr(data), "error": message}
                report["failures"].append(failure)
            else:
                outcome = "refused" if share is None else "compared"
                worst[kind] = max(worst.get(kind, 0.0), share or 0.0)
            counts[(*kind, outcome)] += 1
            if outcome == "refused":  # whatever the data
                break
        seen.add(layer)
        if len(seen) % _KEEP == 0:
            fuzzing.forget_programs()
        if len(seen) % 20 == 0:
            write()
            timing.say(
                f"{len(seen)} layers, {counts.total()} cases, "
                f"{len(report['failures'])} failures"
            )

    run()
    write()
    print(reliability_tables.fuzz_table(report))
    print(f"Numbers: {path}")
    return int(bool(report["failures"]))


if __name__ == "__main__":
    sys.exit(main())
