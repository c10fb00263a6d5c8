"""Times one layer, forward and gradient: ours with each sampler against flax's.

Shapes are those of ResNet-50's batch norms and of a multilayer perceptron. All variants
of a shape are compiled first and then run in turns, so that whatever else the machine
does hits all alike; a ratio is the median of the rounds' ratios. Prints a table and
writes JSON.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
from flax import linen as nn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import flax_sbn as sbn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.cases import LAYER_SHAPES

# The paper's amounts. None is ours without a sampler: flax's arithmetic to the bit.
SAMPLERS: dict[str, sbn.Sampler | None] = {
    "all": None,
    "NS 4": sbn.NaiveSampling(4),
    "BS 4": sbn.BatchSampling(4),
    "FS 1/64, one patch": sbn.FeatureSampling(1 / 64, groups=1),
    "FS 1/64": sbn.FeatureSampling(1 / 64),
    "VDN 4": sbn.VirtualSampling(4),
    "FS 1/64 + VDN 4": sbn.MixedSampling(
        sbn.FeatureSampling(1 / 64), sbn.VirtualSampling(4)
    ),
    "BS 4 + VDN 4": sbn.MixedSampling(sbn.BatchSampling(4), sbn.VirtualSampling(4)),
}
_MIN_SECONDS = 0.01  # of one measurement: short steps are repeated


@dataclasses.dataclass
class Result:
    """One layer, normalized in one way."""

    shape: str
    batch_size: int
    variant: str
    milliseconds: float
    ratio: float  # of time to flax's
    compile_ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs="+", choices=tuple(LAYER_SHAPES), default=tuple(LAYER_SHAPES)
    )
    parser.add_argument("--batch-size", type=int, default=32 if on_cpu else 256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--json",
        type=Path,
        help="file to write (default: a new one in benchmarks/results)",
    )
    args = parser.parse_args(argv)
    path = args.json or default_path(args.dtype)
    if path.exists():
        parser.error(f"--json: {path} exists; give a new name")

    results = [
        result
        for name in track(args.shape, "layers", transient=True)
        for result in measure(name, args.batch_size, args.dtype, args.rounds)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "layer",
        "what": "forward and gradient of one batch norm layer, time against flax's",
        **describe(args),
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.print(table(results, report))
    console.print(f"Numbers: {path}")
    return 0


def measure(name: str, batch_size: int, dtype: str, rounds: int) -> Iterator[Result]:
    """Yields the results of one shape."""
    row = LAYER_SHAPES[name]
    flax_layer = nn.BatchNorm(use_running_average=False, dtype=dtype)
    variants = {"flax": (flax_layer, batch_size)}
    for label, sampler in SAMPLERS.items():
        if len(row) == 1 and "FS" in label:
            continue
        ours = sbn.linen.BatchNorm(
            use_running_average=False, dtype=dtype, sampler=sampler
        )
        # Virtual rows come on top of the batch, and so cost what they cost.
        variants[label] = (ours, batch_size + (4 if "VDN" in label else 0))

    steps, compiling = {}, {}
    for label, (layer, rows) in variants.items():
        begin = time.perf_counter()
        steps[label] = compiled_step(layer, (rows, *row), dtype)
        compiling[label] = time.perf_counter() - begin
    seconds = interleaved(steps, rounds)
    for label, times in seconds.items():
        yield Result(
            shape=name,
            batch_size=batch_size,
            variant=label,
            milliseconds=1e3 * statistics.median(times),
            ratio=statistics.median(
                mine / flax for mine, flax in zip(times, seconds["flax"], strict=True)
            ),
            compile_ratio=compiling[label] / compiling["flax"],
        )


def compiled_step(
    layer: nn.BatchNorm, shape: tuple[int, ...], dtype: str
) -> Callable[[], Any]:
    """Compiles output, updated statistics and gradients; returns the ready call."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], shape, dtype)
    g = jax.random.normal(keys[1], shape, dtype)
    variables = layer.init(keys[2], x[:1])

    def step(
        params: Any, stats: Any, x: jax.Array, g: jax.Array, key: jax.Array
    ) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            return layer.apply(
                {"params": params, "batch_stats": stats},
                x,
                mutable=["batch_stats"],
                rngs={"sampling": key},
            )

        y, backward, updates = jax.vjp(forward, params, x, has_aux=True)
        return y, updates, backward(g)

    args = (variables["params"], variables["batch_stats"], x, g, keys[3])
    compiled = jax.jit(step).lower(*args).compile()
    return lambda: compiled(*args)


def interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Runs the steps in turns and returns the seconds of each round."""
    repeats = {}
    for name, step in steps.items():
        jax.block_until_ready(step())
        begin = time.perf_counter()
        jax.block_until_ready(step())
        repeats[name] = 1 + int(_MIN_SECONDS / (time.perf_counter() - begin))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                result = steps[name]()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
    return seconds


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a reader has to know about the figures."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "versions": {
            "flax_sbn": sbn.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
    }


def default_path(dtype: str) -> Path:
    """Returns a name under benchmarks/results that is new to the second."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    folder = Path(__file__).parent / "results"
    return folder / f"layer-{kind}-{dtype}-{stamp}.json"


def table(results: list[Result], report: dict[str, Any]) -> Table:
    """Returns the ratios as a table: a row a variant, a column a shape."""
    shapes = list(dict.fromkeys(result.shape for result in results))
    batch_size = results[0].batch_size
    title = (
        f"time relative to flax's BatchNorm (batch {batch_size}, {report['dtype']}, "
        f"{report['device']}, jax {report['versions']['jax']})"
    )
    grid = Table(title=title, title_justify="left")
    grid.add_column("measured")
    for shape in shapes:
        extent = " x ".join(map(str, LAYER_SHAPES[shape]))
        grid.add_column(f"{shape}\n{extent}", justify="right")
    for variant in dict.fromkeys(result.variant for result in results):
        cells = {r.shape: r for r in results if r.variant == variant}
        grid.add_row(
            variant,
            *(
                "-"
                if shape not in cells
                else f"{cells[shape].milliseconds:.2f} ms"
                if variant == "flax"
                else f"{cells[shape].ratio:.2f}"
                for shape in shapes
            ),
        )
    return grid


if __name__ == "__main__":
    sys.exit(main())
