"""Checks what every method makes of finite values that are hard to normalize.

They are a constant feature, a mean far from zero, numbers near the largest of their
type, a single example, and a mask that leaves nothing. The reference is the same layer
in float64, with the same sample. Prints a table and writes JSON.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import flax_sbn as sbn
from harness.command_line import Parser, add_names
from harness.measuring import describe_device
from reliability import normalizers
from reliability.normalizers import FEATURES, METHODS, Method, Options
from reports import reliability_tables
from speed import timing

SHAPE = (16, 8, 8, FEATURES)
_LARGEST_HALF = 6e4  # of 65504


@dataclasses.dataclass(frozen=True)
class Case:
    """Finite values that are hard to normalize.

    Attributes:
      mean: of all values.
      spread: half the width of the uniform distribution that they are drawn from.
      constant: what one feature is everywhere instead, if not None.
      examples: how many there are, in addition to virtual ones.
      space: spatial extent.
      empty_mask: whether a mask leaves nothing to measure.
      options: of the layer.
    """

    mean: float = 0.0
    spread: float = 3**0.5
    constant: float | None = None
    examples: int = SHAPE[0]
    space: tuple[int, ...] = SHAPE[1:3]
    empty_mask: bool = False
    options: Options = normalizers.DEFAULT

    def values(self, method: Method) -> np.ndarray:
        """Returns the input of a method."""
        virtual = method.virtual if self.examples == 1 else 0
        shape = (self.examples + virtual, *self.space, FEATURES)
        rng = np.random.default_rng(0)
        x = self.mean + self.spread * rng.uniform(-1, 1, shape)
        if self.constant is not None:
            x[..., 0] = self.constant
        return np.asarray(x, self.options.dtype)


_HALF = Options(dtype=jnp.float16)
CASES: dict[str, Case] = {
    "constant 0": Case(constant=0.0),
    "constant 1000.1": Case(constant=1000.1),
    "mean 1e4": Case(mean=1e4),
    "float32 1e20": Case(spread=1e20),
    "float16 6e4": Case(spread=_LARGEST_HALF, options=_HALF),
    "float16 products": Case(spread=_LARGEST_HALF, options=_HALF._replace(gain=16.0)),
    "one example": Case(examples=1),
    "one example, no space": Case(examples=1, space=()),
    "empty mask": Case(empty_mask=True),
}


@dataclasses.dataclass
class Result:
    """What one method makes of one case.

    Attributes:
      error: what it says if it refuses.
      finite: whether the output is, as for the next two.
      y_error: largest error of the output, relative to the largest value, at least 1;
        None for what draws otherwise in float64, as for the next.
      gradient_error: likewise of the input's gradient, relative to its largest value.
      zero: whether all of the output is zero: nothing was told about the input.
      kept: whether the running statistics are what they were; None if there are none.
    """

    method: str
    case: str
    error: str | None = None
    finite: bool = False
    finite_state: bool = False
    finite_gradients: bool = False
    y_error: float | None = None
    gradient_error: float | None = None
    zero: bool = False
    kept: bool | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all methods and returns the exit status."""
    parser = Parser(__doc__)
    add_names(parser, "--method", METHODS)
    add_names(parser, "--case", CASES)
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    path = timing.new_path(parser, args.json, "extremes-{device}")
    report: dict[str, Any] = {
        "benchmark": "extremes",
        "what": "what finite values that are hard to normalize lead to",
        **describe_device(),
        "shape": SHAPE,
        "results": [],
    }
    for name in args.method:
        timing.say(name)
        for case in args.case:
            if (result := measure(name, case)) is not None:
                report["results"].append(dataclasses.asdict(result))
        timing.write(path, report)
    print(reliability_tables.extremes_table(report))
    print(f"Numbers: {path}")
    return 0


def measure(name: str, case_name: str) -> Result | None:
    """Returns what a method makes of a case; None for a mask where it takes none."""
    method, case = METHODS[name], CASES[case_name]
    if case.empty_mask and not normalizers.takes_mask(method):
        return None
    x = case.values(method)
    try:
        found, before = outcome(method, x, case)
    except ValueError as error:
        return Result(name, case_name, error=str(error))
    wide = case.options._replace(dtype=jnp.float64)
    with jax.enable_x64(True):
        truth, _ = outcome(method, x.astype(np.float64), case, wide)
    y = np.asarray(found.y, np.float64)
    finite, finite_state, finite_gradients = (
        all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
        for tree in (y, found.state, (found.params, found.x))
    )
    # It starts from a random direction, which is another one in float64.
    comparable = method.norm is not sbn.linen.MixtureNorm
    return Result(
        name,
        case_name,
        finite=finite,
        finite_state=finite_state,
        finite_gradients=finite_gradients,
        y_error=relative_error(y, truth.y, 1.0) if comparable and finite else None,
        gradient_error=(
            relative_error(found.x, truth.x, 0.0)
            if comparable and finite_gradients
            else None
        ),
        zero=not y.any(),
        kept=_same(found.state, before) if before else None,
    )


def outcome(
    method: Method, x: np.ndarray, case: Case, options: Options | None = None
) -> tuple[normalizers.Results, Any]:
    """Returns what a training step computes, and the running statistics before it."""
    options = options or case.options
    variables = normalizers.initial(method, jnp.asarray(x), options)
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    found = _step(method, case.empty_mask, options)(variables, x, cotangent)
    return jax.device_get(found), variables.get("batch_stats", {})


@functools.cache
def _step(method: Method, empty_mask: bool, options: Options) -> Any:
    def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        mask = jnp.zeros((*x.shape[:-1], 1), bool) if empty_mask else None
        return normalizers.step(method, variables, x, cotangent, mask, options)

    return jax.jit(step)


def relative_error(found: Any, truth: Any, least: float) -> float:
    """Returns the largest error, relative to the largest value, at least ``least``."""
    found, truth = (np.asarray(each, np.float64) for each in (found, truth))
    error, magnitude = abs(found - truth).max(), max(least, abs(truth).max())
    return float(error / magnitude) if error else 0.0


def _same(state: Any, before: Any) -> bool:
    """Whether all averages are equal; steps may be counted."""
    after = dict(jax.tree_util.tree_leaves_with_path(state["batch_stats"]))
    return all(
        np.array_equal(after[path], value)
        for path, value in jax.tree_util.tree_leaves_with_path(before)
        if "step" not in jax.tree_util.keystr(path)
    )


if __name__ == "__main__":
    sys.exit(main())
