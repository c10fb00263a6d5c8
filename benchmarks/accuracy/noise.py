"""Measures how well a sample represents its batch: errors of statistics and gradients.

A small network is trained with ordinary batch norm. At its weights, on batches of real
images, each sampler's statistics are compared with those of the whole batch, and so are
the gradients. The figure that matters for training is the squared distance of the two
gradients, divided by the variance that gradients have from batch to batch anyway: where
it is a tenth, and not the same in all batches, it adds about as much noise as a batch
that is a tenth smaller. Prints tables and writes JSON.
"""

import argparse
import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import flax_sbn as sbn
from accuracy.geometries import Grid, Scattered
from harness.command_line import Parser
from harness.data import DataError, Dataset, load_cifar10
from harness.learning import Learner
from harness.measuring import add_counts, check_positive, describe_device
from harness.methods import Method
from harness.networks import LinenNetwork, Settings, Variables
from harness.training import Trainer, to_device
from reports import noise_table
from speed import timing

SAMPLERS: dict[str, sbn.Sampler] = {
    "LatticeSampling()": sbn.LatticeSampling(),
    "LatticeSampling(4)": sbn.LatticeSampling(4),
    "FeatureSampling(1/64)": sbn.FeatureSampling(1 / 64),
    "FeatureSampling(1/64, groups=1)": sbn.FeatureSampling(1 / 64, groups=1),
    "BatchSampling(8)": sbn.BatchSampling(8),
    "NaiveSampling(8)": sbn.NaiveSampling(8),
    "a regular grid, 4 x 4": Grid(4),
    "16 random positions of each image": Scattered(16),
}

Gradient = Callable[[Variables, jax.Array, jax.Array, jax.Array], jax.Array]


class Batch(NamedTuple):
    """Images of mean 0 and standard deviation 1, labels, and a key for the sampler."""

    images: jax.Array
    labels: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of the statistics of all norms of one size of map.

    Means are in standard deviations of the batch, of variances it is the logarithm.
    All are root mean squares over features and layers.

    Attributes:
      size: of the map, along its first axis.
      mean_offset: what is the same in all batches.
      mean_noise: what differs between batches.
      log_var_offset: likewise, of the variance.
      log_var_noise: likewise.
    """

    size: int
    mean_offset: float
    mean_noise: float
    log_var_offset: float
    log_var_noise: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one sampler does to batches of one size.

    Attributes:
      sampler: its name.
      batch_size: images.
      batches: how many were measured.
      measured: share of the values that is measured.
      gradient: squared distance of the gradients, in units of the variance of a
        batch's gradient.
      gradient_error: its standard error.
      systematic: the part of it that is the same in all batches.
      statistics: errors by size of the map.
    """

    sampler: str
    batch_size: int
    batches: int
    measured: float
    gradient: float
    gradient_error: float
    systematic: float
    statistics: list[Errors]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures all samplers and returns the exit status."""
    args = parse(argv)
    settings = Settings(
        model="resnet8", width=args.width, epochs=args.epochs, batch_size=128
    )
    try:
        dataset = load_cifar10(args.data_dir).limited(args.train_size)
    except DataError as error:
        timing.say(str(error))
        return 2
    learner, variables, accuracy = train(settings, dataset)
    report: dict[str, Any] = {
        "benchmark": "noise",
        "what": "error of the gradient with a sample's statistics, by sampler",
        **describe_device(),
        "dtype": settings.dtype,
        "settings": dataclasses.asdict(settings),
        "train_size": args.train_size,
        "test_accuracy": accuracy,
        "results": [],
    }
    for batch_size in args.batch_size:
        batches = list(draw(learner, dataset, batch_size, args.batches))
        measure = functools.partial(compare, learner, variables, batches)
        reference = gradients(learner, variables, batches, None)
        for name, sampler in SAMPLERS.items():
            if getattr(sampler, "num_samples", 1) <= batch_size:
                timing.say(f"batch {batch_size}: {name}")
                result = measure(reference, name, sampler)
                report["results"].append(dataclasses.asdict(result))
                timing.write(args.json, report)
    print(noise_table.noise_table(report))
    print(f"Numbers: {args.json}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="holds CIFAR-10"
    )
    add_counts(
        parser,
        width=(8, "features of the network's first stage"),
        epochs=(6, "epochs of training"),
        train_size=(4096, "images to train with and to measure"),
        batches=(64, "batches to measure of each size"),
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[128, 32, 8, 2],
        metavar="N",
        help="images per measured batch (default: 128 32 8 2)",
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    check_positive(parser, args, "width", "epochs", "train_size", "batches")
    if not all(2 <= size <= args.train_size for size in args.batch_size):
        parser.error("--batch-size must be from 2 to the number of training images")
    args.json = timing.new_path(parser, args.json, "noise-{device}")
    return args


def train(settings: Settings, dataset: Dataset) -> tuple[Learner, Variables, float]:
    """Trains with batch norm; returns the variables and the accuracy in the test."""
    trainer = Trainer(settings, Method("bn"), to_device(dataset))
    state = trainer.init(0)
    for epoch in range(settings.epochs):
        timing.say(f"epoch {epoch + 1} of {settings.epochs}")
        state = trainer.epoch(state)
    return trainer.learner, state.model.variables, trainer.accuracy(state)


def draw(
    learner: Learner, dataset: Dataset, batch_size: int, count: int
) -> Iterator[Batch]:
    """Yields random batches of the training images."""
    random = np.random.default_rng(batch_size)
    for i in range(count):
        rows = random.choice(len(dataset.train_images), batch_size, replace=False)
        images = learner.scale(jnp.asarray(dataset.train_images[rows]))
        yield Batch(images, jnp.asarray(dataset.train_labels[rows]), jax.random.key(i))


def compare(
    learner: Learner,
    variables: Variables,
    batches: Sequence[Batch],
    reference: NDArray[np.float64],
    name: str,
    sampler: sbn.Sampler | None,
) -> Result:
    """Compares a sampler with the whole batch.

    Args:
      learner: whose network it is.
      variables: of the network.
      batches: to measure.
      reference: what :func:`gradients` returns of the whole batch.
      name: of the sampler.
      sampler: None for the whole batch.
    """
    error = gradients(learner, variables, batches, sampler) - reference
    unit = reference.var(0, ddof=1).sum()
    distances = (error**2).sum(1) / unit
    # Of a mean of so many, as much as this is noise.
    systematic = (error.mean(0) ** 2 - error.var(0, ddof=1) / len(batches)).sum() / unit
    shapes, statistics = errors(learner, variables, batches, sampler)
    total = sum(map(np.prod, shapes))
    measured = sum(sbn.num_measured(sampler, shape) for shape in shapes)
    return Result(
        name,
        len(batches[0].images),
        len(batches),
        float(measured / total),
        float(distances.mean()),
        float(distances.std(ddof=1) / len(distances) ** 0.5),
        max(0.0, float(systematic)),
        statistics,
    )


def gradients(
    learner: Learner,
    variables: Variables,
    batches: Sequence[Batch],
    sampler: sbn.Sampler | None,
) -> NDArray[np.float64]:
    """Returns the gradient of all parameters: a row a batch."""
    network = _network(learner, sampler)

    @jax.jit
    def gradient(batch: Batch) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            given = variables._replace(params=params)
            logits = network.train(given, batch.images, batch.key).logits
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            ).mean()

        flat, _ = ravel_pytree(jax.grad(loss)(variables.params))
        return flat

    return np.stack([np.asarray(gradient(batch), np.float64) for batch in batches])


def errors(
    learner: Learner,
    variables: Variables,
    batches: Sequence[Batch],
    sampler: sbn.Sampler | None,
) -> tuple[list[tuple[int, ...]], list[Errors]]:
    """Returns the extents that norms measure, and the errors of their statistics.

    What the norms are given is that of a network with the whole batch's statistics.
    """
    network = _network(learner, None)
    shapes: list[tuple[int, ...]] = []

    @jax.jit
    def measure(batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
        found, shapes[:] = [], []
        for i, x in enumerate(_inputs(network, variables, batch)):
            key = jax.random.fold_in(batch.key, i)
            shapes.append(x.shape[:-1])
            whole = sbn.batch_statistics(x)
            some = sbn.batch_statistics(x, sampler=sampler, key=key)
            mean = (some.mean - whole.mean) / jnp.sqrt(whole.var)
            found.append((mean, jnp.log(some.var / whole.var)))
        return found

    by_batch = [jax.device_get(measure(batch)) for batch in batches]
    by_size = collections.defaultdict(list)
    for shape, *layer in zip(shapes, *by_batch, strict=True):
        by_size[shape[1]].append(np.moveaxis(np.array(layer, np.float64), 0, 1))
    return shapes, [
        Errors(
            size, *(part for each in np.concatenate(layers, 2) for part in _split(each))
        )
        for size, layers in by_size.items()
    ]


def _inputs(
    network: LinenNetwork, variables: Variables, batch: Batch
) -> list[jax.Array]:
    """Returns what the norms are given."""
    found = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        is_norm = isinstance(context.module, sbn.linen.BatchNorm)
        if is_norm and context.method_name == "__call__":
            found.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        network.train(variables, batch.images, batch.key)
    return found


def _split(errors: NDArray[np.float64]) -> tuple[float, float]:
    """Returns what is the same in all rows, and what is not, as root mean squares."""
    noise = errors.var(0, ddof=1)
    offset = errors.mean(0) ** 2 - noise / len(errors)
    return float(max(0.0, offset.mean()) ** 0.5), float(noise.mean() ** 0.5)


def _network(learner: Learner, sampler: sbn.Sampler | None) -> LinenNetwork:
    task = learner.task
    method = Method("sampled", sampler=sampler)
    return LinenNetwork(learner.settings, method, task.shape, task.num_classes)


if __name__ == "__main__":
    sys.exit(main())
