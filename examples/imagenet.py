"""Trains an ImageNet classifier on one or many devices; you can stop it at any time.

Images come from a folder or ArrayRecord files; logs for TensorBoard and checkpoints go
to --out. To resume, run the same command again, however the run ended.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import flax_sbn as sbn
from harness import methods, processes
from harness.checkpoints import CheckpointError, Checkpoints
from harness.command_line import Parser
from harness.data import DataError
from harness.files import new_folder
from harness.measuring import add_counts, check_positive
from harness.networks import Settings
from harness.options import COUNTS, add_option, add_settings, settings_of
from harness.pipeline import DiskInput, FakeInput, Input, find
from harness.resumable import DivergedError, Training

_DEFAULT = Settings(
    model="resnet50",
    batch_size=256,
    epochs=90,
    warmup=0.05,
    weight_decay=1e-4,
    label_smoothing=0.1,
    dtype="bfloat16",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        __doc__,
        epilog="examples:\n"
        "  imagenet.py DIR --out runs/lattice                # all devices\n"
        "  imagenet.py DIR --out runs/lattice --norm bn      # batch norm instead\n"
        "  imagenet.py DIR --out runs/lattice --distributed  # in a Slurm job or pod\n"
        "  imagenet.py --fake-data --max-steps 200           # without input pipeline\n"
        "  imagenet.py --fake-data --max-steps 5 --model resnet8 --image-size 32 \\\n"
        "    --batch-size 8 --dtype float32                  # does it run?\n",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="folder with image files train/CLASS/* and val/CLASS/*, or with "
        "ArrayRecord files *train*.array_record* and *val*.array_record*",
    )
    data.add_argument(
        "--fake-data", action="store_true", help="train on noise in memory instead"
    )
    data.add_argument(
        "--num-classes", type=int, metavar="N", help="classes in ArrayRecord files"
    )
    data.add_argument(
        "--image-size",
        type=int,
        default=224,
        metavar="N",
        help="side of the crops, in pixels (default: %(default)s)",
    )
    data.add_argument(
        "--unreadable",
        choices=("refuse", "skip"),
        default="refuse",
        help="if an image cannot be read: stop with an error, or use the next one "
        "and count (default: %(default)s)",
    )
    data.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads that read and decode, per process (default: %(default)s)",
    )

    how = parser.add_argument_group("how to train")
    add_option(how, "norm", "lattice", metavar="NAME")
    add_option(how, "seed", 0)
    add_settings(how, _DEFAULT)
    how.add_argument(
        "--max-steps", type=int, metavar="N", help="end after this step of the schedule"
    )

    where = parser.add_argument_group("where")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder, or that of a training run to resume (default: a new one "
        "under runs/, named by the time)",
    )
    add_counts(
        where,
        checkpoint_every=(1000, "steps between checkpoints, besides each epoch's"),
        keep=(3, "how many last checkpoints to keep, besides the best"),
        log_every=(20, "steps between entries of the log"),
    )
    where.add_argument(
        "--devices", type=int, metavar="N", help="how many devices (default: all)"
    )
    processes.add_option(where)
    args = parser.parse_args(argv)
    counts = ("num_classes", "image_size", "threads", "max_steps", "checkpoint_every")
    check_positive(parser, args, *counts, "keep", "log_every", "devices", *COUNTS)
    if args.fake_data == (args.data is not None):
        parser.error("give either a folder with images or --fake-data")
    if args.distributed is not None and args.out is None:
        parser.error("--distributed needs --out, a folder that all processes share")
    processes.join(parser, args.distributed)
    return args


def make_input(args: argparse.Namespace) -> Input:
    """Returns what reads the images, or makes them up."""
    if args.fake_data:
        return FakeInput(args.image_size, args.batch_size, args.num_classes or 1000)
    return DiskInput(
        find(args.data, args.num_classes),
        args.image_size,
        args.batch_size,
        args.seed,
        args.threads,
        args.unreadable == "skip",
    )


def open_folder(args: argparse.Namespace) -> Path:
    """Returns the folder of a training: a new one, or one that has checkpoints.

    Raises:
      FileExistsError: if there is something else in it.
    """
    if args.out is None:
        return new_folder(None, f"imagenet-{args.model}")
    checkpoints = args.out / "checkpoints"
    if args.out.exists() and not checkpoints.is_dir() and any(args.out.iterdir()):
        raise FileExistsError(
            f"Expected --out to be a new folder or that of a training, got {args.out}."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    return args.out


def make_training(args: argparse.Namespace) -> Training:
    """Returns the training, all of whose settings fit each other."""
    method = methods.parse(args.norm)
    return Training(
        settings_of(args),
        method.fold() if args.fold else method,
        make_input(args),
        processes.make_mesh(args.devices),
        max_steps=args.max_steps,
    )


def to_continue(args: argparse.Namespace, training: Training) -> dict[str, Any]:
    """Returns what a training must have in common with one that it continues."""
    names = ("norm", "fold", "seed", "image_size", "unreadable")
    return {
        **dataclasses.asdict(training.learner.settings),
        **{name: vars(args)[name] for name in names},
        "train_images": training.input.num_images,
        "num_classes": training.input.num_classes,
        "flax_sbn": sbn.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status."""
    args = parse(argv)
    console = Console(quiet=not processes.is_first())
    problem, folder = None, args.out
    try:
        training = make_training(args)
        if processes.is_first():
            folder = open_folder(args)
    except (DataError, ValueError, FileExistsError) as error:
        problem = str(error)
    if problem := processes.agree(args, problem):
        return fail(problem, 2)
    console.print(f"Logs and checkpoints: {folder}", soft_wrap=True)
    settings = to_continue(args, training)
    with contextlib.closing(
        Checkpoints(folder / "checkpoints", settings, args.keep)
    ) as checkpoints:
        try:
            ended_by = training.run(
                args.seed,
                folder,
                checkpoints,
                console,
                checkpoint_every=args.checkpoint_every,
                log_every=args.log_every,
            )
        except (CheckpointError, DataError) as error:
            return fail(str(error), 2)
        except DivergedError as error:
            return fail(str(error), 1)
    if ended_by is None:
        console.print("Finished.")
        return 0
    console.print("Stopped. Run the same command again to resume.")
    return 130 if ended_by == signal.SIGINT else 0


def fail(message: str, status: int) -> int:
    """Says why, and returns the exit status."""
    print(f"imagenet.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
