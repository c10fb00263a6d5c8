"""Trains an image classifier with several normalizations and compares them.

By default: scikit-learn's real 8 x 8 digits, a small residual network, and plain batch
norm against sampled norms, two seeds each, in about two minutes on two CPU cores.
Results go to a new folder under runs/: curves.png, results.json, results.csv.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, TaskID

from harness import methods, processes, tasks
from harness.command_line import Parser
from harness.comparison import Report, Run
from harness.data import DataError, Dataset
from harness.files import new_folder
from harness.measuring import check_positive, describe_device, interleaved, median_ratio
from harness.networks import Settings
from harness.options import COUNTS, add_option, add_settings, help_of, settings_of
from harness.progress import numbers, progress_bar
from harness.training import Trainer, to_device

_TIMING_ROUNDS = 15


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        __doc__,
        epilog="examples:\n"
        "  train.py                                    # the comparison on digits\n"
        "  train.py --norm bn bs:16 bs:4 bs:1 --seeds 3\n"
        '  train.py --norm bn --sampler "FeatureSampling(1/16, groups=1)"\n'
        "  train.py --dataset cifar10 --data-dir DIR --model resnet20 --epochs 60\n"
        "\n"
        "models: resnet8, resnet8-stride2 (which halves images first), resnet20,\n"
        "resnet56 and mlp are for small images and come in linen and nnx; so is\n"
        "binary8, in linen, whose weights and activations are binary. The others are\n"
        "for ImageNet, in linen. They also take smaller images, densenet121 from\n"
        "32 x 32 pixels, of which one is left at the end.\n",
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--norm",
        nargs="+",
        metavar="NAME",
        help=help_of("norm", " ".join(methods.DEFAULT)),
    )
    what.add_argument(
        "--sampler",
        nargs="+",
        metavar="CALL",
        default=[],
        help='samplers as in Python, such as "BatchSampling(8, strata=4)"; they are '
        "compared with --norm, which is then bn by default",
    )
    add_option(what, "seed", 0, help=f"first {help_of('seed', 0)}")
    what.add_argument(
        "--seeds",
        type=int,
        default=2,
        metavar="N",
        help="training runs of each method, with consecutive seeds (default: 2)",
    )

    data = parser.add_argument_group("data")
    add_option(data, "dataset", "digits")
    data.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with CIFAR-10: its python or binary version, or cifar10_jpeg.npz",
    )
    add_option(data, "train_size", None)
    data.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help=help_of("augment", "for cifar10"),
    )

    add_settings(parser.add_argument_group("how to train"), Settings())
    where = parser.add_argument_group("where")
    where.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="divide batch and data among N devices (default: 1, with "
        "--distributed all)",
    )
    processes.add_option(where)

    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder for the results (default: one under runs/, named by the time)",
    )
    args = parser.parse_args(argv)
    check_positive(parser, args, "seeds", "train_size", "devices", *COUNTS)
    if (args.dataset == "cifar10") != (args.data_dir is not None):
        parser.error("--dataset cifar10 and --data-dir DIR go together")
    processes.join(parser, args.distributed)
    if args.devices is None and args.distributed is None:
        args.devices = 1
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit status."""
    args = parse(argv)
    console = Console(quiet=not processes.is_first())
    problem = None
    try:
        dataset, trainers, folder = prepare(args)
    except (DataError, ValueError, FileExistsError) as error:
        problem = str(error)
    if problem := processes.agree(args, problem):
        print(f"train.py: {problem}", file=sys.stderr)
        return 2

    report = Report(
        folder,
        describe(args, dataset),
        {trainer.method.name: trainer.learner.measured for trainer in trainers},
    )
    status = 0
    try:
        with progress_bar(console) as progress:
            train_all(args, trainers, report, progress)
        if jax.process_count() == 1:  # others would take turns in another order
            report.relative_time = time_steps(trainers)
    except KeyboardInterrupt:
        if not any(run.test_accuracy for run in report.runs):
            if folder:
                folder.rmdir()
            raise
        status = 130
        console.print("Interrupted; these are the results so far.")
    report.write()
    console.print(report.table())
    console.print(f"Results: {folder}", soft_wrap=True)
    return status


def prepare(
    args: argparse.Namespace,
) -> tuple[Dataset, list[Trainer], Path | None]:
    """Returns what a comparison needs; the folder only where it is written."""
    dataset = tasks.load(args.dataset, args.data_dir).limited(args.train_size)
    trainers = make_trainers(args, dataset)
    if not processes.is_first():
        return dataset, trainers, None
    return dataset, trainers, new_folder(args.out, f"{dataset.name}-{args.model}")


def make_trainers(args: argparse.Namespace, dataset: Dataset) -> list[Trainer]:
    """Checks every method against the settings before any of them trains."""
    names = args.norm or (["bn"] if args.sampler else methods.DEFAULT)
    chosen = [methods.parse(text) for text in (*names, *args.sampler)]
    if args.fold:
        chosen = [method.fold() for method in chosen]
    augment = dataset.augment if args.augment is None else args.augment
    settings = dataclasses.replace(settings_of(args), augment=augment)
    data = to_device(dataset, processes.make_mesh(args.devices))
    return [Trainer(settings, method, data) for method in dict.fromkeys(chosen)]


def describe(args: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """Returns what a reader of the results has to know about them."""
    device = jax.devices()[0]
    return {
        "title": f"{args.model} ({args.api}) on {dataset.name}, batches of "
        f"{args.batch_size}, {args.epochs} epochs, {args.dtype}, {device.device_kind}",
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "train_images": len(dataset.train_images),
        "test_images": len(dataset.test_images),
        **describe_device(),
    }


def train_all(
    args: argparse.Namespace,
    trainers: list[Trainer],
    report: Report,
    progress: Progress,
) -> None:
    """Trains every method with every seed and writes the report after each."""
    seeds = range(args.seed, args.seed + args.seeds)
    total = len(trainers) * len(seeds)
    task = progress.add_task("", numbers="", total=total * args.epochs)
    for done, (trainer, seed) in enumerate(itertools.product(trainers, seeds)):
        run = Run(trainer.method.name, seed)
        report.runs.append(run)
        train_one(trainer, run, progress, task, done * args.epochs)
        run.complete = True
        report.write()
        accuracy = f"test accuracy {run.test_accuracy[-1]:.1%}"
        progress.console.print(
            f"{done + 1:3d}/{total}  {run.method}, seed {seed}: "
            f"{'diverged' if run.diverged else accuracy}, {run.seconds:.0f} s"
        )


def train_one(
    trainer: Trainer, run: Run, progress: Progress, task: TaskID, before: int
) -> None:
    """Trains once, filling in ``run`` and moving the progress bar."""
    begin = time.monotonic()
    progress.update(
        task, description=f"{run.method}, seed {run.seed}", numbers="compiling"
    )
    for now in trainer.train(run.seed):
        progress.update(
            task,
            completed=before + now.epoch - 1 + now.step / now.steps,
            numbers=numbers(
                f"{now.epoch}/{trainer.settings.epochs}",
                now.loss,
                now.accuracy,
                now.images_per_second,
            ),
        )
        run.seconds = time.monotonic() - begin
        if now.test_accuracy is not None:
            run.loss.append(now.loss)
            run.train_accuracy.append(now.accuracy)
            run.test_accuracy.append(now.test_accuracy)


def time_steps(trainers: list[Trainer]) -> dict[str, float]:
    """Returns each method's time a step relative to the first one's.

    Steps are interleaved, so that whatever else the machine does hits all methods
    alike, and the ratio is the median over the rounds.
    """
    states = {trainer: trainer.init(seed=0) for trainer in trainers}

    def step(trainer: Trainer) -> Any:
        data = trainer.data
        states[trainer] = trainer.step(states[trainer], data.images, data.labels)
        return states[trainer]

    seconds = interleaved(
        {t.method.name: functools.partial(step, t) for t in trainers}, _TIMING_ROUNDS
    )
    first = seconds[trainers[0].method.name]
    return {name: median_ratio(times, first) for name, times in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
