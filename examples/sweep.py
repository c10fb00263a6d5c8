"""Trains every combination of a grid, and resumes where it was stopped.

Each option takes one value or several, here or in a TOML file; every combination of
them is trained and leaves one JSON line in the results file. Killed at any moment and
started again with the same file, the sweep trains what is missing and nothing twice.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from harness import grid, journal, tasks
from harness.command_line import Parser
from harness.data import DataError
from harness.grid import Experiment, experiment_of, setting_of, varied
from harness.journal import JournalError, Record
from harness.measuring import check_positive, describe_device
from harness.options import help_of
from harness.progress import outcome
from harness.training import DeviceData, Trainer, to_device


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(
        __doc__,
        epilog="examples:\n"
        "  sweep.py --norm bn bs:4 fs:1/64 --seed 0 1 2 --results digits.jsonl\n"
        "  sweep.py --grid study.toml --seed 0 --results study.jsonl --jobs 2\n",
    )
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        metavar="FILE",
        help="file of JSON lines: training runs that it has are not repeated, and "
        "new ones are added",
    )
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE",
        help="TOML file with the options below; the command line overrides it",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with CIFAR-10, for the dataset cifar10",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="training runs at a time, each in its own process (default: 1)",
    )
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="seeds of one setting that train together, by vmap: "
        "faster for dense layers, slower for convolutions (default: 1)",
    )
    options = parser.add_argument_group("the grid", "Each takes one value or several.")
    default = Experiment()
    for name in grid.OPTIONS:
        options.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            type=_value,
            metavar="X",
            help=help_of(name, getattr(default, name)),
        )
    args = parser.parse_args(argv)
    check_positive(parser, args, "jobs", "together")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing of the sweep and returns the exit status."""
    args = parse(argv)
    console = Console()
    try:
        table = grid.read(args.grid) if args.grid else {}
        given = {n: getattr(args, n) for n in grid.OPTIONS if getattr(args, n)}
        wanted = grid.experiments(table, **given)
        # Nothing is checked twice, nor made where something cannot be trained.
        done = journal.read(args.results) if args.results.exists() else []
        check(missing(wanted, done), args.data_dir)
        with journal.opened(args.results) as results:
            if results.message:
                console.print(results.message)
            return run(wanted, results, args, console)
    except (DataError, JournalError, ValueError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2


def check(wanted: list[Experiment], data_dir: Path | None) -> None:
    """Complains about what could not be trained, before anything is."""
    for setting in dict.fromkeys(map(setting_of, wanted)):
        make_trainer(setting, data_dir)


def missing(wanted: list[Experiment], records: list[Record]) -> list[Experiment]:
    """Returns the experiments that are not among the results yet."""
    done = set(map(experiment_of, records))
    return [experiment for experiment in wanted if experiment not in done]


def run(
    wanted: list[Experiment],
    results: journal.Journal,
    args: argparse.Namespace,
    console: Console,
) -> int:
    """Trains what is not among the results yet."""
    todo = missing(wanted, results.records)
    before = len(wanted) - len(todo)
    status = 0
    if not todo:
        console.print(f"All {len(wanted)} training runs are in {args.results} already.")
    elif before:
        console.print(f"{before} of {len(wanted)} training runs are in {args.results}.")
    progress = progress_bar(console)
    task = progress.add_task("", total=len(wanted), completed=before)

    def shown() -> Group:
        return Group(summary(results.records, wanted), progress)

    with Live(get_renderable=shown, console=console, transient=True) as live:
        try:
            advance = functools.partial(progress.advance, task)
            for record in trained(todo, args, advance):
                results.append(record)
                options = record["experiment"]
                accuracy = f"test accuracy {record['test_accuracy'][-1]:.1%}"
                live.console.print(
                    ", ".join(f"{name} {options[name]}" for name in varied(wanted))
                    + f": {'diverged' if diverged(record) else accuracy}, "
                    f"{record['seconds']:.0f} s"
                )
                before += 1
                progress.update(task, completed=before)
        except KeyboardInterrupt:
            status = 130
    if status:
        console.print("Interrupted; start it again to go on.")
    if before:
        console.print(summary(results.records, wanted))
    return status


def trained(
    todo: list[Experiment],
    args: argparse.Namespace,
    advance: Callable[[float], None],
) -> Iterator[Record]:
    """Yields the results of the experiments as they come."""
    groups: list[list[Experiment]] = []
    for _, seeds in itertools.groupby(todo, setting_of):
        same = list(seeds)
        for i in range(0, len(same), args.together):
            groups.append(same[i : i + args.together])
    if args.jobs == 1:
        for group in groups:
            yield from train(group, args.data_dir, advance)
        return
    # Each process would take most of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, context, initializer=_end_with_parent
    ) as pool:
        futures = [pool.submit(train, group, args.data_dir) for group in groups]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield from future.result()
        except BaseException:  # as GeneratorExit: what was not begun will not be
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process with the one that started it, and does not train on alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def train(
    experiments: Sequence[Experiment],
    data_dir: Path | None,
    advance: Callable[[float], None] | None = None,
) -> list[Record]:
    """Trains a setting with one seed or several, and returns the result of each.

    Args:
      experiments: different in their seeds only.
      data_dir: see :func:`load`.
      advance: told after each epoch how many training runs that was.
    """
    trainer = make_trainer(setting_of(experiments[0]), data_dir)
    begin = time.monotonic()
    seeds = [experiment.seed for experiment in experiments]
    epochs = []
    for now in trainer.train_together(seeds):
        if now[0].done:
            epochs.append(now)
            if advance:
                advance(len(seeds) / trainer.settings.epochs)
    speeds = [now[0].images_per_second for now in epochs]
    rates = [speed for speed in speeds if speed is not None]
    common = {
        "seconds": (time.monotonic() - begin) / len(seeds),
        "images_per_second": statistics.median(rates) if rates else None,
        "together": len(seeds),
        "measured": trainer.learner.measured,
        **describe_device(),
    }
    curves = zip(*epochs, strict=True)
    return [
        {
            "experiment": dataclasses.asdict(experiment),
            "train_loss": [epoch.loss for epoch in curve],
            "train_accuracy": [epoch.accuracy for epoch in curve],
            "test_accuracy": [epoch.test_accuracy for epoch in curve],
            "best_test_accuracy": max(epoch.test_accuracy or 0.0 for epoch in curve),
            **common,
        }
        for experiment, curve in zip(experiments, curves, strict=True)
    ]


# Each is read once.
_whole = functools.cache(tasks.load)


@functools.lru_cache(maxsize=1)
def make_trainer(setting: Experiment, data_dir: Path | None) -> Trainer:
    """Returns what trains a setting with any seed, compiled once for all of them."""
    data = load(setting.dataset, data_dir, setting.train_size, setting.image_size)
    return Trainer(setting, setting.method(), data)


@functools.lru_cache(maxsize=1)
def load(
    name: str, data_dir: Path | None, train_size: int | None, image_size: int | None
) -> DeviceData:
    """Returns images on the device, once for all settings that share them."""
    dataset = _whole(name, data_dir).limited(train_size)
    return to_device(dataset.resized(image_size) if image_size else dataset)


def diverged(record: Record) -> bool:
    """Whether the loss is not finite in the end."""
    return not math.isfinite(record["train_loss"][-1])


def summary(records: list[Record], wanted: list[Experiment]) -> Table:
    """Returns a row a setting: mean and spread over its seeds so far."""
    done: dict[Experiment, list[Record]] = {
        setting_of(experiment): [] for experiment in wanted
    }
    asked = set(wanted)
    for record in records:
        experiment = experiment_of(record)
        if experiment in asked:
            done[setting_of(experiment)].append(record)
    names = varied(list(done))
    table = Table()
    for name in names:
        table.add_column(name)
    table.add_column("seeds", justify="right")
    table.add_column("test accuracy", justify="right")
    for setting, found in done.items():
        ended = [r["test_accuracy"][-1] for r in found if not diverged(r)]
        table.add_row(
            *(str(getattr(setting, name)) for name in names),
            str(len(found)),
            outcome(
                statistics.mean(ended) if ended else None,
                statistics.stdev(ended) if len(ended) > 1 else None,
                len(found) - len(ended),
            ),
        )
    return table


def progress_bar(console: Console) -> Progress:
    """Returns a bar for the whole grid."""
    return Progress(
        BarColumn(bar_width=32),
        TextColumn("{task.completed:.1f} of {task.total:.0f} training runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _value(text: str) -> Any:
    """Reads a value as TOML would, or else as a string."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
