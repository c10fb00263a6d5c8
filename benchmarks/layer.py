"""Times one layer, forward and gradient: ours with each sampler against flax's.

Shapes are those of ResNet-50's batch norms and of a multilayer perceptron. All variants
of a shape get the same input (virtual rows are among its rows), are compiled first and
then run in turns, so that whatever else the machine does hits all alike; a ratio is the
median of the rounds' ratios. Prints a table and writes JSON.
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
from rich import box
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
    "FS 1/64 groups=1": sbn.FeatureSampling(1 / 64, groups=1),
    "FS 1/64": sbn.FeatureSampling(1 / 64),
    "VDN 4": sbn.VirtualSampling(4),
    "FS+VDN": sbn.MixedSampling(sbn.FeatureSampling(1 / 64), sbn.VirtualSampling(4)),
    "BS+VDN": sbn.MixedSampling(sbn.BatchSampling(4), sbn.VirtualSampling(4)),
}
_MIN_SECONDS = 0.01  # of one measurement: short steps are repeated
_DENSE_BATCH = 32  # a multilayer perceptron sees so many times the rows


@dataclasses.dataclass
class Result:
    """One layer, normalized in one way."""

    layer: str
    shape: tuple[int, ...]
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
    shape = (batch_size, *row)
    if len(row) == 1:
        shape = (_DENSE_BATCH * batch_size, *row)
    variants: dict[str, nn.BatchNorm] = {
        "flax": nn.BatchNorm(use_running_average=False, dtype=dtype)
    }
    for label, sampler in SAMPLERS.items():
        if len(row) == 1 and "FS" in label:
            continue
        variants[label] = sbn.linen.BatchNorm(
            use_running_average=False, dtype=dtype, sampler=sampler
        )

    steps, compiling = {}, {}
    for label, layer in variants.items():
        begin = time.perf_counter()
        steps[label] = compiled_step(layer, shape, dtype)
        compiling[label] = time.perf_counter() - begin
    seconds = interleaved(steps, rounds)
    for label, times in seconds.items():
        yield Result(
            layer=name,
            shape=shape,
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
    """Returns the ratios as a table: a row a layer, a column a variant."""
    title = (
        f"time relative to flax's BatchNorm, {report['dtype']}, {report['device']}, "
        f"jax {report['versions']['jax']}"
    )
    grid = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    grid.add_column("input", no_wrap=True)
    grid.add_column("flax", justify="right", no_wrap=True)
    for label in SAMPLERS:
        grid.add_column(label.replace(" ", "\n"), justify="right")
    for shape in dict.fromkeys(result.shape for result in results):
        cells = {result.variant: result for result in results if result.shape == shape}
        grid.add_row(
            "x".join(map(str, shape)),
            f"{cells['flax'].milliseconds:.1f} ms",
            *(f"{cells[v].ratio:.2f}" if v in cells else "-" for v in SAMPLERS),
        )
    return grid


if __name__ == "__main__":
    sys.exit(main())
