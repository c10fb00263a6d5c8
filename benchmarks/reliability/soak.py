"""Trains for thousands of steps, and watches memory and the number of programs.

A small network with folded norms trains in Linen and in NNX, with new images and a new
key in each step. After a warm-up nothing may grow: neither the number of live arrays,
nor the memory of the process, nor the number of compiled programs. Prints a table and
writes JSON.
"""

import gc
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import methods
from harness.command_line import Parser
from harness.measuring import add_counts, check_positive, describe_device
from harness.networks import NETWORKS, Settings, Variables
from reports import reliability_tables
from speed import timing

MODEL, SHAPE, CLASSES = "resnet8", (32, 8, 8, 3), 10
METHODS = tuple(methods.parse(name).fold() for name in ("lattice", "fs:1/16"))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all networks and returns the exit status: 1 if anything grew."""
    parser = Parser(__doc__)
    add_counts(
        parser,
        steps=(5000, "training steps of each network"),
        every=(500, "steps between measurements; the first one ends the warm-up"),
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    check_positive(parser, args, "steps", "every")
    path = timing.new_path(parser, args.json, "soak-{device}")
    report: dict[str, Any] = {
        "benchmark": "soak",
        "what": "memory and programs over thousands of training steps",
        **describe_device(),
        "dtype": "float32",
        "model": MODEL,
        "shape": SHAPE,
        "results": [],
    }
    for api, method in itertools.product(NETWORKS, METHODS):
        looks = train(api, method, args.steps, args.every)
        report["results"].append({"api": api, "method": method.name, "looks": looks})
        timing.write(path, report)
    print(reliability_tables.soak_table(report))
    print(f"Numbers: {path}")
    return int(any(grew(row["looks"]) for row in report["results"]))


def train(
    api: str, method: methods.Method, steps: int, every: int
) -> list[dict[str, Any]]:
    """Returns what was there after every so many steps."""
    settings = Settings(model=MODEL, api=api, width=4)
    network = NETWORKS[api](settings, method, SHAPE[1:], CLASSES)
    optimizer = optax.sgd(0.01, momentum=0.9)

    def start(key: jax.Array, x: jax.Array) -> Any:
        variables = network.init(key, x)
        return variables, optimizer.init(variables.params)

    traces: list[None] = []

    def step(
        state: Any, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[Any, jax.Array]:
        traces.append(None)  # the tracers themselves would leak
        variables, momentum = state

        def objective(params: Any) -> Any:
            given = Variables(params, variables.overwritten, variables.rest)
            forward = network.train(given, images, key)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                forward.logits, labels
            )
            return losses.mean() + forward.loss, forward.rest

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, rest), grads = gradient(variables.params)
        updates, momentum = optimizer.update(grads, momentum)
        params = optax.apply_updates(variables.params, updates)
        return (Variables(params, variables.overwritten, rest), momentum), loss

    rng, program = np.random.default_rng(0), jax.jit(step, donate_argnums=0)
    key = jax.random.key(0)
    state = jax.jit(start)(key, jnp.zeros(SHAPE))
    looks = []
    for i in range(1, steps + 1):
        images = rng.normal(size=SHAPE).astype(np.float32)
        labels = rng.integers(CLASSES, size=SHAPE[0])
        state, loss = program(state, images, labels, jax.random.fold_in(key, i))
        if i % every == 0:
            looks.append(look(i, len(traces), float(loss)))
            timing.say(f"{api}, {method.name}: {looks[-1]}")
    return looks


def look(step: int, programs: int, loss: float) -> dict[str, Any]:
    """Returns what is alive, beside how many programs the step has been traced to."""
    gc.collect()
    alive = jax.live_arrays()
    return {
        "step": step,
        "arrays": len(alive),
        "array_bytes": sum(array.nbytes for array in alive),
        "resident_bytes": resident_bytes(),
        "programs": programs,
        "loss": loss,
    }


def resident_bytes() -> int | None:
    """Returns the memory of this process; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def grew(looks: Sequence[dict[str, Any]]) -> bool:
    """Whether arrays or programs are more than after the warm-up, or the loss is lost.

    The memory of the process is not judged: the allocator keeps some.
    """
    first, last = looks[0], looks[-1]
    same = all(first[name] == last[name] for name in ("arrays", "array_bytes"))
    return not (same and last["programs"] == 1 and np.isfinite(last["loss"]))


if __name__ == "__main__":
    sys.exit(main())
