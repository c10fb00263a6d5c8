"""Compares training and evaluation mode of a norm during a training run.

After each epoch it measures the test accuracy with the running statistics (evaluation
mode), with those of each test batch (training mode), and with those that
``estimate_statistics`` finds on many training images together, augmented as in
training. It also measures how far the running statistics are from the latter. Settings
are those of examples/studies/methods-main.toml. Prints a table, and rewrites a JSON
file after each epoch.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import flax_sbn as sbn
from harness import grid
from harness.command_line import Parser
from harness.data import DataError, Dataset, load_cifar10
from harness.learning import hits
from harness.measuring import add_counts, check_positive, describe_device
from harness.networks import LinenNetwork, Variables
from harness.training import State, Trainer, crop_and_flip, to_device
from reports import modes_table
from speed import timing

_STUDY = Path(__file__).parents[2] / "examples" / "studies" / "methods-main.toml"


@dataclasses.dataclass(frozen=True)
class Result:
    """One method after one epoch.

    Attributes:
      method: as in the study.
      epoch: how many there were.
      running: test accuracy with the running statistics.
      batch: with the statistics of each batch of the test.
      estimated: with those of many training images together.
      mean_error: of the running statistics against the latter, in standard deviations;
        root mean square over all features.
      log_var_error: likewise, of the variances' logarithm.
    """

    method: str
    epoch: int
    running: float
    batch: float
    estimated: float
    mean_error: float
    log_var_error: float


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all methods, compares, and returns the exit status."""
    args = parse(argv)
    try:
        dataset = load_cifar10(args.data_dir).limited(args.train_size)
    except DataError as error:
        timing.say(str(error))
        return 2
    report: dict[str, Any] = {
        "benchmark": "modes",
        "what": "training mode, evaluation mode and running statistics",
        **describe_device(),
        "dtype": "float32",
        "epochs": args.epochs,
        "train_size": len(dataset.train_images),
        "images": args.images,
        "results": [],
    }
    for norm in args.norm:
        for result in compare(norm, dataset, args.epochs, args.images):
            timing.say(str(result))
            report["results"].append(dataclasses.asdict(result))
            timing.write(args.json, report)
    print(modes_table.modes_table(report))
    print(f"Numbers: {args.json}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="holds CIFAR-10"
    )
    parser.add_argument(
        "--norm",
        nargs="+",
        default=["bn", "lattice", "fs:1/64"],
        metavar="NAME",
        help="methods as in train.py (default: bn lattice fs:1/64)",
    )
    add_counts(
        parser,
        epochs=(12, "epochs of training"),
        train_size=(50000, "images to train with"),
        images=(4096, "training images whose statistics are estimated"),
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    check_positive(parser, args, "epochs", "train_size", "images")
    args.json = timing.new_path(parser, args.json, "modes-{device}")
    return args


def compare(norm: str, dataset: Dataset, epochs: int, images: int) -> Iterator[Result]:
    """Yields what becomes of a method, epoch by epoch."""
    table = {
        name: value for name, value in grid.read(_STUDY).items() if name != "grids"
    }
    (experiment,) = grid.experiments(table, norm=norm, seed=0, epochs=epochs)
    trainer = Trainer(experiment, experiment.method(), to_device(dataset))
    size = experiment.batch_size
    chosen = np.split(dataset.train_images[: images // size * size], images // size)
    batches = [
        trainer.learner.scale(shown(trainer, batch, i))
        for i, batch in enumerate(chosen)
    ]
    hits_in = jax.jit(functools.partial(correct, trainer), static_argnames="train")
    state = trainer.init(0)
    for epoch in range(1, epochs + 1):
        state = trainer.epoch(state)
        given = state.model.variables
        found = estimated(trainer, state, batches)
        mean, log_var = distance(given.rest, found.rest)
        yield Result(
            norm,
            epoch,
            accuracy(hits_in, trainer, given, train=False),
            accuracy(hits_in, trainer, given, train=True),
            accuracy(hits_in, trainer, found, train=False),
            mean,
            log_var,
        )


def estimated(trainer: Trainer, state: State, batches: Sequence[Any]) -> Variables:
    """Returns the variables with the statistics of many images together."""
    learner, given = trainer.learner, state.model.variables
    assert isinstance(learner.network, LinenNetwork)
    found = sbn.linen.estimate_statistics(
        learner.network.trained,
        {"params": given.params, "batch_stats": given.rest},
        batches,
        rngs={"sampling": jax.random.key(0)},
    )
    return given._replace(rest=found["batch_stats"])


def shown(trainer: Trainer, batch: Any, seed: int) -> jax.Array:
    """Returns images as the training shows them: cropped and flipped, if it does so."""
    images = jnp.asarray(batch)
    if not trainer.settings.augment:
        return images
    return sbn.augment_batch(crop_and_flip, jax.random.key(seed), images, 1)


def correct(
    trainer: Trainer,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    *,
    train: bool,
) -> jax.Array:
    """Returns how many images of a batch are right, in one mode or the other."""
    learner = trainer.learner
    if not train:
        return hits(learner.evaluate(variables, images), labels)
    x, key = learner.scale(images), jax.random.key(0)
    return hits(learner.network.train(variables, x, key).logits, labels)


def accuracy(
    hits_in: Callable[..., jax.Array],
    trainer: Trainer,
    variables: Variables,
    *,
    train: bool,
) -> float:
    """Returns the share of the test that is right; ``hits_in`` is :func:`correct`."""
    data = trainer.data
    total = sum(hits_in(variables, *batch, train=train) for batch in data.test)
    return float(total) / data.num_test


def distance(running: Any, found: Any) -> tuple[float, float]:
    """Returns how far running statistics are from others: of means, and variances."""
    means, log_vars = [], []
    for path, var in jax.tree.leaves_with_path(found):
        if path[-1].key == "var":
            norm, other = running, found
            for key in path[:-1]:
                norm, other = norm[key.key], other[key.key]
            means.append((norm["mean"] - other["mean"]) / jnp.sqrt(var))
            log_vars.append(jnp.log(norm["var"] / var))
    return _root_mean_square(means), _root_mean_square(log_vars)


def _root_mean_square(arrays: Sequence[jax.Array]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.concatenate(arrays) ** 2)))


if __name__ == "__main__":
    sys.exit(main())
