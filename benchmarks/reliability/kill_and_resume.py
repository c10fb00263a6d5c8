"""Kills training runs at random moments, restarts them, and compares the results.

One training run of examples/imagenet.py, on real digits written as image files, is left
alone. Others with the same settings are killed again and again, mostly with SIGKILL,
which no program can handle, and restarted. In the end each must have the same loss in
every step and the same parameters, bit for bit. Writes JSON.
"""

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.command_line import Parser  # first: it says which package is missing

# isort: split
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from harness.data import load_digits
from harness.measuring import add_counts, check_positive, describe_device
from speed import timing

_SCRIPT = Path(__file__).parents[2] / "examples" / "imagenet.py"
_OPTIONS = (
    *("--norm", "fs:1/16+vdn:4", "--model", "resnet8", "--width", "8"),
    *("--image-size", "16", "--batch-size", "16", "--dtype", "float32"),
    *("--checkpoint-every", "7", "--log-every", "1", "--threads", "2"),
)
_TERMINATED = 5  # every so many is asked to end, by SIGTERM
_SLOWEST_START = 120.0  # seconds


@dataclasses.dataclass
class Result:
    """One training that was interrupted.

    Attributes:
      killed: times that it got SIGKILL.
      terminated: times that it got SIGTERM.
      half_written: kills that left a checkpoint behind that was not whole.
      steps: in all.
      repeated: steps done more than once.
      missing: steps without a loss in the log.
      differing: steps with another loss than in the training without interruption.
      parameters_equal: whether the last checkpoints are the same, bit for bit.
      bad_exits: exits after SIGTERM with another status than 0.
    """

    killed: int = 0
    terminated: int = 0
    half_written: int = 0
    steps: int = 0
    repeated: int = 0
    missing: int = 0
    differing: int = 0
    parameters_equal: bool = False
    bad_exits: int = 0

    @property
    def lost(self) -> bool:
        """Whether anything was."""
        bad = self.missing or self.differing or self.bad_exits
        return bool(bad) or not self.parameters_equal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the trials; returns 1 if anything was lost."""
    parser = Parser(__doc__)
    add_counts(
        parser,
        trials=(50, "interruptions in all"),
        epochs=(12, "passes over the images in a training run"),
        seed=(0, "seed of the moments of interruption"),
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        metavar="X",
        help="longest time from a start to a kill (default: %(default)s)",
    )
    timing.add_file_argument(parser)
    args = parser.parse_args(argv)
    check_positive(parser, args, "trials", "epochs")
    args.json = timing.new_path(parser, args.json, "kill_and_resume")
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    report = {
        "benchmark": "kill_and_resume",
        "what": "training runs that were killed at random moments and started again",
        "options": " ".join(_OPTIONS),
        **describe_device(),
        "results": [dataclasses.asdict(result) for result in results],
    }
    timing.write(args.json, report)
    for result in results:
        print(result)
    print(f"Numbers: {args.json}")
    return int(any(result.lost for result in results))


def run(args: argparse.Namespace, folder: Path) -> list[Result]:
    """Returns what became of the training runs, which all end."""
    write_images(folder / "images")
    command = [
        *(sys.executable, str(_SCRIPT), str(folder / "images"), *_OPTIONS),
        *("--epochs", str(args.epochs), "--out"),
    ]
    rng = random.Random(args.seed)
    whole = folder / "whole"
    finish([*command, str(whole)])
    results: list[Result] = []
    trials = 0
    with progress_bar() as bar:
        task = bar.add_task("interruptions", total=args.trials)
        while trials < args.trials:
            out, result = folder / f"training-{len(results)}", Result()
            results.append(result)
            while trials < args.trials:
                if not interrupt([*command, str(out)], out, args.seconds, rng, result):
                    break
                trials += 1
                bar.update(task, completed=trials)
            finish([*command, str(out)])
            compare(result, whole, out)
    return results


def write_images(folder: Path) -> None:
    """Writes scikit-learn's digits as files, as ImageNet's are."""
    digits = load_digits()
    for split, images, labels in (
        ("train", digits.train_images, digits.train_labels),
        ("val", digits.test_images, digits.test_labels),
    ):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] * 15).save(path)


def interrupt(
    command: list[str], out: Path, seconds: float, rng: random.Random, result: Result
) -> bool:
    """Starts a training and ends it after a random time; False if it was done before.

    The time begins with the log, just before the first step.
    """
    logs = len(events(out))
    process = start(command)
    begin = time.monotonic()
    while len(events(out)) == logs:
        if process.poll() is not None:
            check_done(process)
            return False
        if time.monotonic() - begin > _SLOWEST_START:
            process.kill()
            raise TimeoutError(f"No step within {_SLOWEST_START} s: {command}")
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, seconds))
    if process.poll() is not None:
        check_done(process)
        return False
    if rng.randrange(_TERMINATED) == 0:
        process.send_signal(signal.SIGTERM)
        result.terminated += 1
        result.bad_exits += process.wait() != 0
    else:
        process.send_signal(signal.SIGKILL)
        process.wait()
        result.killed += 1
        result.half_written += any((out / "checkpoints").glob("*tmp*"))
    return True


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    """Starts a training; programs compiled once serve all of them."""
    cache = Path(command[-1]).parent / "compiled"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(command: list[str]) -> None:
    """Trains to the end."""
    process = start(command)
    process.wait()
    check_done(process)


def check_done(process: "subprocess.Popen[bytes]") -> None:
    """Raises an error if a training failed by itself."""
    if process.returncode:
        raise RuntimeError(f"Exit status {process.returncode}: {process.args!r}")


def compare(result: Result, whole: Path, out: Path) -> None:
    """Fills in what differs between two training runs."""
    expected, found = losses(whole), losses(out)
    result.steps = len(expected)
    result.repeated = sum(len(values) > 1 for values in found.values())
    result.missing = len(expected.keys() - found.keys())
    result.differing = sum(
        {*values} != {*expected.get(step, ())} for step, values in found.items()
    )
    result.parameters_equal = parameters(whole) == parameters(out)


def events(out: Path) -> list[Path]:
    """Returns the files of a log."""
    return [*out.glob("events.*")]


def losses(out: Path) -> dict[int, list[float]]:
    """Returns all losses that a training logged, by step."""
    log = event_accumulator.EventAccumulator(
        str(out),
        size_guidance={event_accumulator.TENSORS: 0},
        purge_orphaned_data=False,
    )
    log.Reload()
    found: dict[int, list[float]] = {}
    for event in log.Tensors("train/loss"):
        loss = float(tensor_util.make_ndarray(event.tensor_proto))
        found.setdefault(event.step, []).append(loss)
    return found


def parameters(out: Path) -> Any:
    """Returns the bytes of all arrays of the last checkpoint."""
    folder = (out / "checkpoints").absolute()
    last = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    with ocp.StandardCheckpointer() as checkpointer:
        model = checkpointer.restore(folder / str(last) / "state")["model"]
    return last, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]


def progress_bar() -> Progress:
    """Returns the bar of the trials."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )


if __name__ == "__main__":
    sys.exit(main())
