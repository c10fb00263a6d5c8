"""Times whole training steps: Flax's batch norm, ours, folded or not, and no norm.

Reports images per second and memory of networks in training, on random images. All
variants of a model and batch size are compiled first and then run in turns, so other
load on the machine affects all alike; ratios are medians of the rounds' ratios. Where
PyTorch is installed, it runs the same network in the same rounds (channels last,
autocast, torch.compile). Prints a table, and rewrites a JSON file after each model.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.command_line import Parser, add_names
from harness.measuring import check_positive, describe_device, interleaved, median_ratio
from models import IMAGE_SHAPES
from reports import tables
from speed import timing
from speed.step import VARIANTS, State, training_step

REFERENCE = "Flax BN"
TORCH = "PyTorch BN"
_DEFAULT = (
    REFERENCE,
    "Lattice",
    "Lattice folded",
    "FS 1/64 folded",
    "BS 8 folded",
    "no norm",
)
_MIN_SECONDS = 0.3  # of one measurement: the device is never left waiting for Python
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


@dataclasses.dataclass
class Result:
    """One model, batch size and normalization.

    Attributes:
      ratio: of time to that of flax's batch norm in the same rounds.
      memory_bytes: arguments, results and temporary memory, as compiled.
      peak_bytes: the most memory in use in the first step, where the device tells.
      compile_seconds: to trace and compile, beside others if ``jobs`` is above 1.
      error: why there are no figures.
    """

    model: str
    batch_size: int
    variant: str
    images_per_second: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    error: str | None = None


class JaxStep:
    """A compiled training step with its state; a call starts one step."""

    def __init__(self, model: str, variant: str, batch_size: int, dtype: str) -> None:
        step = training_step(model, VARIANTS[variant], batch_size, dtype)
        self.args = step.args
        self.compiled = step.function.lower(*step.args).compile()
        memory = self.compiled.memory_analysis()
        self.memory_bytes = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def start(self) -> int | None:
        """Runs the first step; returns the most memory in use, if the device tells.

        It tells the most since the process began, so that steps are to be started in
        the order of their memory; None where it did not rise.
        """
        self.state, *self.inputs = initial(self.args)
        own = sum(x.nbytes for x in jax.tree.leaves((self.state, self.inputs)))
        before = jax.devices()[0].memory_stats()
        jax.block_until_ready(self())
        after = jax.devices()[0].memory_stats()
        if not before or after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
            return None
        return after["peak_bytes_in_use"] - before["bytes_in_use"] + own

    def __call__(self) -> jax.Array:
        """Starts one step and returns its loss."""
        self.state, loss = self.compiled(self.state, *self.inputs)
        return loss


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    pytorch = None
    if importlib.util.find_spec("torch") is None:
        timing.say("PyTorch is not installed: it is left out.")
    else:  # JAX takes most of the memory when it first sees the device, if not told
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        pytorch = importlib.import_module("torch_step")
    args = parse(argv)
    cases = list(itertools.product(args.batch_size, args.model))
    timing.say(
        f"{', '.join(args.model)}, batches of {', '.join(map(str, args.batch_size))}, "
        f"{args.dtype}, {jax.devices()[0].device_kind}"
    )
    report: dict[str, Any] = {
        "benchmark": "train_step",
        "what": "one SGD-momentum training step, time against Flax's BatchNorm",
        **describe_device(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "jobs": args.jobs,
        "results": [],
    }
    deadline = timing.Deadline(args.minutes)
    for i, (batch_size, model) in enumerate(cases):
        if not deadline.allows_another():
            rest = ", ".join(f"{model} with {size}" for size, model in cases[i:])
            timing.say(f"Time is up; not measured: {rest}")
            break
        results = measure(model, batch_size, args, deadline, pytorch)
        if pytorch is not None:
            pytorch.release()
        report["results"] += [dataclasses.asdict(result) for result in results]
        timing.write(args.json, report)
    print(tables.TABLES["train_step"](report))
    print(f"Numbers: {args.json}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; defaults fit the device."""
    on_cpu = jax.default_backend() == "cpu"
    parser = Parser(__doc__)
    add_names(
        parser,
        "--model",
        IMAGE_SHAPES,
        ["resnet20"] if on_cpu else ["resnet50", "resnet18", "densenet121"],
    )
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=int,
        default=[32] if on_cpu else [256, 64, 512, 128],
        metavar="N",
        help="images per step (default: %(default)s)",
    )
    add_names(parser, "--variant", VARIANTS, _DEFAULT)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32" if on_cpu else "bfloat16",
        help="dtype of the computation (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if on_cpu else max(1, (os.cpu_count() or 1) // 4),
        metavar="N",
        help="variants to compile at a time; 1 for exact compile times "
        "(default: %(default)s)",
    )
    timing.add_arguments(parser, rounds=7 if on_cpu else 15)
    args = parser.parse_args(argv)
    check_positive(parser, args, "jobs", "rounds")
    name = f"train_step-{{device}}-{args.dtype}"
    args.json = timing.new_path(parser, args.json, name)
    return args


def measure(
    model: str,
    batch_size: int,
    args: argparse.Namespace,
    deadline: timing.Deadline,
    pytorch: Any,
) -> list[Result]:
    """Returns the results of one model and batch size."""
    makers: dict[str, Callable[[], Any]] = {
        name: functools.partial(JaxStep, model, name, batch_size, args.dtype)
        for name in args.variant
    }
    rows = {name: Result(model, batch_size, name) for name in makers}
    steps: dict[str, Any] = {}

    def compile_step(name: str) -> None:
        if deadline.left() < 0:
            rows[name].error = "time was up"
            return
        timing.say(f"{model}, batch {batch_size}: compiling {name}")
        with noting(rows[name]):
            begin = time.perf_counter()
            steps[name] = makers[name]()
            rows[name].compile_seconds = time.perf_counter() - begin
            rows[name].memory_bytes = steps[name].memory_bytes

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(compile_step, args.variant))
    if pytorch is not None and model in pytorch.MODELS:
        shape = (batch_size, *IMAGE_SHAPES[model])
        makers[TORCH] = functools.partial(pytorch.TorchStep, model, shape, args.dtype)
        rows[TORCH] = Result(model, batch_size, TORCH)
        compile_step(TORCH)

    for name in sorted(steps, key=lambda name: steps[name].memory_bytes or math.inf):
        with noting(rows[name]):
            rows[name].peak_bytes = steps[name].start()
    steps = {name: step for name, step in steps.items() if not rows[name].error}
    timing.say(f"{model}, batch {batch_size}: timing {', '.join(steps)}")
    with noting(*(rows[name] for name in steps)):
        seconds = interleaved(steps, args.rounds, _MIN_SECONDS)
        for name, times in seconds.items():
            middle = statistics.median(times)
            rows[name].milliseconds = 1e3 * middle
            rows[name].images_per_second = batch_size / middle
            if REFERENCE in seconds:
                rows[name].ratio = median_ratio(times, seconds[REFERENCE])
    return list(rows.values())


@contextlib.contextmanager
def noting(*rows: Result) -> Iterator[None]:
    """Notes in the rows that memory ran out, and goes on."""
    try:
        yield
    except RuntimeError as error:  # JAX's and PyTorch's errors are
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        for row in rows:
            row.error = "out of memory"


def initial(args: tuple[State, Any, Any, Any]) -> tuple[State, Any, Any, Any]:
    """Returns a first state, random images, labels, and a key."""
    # By NumPy: JAX would compile a program for every shape.
    random = np.random.default_rng(0)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)
        if path[-1].key == "kernel":
            scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            array += scale * random.standard_normal(leaf.shape, leaf.dtype)
        return jax.device_put(array)

    state, images, labels, _ = args
    params, batch_stats = jax.tree.map_with_path(value, tuple(state[:2]))
    optimizer = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), state.optimizer
    )
    return (
        State(params, batch_stats, optimizer),
        jax.random.normal(jax.random.key(0), images.shape, images.dtype),
        jax.device_put(random.integers(10, size=labels.shape, dtype=labels.dtype)),
        jax.random.key(1),
    )


if __name__ == "__main__":
    sys.exit(main())
