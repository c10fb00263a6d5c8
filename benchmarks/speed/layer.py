"""Times one layer, forward and gradient: ours with each sampler against Flax's.

``--what norm`` is the norm alone on a given activation. ``--what block`` is the
convolution, the norm and the ReLU; the norm's own cost is the time of the block minus
that of the same convolution with a bias and a ReLU.

Shapes are those of ResNet-50's batch norms and of a multilayer perceptron. All variants
of a shape get the same input, whose last examples are the virtual ones. They are
compiled first and then run in turns, so other load on the machine affects all alike; a
ratio is the median of the rounds' ratios. Prints a table, and rewrites a JSON file
after each shape.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import flax_sbn as sbn
from harness.command_line import Parser, add_names, one_of
from harness.measuring import describe_device, interleaved, median_ratio, quartiles
from models.linen_units import LinenUnits
from reports import tables
from speed import timing
from speed.step import VARIANTS
from tests.cases import LAYER_SHAPES

# The default, and the paper's amounts. None is ours without a sampler, as flax's.
SAMPLERS: dict[str, sbn.Sampler | None] = {
    "all": None,
    "Lattice": sbn.LatticeSampling(),
    "NS 4": sbn.NaiveSampling(4),
    "BS 4": sbn.BatchSampling(4),
    "FS 1/64 groups=1": sbn.FeatureSampling(1 / 64, groups=1),
    "FS 1/64": sbn.FeatureSampling(1 / 64),
    "VDN 4": sbn.VirtualSampling(4),
    "FS+VDN": sbn.MixedSampling(sbn.FeatureSampling(1 / 64), sbn.VirtualSampling(4)),
    "BS+VDN": sbn.MixedSampling(sbn.BatchSampling(4), sbn.VirtualSampling(4)),
}
_DENSE_BATCH = 32  # a multilayer perceptron sees so many times the examples

BLOCKS = {
    "Flax": VARIANTS["Flax BN"],
    "conv": VARIANTS["no norm"],
    **{
        name: VARIANTS[name]
        for name in ("Lattice", "Lattice folded", "FS 1/64 folded", "BS 8 folded")
    },
}
# The convolution that makes a layer's shape: an example's input, kernel and strides.
CONVOLUTIONS: dict[str, tuple[tuple[int, int, int], int, int]] = {
    "resnet50-stem": ((224, 224, 3), 7, 2),
    "resnet50-stage1": ((56, 56, 64), 3, 1),
    "resnet50-stage1-out": ((56, 56, 64), 1, 1),
    "resnet50-stage2-out": ((28, 28, 128), 1, 1),
    "resnet50-stage3-out": ((14, 14, 256), 1, 1),
    "resnet50-stage4-out": ((7, 7, 512), 1, 1),
}
_LAYERS = {"norm": tuple(LAYER_SHAPES), "block": tuple(CONVOLUTIONS)}


@dataclasses.dataclass
class Result:
    """One layer, normalized in one way.

    Attributes:
      ratio: of time to Flax's.
      ratio_quartiles: of the rounds' ratios.
      compile_ratio: likewise, of the time to compile.
      own_milliseconds: what a block takes more than its convolution.
      own_ratio: of that to Flax's; None where Flax's own cost is lost in the noise.
    """

    layer: str
    shape: tuple[int, ...]
    variant: str
    milliseconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    compile_ratio: float
    own_milliseconds: float | None = None
    own_ratio: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    on_cpu = jax.default_backend() == "cpu"
    parser = Parser(__doc__)
    parser.add_argument(
        "--what",
        type=one_of(_LAYERS),
        default="norm",
        metavar="NAME",
        help=f"one of {', '.join(_LAYERS)} (default: %(default)s)",
    )
    add_names(parser, "--shape", LAYER_SHAPES, ())
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32 if on_cpu else 256,
        metavar="N",
        help="images (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32" if on_cpu else "bfloat16",
        help="dtype of the computation (default: %(default)s)",
    )
    timing.add_arguments(parser, rounds=9 if on_cpu else 25)
    args = parser.parse_args(argv)
    shapes = args.shape or _LAYERS[args.what]
    if unknown := set(shapes) - set(_LAYERS[args.what]):
        parser.error(f"--shape: no {args.what} of {', '.join(sorted(unknown))}")
    kind = "layer" if args.what == "norm" else "block"
    path = timing.new_path(parser, args.json, f"{kind}-{{device}}-{args.dtype}")
    deadline = timing.Deadline(args.minutes)

    report: dict[str, Any] = {
        "benchmark": kind,
        "what": f"forward and gradient of one {args.what}, time against Flax's",
        **describe_device(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "results": [],
    }
    for i, name in enumerate(shapes):
        if not deadline.allows_another():
            timing.say(f"Time is up; not measured: {', '.join(shapes[i:])}")
            break
        timing.say(f"{kind} {i + 1}/{len(shapes)}: {name}")
        results = measure(args.what, name, args.batch_size, args.dtype, args.rounds)
        report["results"] += [dataclasses.asdict(result) for result in results]
        timing.write(path, report)
    print(tables.TABLES[kind](report))
    print(f"Numbers: {path}")
    return 0


def measure(
    what: str, name: str, batch_size: int, dtype: str, rounds: int
) -> Iterator[Result]:
    """Yields the results of one shape."""
    variants = norms(name, dtype) if what == "norm" else blocks(name, dtype)
    shape = (batch_size, *LAYER_SHAPES[name])
    if len(shape) == 2:
        shape = (_DENSE_BATCH * batch_size, *shape[1:])
    input_shape = shape
    if what == "block":
        input_shape = (batch_size, *CONVOLUTIONS[name][0])

    steps, compiling = {}, {}
    for label, layer in variants.items():
        begin = time.perf_counter()
        steps[label] = compiled_step(layer, input_shape, shape, dtype)
        compiling[label] = time.perf_counter() - begin
    seconds = interleaved(steps, rounds)
    own: dict[str, float] = {}
    if what == "block":
        own = {label: added(times, seconds["conv"]) for label, times in seconds.items()}
    for label, times in seconds.items():
        yield Result(
            layer=name,
            shape=shape,
            variant=label,
            milliseconds=1e3 * statistics.median(times),
            ratio=median_ratio(times, seconds["Flax"]),
            ratio_quartiles=quartiles(times, seconds["Flax"]),
            compile_ratio=compiling[label] / compiling["Flax"],
            own_milliseconds=1e3 * own[label] if own else None,
            own_ratio=own[label] / own["Flax"] if own and own["Flax"] > 0 else None,
        )


def added(times: Sequence[float], without: Sequence[float]) -> float:
    """Returns the median of what the same round took more."""
    return statistics.median(
        mine - other for mine, other in zip(times, without, strict=True)
    )


def norms(name: str, dtype: str) -> dict[str, nn.Module]:
    """Returns the norms of a layer by the names of the variants."""
    variants: dict[str, nn.Module] = {
        "Flax": nn.BatchNorm(use_running_average=False, dtype=dtype)
    }
    for label, sampler in SAMPLERS.items():
        if len(LAYER_SHAPES[name]) == 1 and ("FS" in label or label == "Lattice"):
            continue
        variants[label] = sbn.linen.BatchNorm(
            use_running_average=False, dtype=dtype, sampler=sampler
        )
    return variants


def blocks(name: str, dtype: str) -> dict[str, Any]:
    """Returns the blocks of a layer by the names of the variants."""
    _, kernel_size, strides = CONVOLUTIONS[name]
    features = LAYER_SHAPES[name][-1]
    return {
        label: LinenUnits(method, True, dtype).conv_norm(
            features,
            kernel_size,
            strides,
            # What has no norm is the limit, and gets the ReLU that fuses.
            activation=sbn.relu if method.kind == "none" else nn.relu,
        )
        for label, method in BLOCKS.items()
    }


def compiled_step(
    layer: Any,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    dtype: str,
) -> Callable[[], Any]:
    """Compiles output, updated statistics and gradients; returns the ready call.

    The gradient is that of parameters and input, but for images, which need none.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], input_shape, dtype)
    variables = layer.init(keys[1], x[:1])
    params, stats = variables["params"], variables.get("batch_stats", {})
    wanted = 1 if input_shape[-1] == 3 else 2  # images need no gradient

    def step(stats: Any, g: jax.Array, key: jax.Array, *inputs: Any) -> Any:
        def forward(params: Any, x: jax.Array = inputs[1]) -> Any:
            return layer.apply(
                {"params": params, "batch_stats": stats},
                x,
                mutable=["batch_stats"],
                rngs={"sampling": key},
            )

        y, backward, updates = jax.vjp(forward, *inputs[:wanted], has_aux=True)
        return y, updates, backward(g)

    g = jax.random.normal(keys[2], output_shape, dtype)
    args = (stats, g, keys[3], params, x)
    compiled = jax.jit(step).lower(*args).compile()
    return lambda: compiled(*args)


if __name__ == "__main__":
    sys.exit(main())
