"""Finds how far a NaN or an infinity in one example spreads, with every method.

Each example of a batch in turn is NaN, or infinite, or NaN at a single position. The
loss leaves that example out. It counts what else is lost: other examples of the output,
the running statistics, the gradients of other examples, and those of the parameters. It
also checks whether masking the example, or setting it to zero, helps. Prints tables and
writes JSON.
"""

import dataclasses
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.command_line import Parser, add_names
from harness.measuring import describe_device
from reliability import normalizers
from reliability.normalizers import FEATURES, METHODS, Method
from reports import reliability_tables
from speed import timing

SHAPE = (16, 8, 8, FEATURES)
# What is put in, and whether in all of the example.
FILLS = {"NaN": (jnp.nan, True), "inf": (jnp.inf, True), "one NaN": (jnp.nan, False)}
# What is done about it: whether the example is masked, and whether it is set to zero.
CURES = {
    "nothing": (False, False),
    "mask": (True, False),
    "zero": (False, True),
    "zero and mask": (True, True),
}


class Lost(NamedTuple):
    """What a bad example takes along.

    Attributes:
      examples: other examples of the output that are not finite.
      changed: other examples of the output that are finite, but not what they were.
      state: whether running statistics are not finite.
      example_gradients: other examples of the input's gradient that are not finite.
      gradients: whether gradients of parameters are not finite.
    """

    examples: Any
    changed: Any
    state: Any
    example_gradients: Any
    gradients: Any


@dataclasses.dataclass(frozen=True)
class Result:
    """What is lost for some of the places, with one method.

    Attributes:
      method: the normalization.
      fill: what stands there, of ``FILLS``.
      cure: what is done about it, of ``CURES``.
      places: how many places have this result; of how many in all real examples.
    """

    method: str
    fill: str
    cure: str
    places: int
    of: int
    examples: int
    changed: int
    state: bool
    example_gradients: int
    gradients: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all methods and returns the exit status."""
    parser = Parser(__doc__)
    add_names(parser, "--method", METHODS)
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    path = timing.new_path(parser, args.json, "bad-examples-{device}")
    report: dict[str, Any] = {
        "benchmark": "bad_examples",
        "what": "what an example that is not finite takes along",
        **describe_device(),
        "dtype": "float32",
        "shape": SHAPE,
        "results": [],
    }
    for name in args.method:
        timing.say(name)
        results = [
            *(result for fill in FILLS for result in measure(name, fill)),
            *(result for cure in CURES for result in measure(name, "NaN", cure)),
        ]
        unique = list(dict.fromkeys(results))
        report["results"] += [dataclasses.asdict(result) for result in unique]
        timing.write(path, report)
    print(reliability_tables.bad_examples_table(report))
    print(reliability_tables.cures_table(report))
    print(f"Numbers: {path}")
    return 0


def measure(name: str, fill: str, cure: str = "nothing") -> list[Result]:
    """Returns the results of one method, the worst first; none if it takes no mask."""
    method = METHODS[name]
    (value, whole), (masked, zero) = FILLS[fill], CURES[cure]
    if masked and not normalizers.takes_mask(method):
        return []
    examples = range(SHAPE[0] - method.virtual)
    positions = range(-1, 0) if whole else range(SHAPE[1] * SHAPE[2])
    places = np.array(list(itertools.product(examples, positions)), np.int32)
    value = 0.0 if zero else value
    found = jax.device_get(_program(method, masked)(jnp.float32(value), places))
    counts = Counter(zip(*(each.tolist() for each in found), strict=True))
    return [
        Result(name, fill, cure, count, len(places), *lost)
        for lost, count in sorted(counts.items(), reverse=True)
    ]


@functools.cache
def _program(method: Method, masked: bool) -> Any:
    """Returns the compiled program that tries all places."""
    x, cotangent = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    variables = normalizers.initial(method, x)

    def lost(fill: jax.Array, place: jax.Array) -> Lost:
        example, position = place
        examples = jnp.arange(SHAPE[0])[:, None, None, None]
        others = examples != example
        there = (jnp.arange(SHAPE[1] * SHAPE[2]) == position) | (position < 0)
        bad = ~others & there.reshape(1, *SHAPE[1:3], 1)
        wanted = jnp.where(others, cotangent, 0)
        mask = others if masked else None
        clean = normalizers.step(method, variables, x, wanted, mask)
        found = normalizers.step(
            method, variables, jnp.where(bad, fill, x), wanted, mask
        )
        others = others.ravel()
        finite = _finite_examples(found.y)
        same = (abs(found.y - clean.y) < 1e-3).all(tuple(range(1, x.ndim)))
        return Lost(
            examples=(others & ~finite).sum(),
            changed=(others & finite & ~same).sum(),
            state=~_all_finite(found.state),
            example_gradients=(others & ~_finite_examples(found.x)).sum(),
            gradients=~_all_finite(found.params),
        )

    def all_places(fill: jax.Array, places: jax.Array) -> Lost:
        return lax.map(functools.partial(lost, fill), places, batch_size=32)

    return jax.jit(all_places)


def _finite_examples(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(tuple(range(1, x.ndim)))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


if __name__ == "__main__":
    sys.exit(main())
