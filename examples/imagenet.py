"""Trains an ImageNet classifier for days, on many devices, and can be stopped any time.

Images come from a folder or ArrayRecord files; logs for TensorBoard and checkpoints go
to --out. The same command goes on where an earlier one ended, however it ended.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import flax_sbn as sbn
import methods
import processes
from checkpoints import CheckpointError, Checkpoints
from comparison import new_folder
from data import DataError
from learning import Learner, Model, Task, Totals
from logs import Log
from measuring import check_positive
from networks import Settings, Variables
from optimizers import learning_rate
from options import COUNTS, add_settings, settings_of
from pipeline import MEAN, STD, Batch, DiskInput, FakeInput, Input, find

_DEFAULT = Settings(
    model="resnet50",
    batch_size=256,
    epochs=90,
    warmup=0.05,
    weight_decay=1e-4,
    label_smoothing=0.1,
    dtype="bfloat16",
)


class DivergedError(Exception):
    """Parameters are not finite any more."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n"
        "  imagenet.py DIR --out runs/fs                   # all devices there are\n"
        "  imagenet.py DIR --out runs/fs --norm bn         # batch norm, instead\n"
        "  imagenet.py DIR --out runs/fs --distributed     # in a Slurm job or pod\n"
        "  imagenet.py --fake-data --max-steps 200         # speed without input\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="folder with train/CLASS/* and val/CLASS/*, image files; or with "
        "ArrayRecord files *train*.array_record* and *val*.array_record*",
    )
    data.add_argument(
        "--fake-data", action="store_true", help="noise that is in memory instead"
    )
    data.add_argument(
        "--num-classes", type=int, metavar="N", help="of ArrayRecord files"
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
        help="end with an error where an image cannot be read, or take the next one "
        "and count (default: %(default)s)",
    )
    data.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="that read and decode in each process (default: %(default)s)",
    )

    how = parser.add_argument_group("how to train")
    how.add_argument(
        "--norm",
        default="fs:1/64",
        metavar="NAME",
        help="as in train.py, or a sampler as in Python (default: %(default)s)",
    )
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="(default: %(default)s)"
    )
    add_settings(how, _DEFAULT)
    how.add_argument(
        "--max-steps", type=int, metavar="N", help="end after this step of the schedule"
    )

    where = parser.add_argument_group("where")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder, or that of a training to go on with (default: a new one "
        "under runs/, named by the time)",
    )
    for option, default, help_text in (
        ("checkpoint-every", 1000, "steps between checkpoints, besides each epoch's"),
        ("keep", 3, "last checkpoints that are kept, besides the best"),
        ("log-every", 20, "steps between entries of the log"),
    ):
        where.add_argument(
            f"--{option}",
            type=int,
            default=default,
            metavar="N",
            help=f"{help_text} (default: %(default)s)",
        )
    where.add_argument(
        "--devices", type=int, metavar="N", help="(default: all there are)"
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


class State(NamedTuple):
    """All that a training is, on every device."""

    model: Model
    key: jax.Array
    step: jax.Array  # number of those done
    skipped: jax.Array  # images that could not be read so far


class Training:
    """A training that may end and go on at any step."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        """Checks that all fits together, without computing anything.

        Raises:
          DataError: if there are no images, ...
          ValueError: if the settings do not fit each other.
        """
        self.args, self.console = args, console
        settings = settings_of(args)
        method = methods.parse(args.norm)
        method = method.fold() if args.fold else method
        if method.copies > 1:
            raise ValueError(
                "Expected a norm without batch augmentation, which train.py has, got "
                f"{args.norm!r}."
            )
        self.mesh = processes.make_mesh(args.devices)
        self.input = make_input(args)
        self.epoch = self.input.num_images // settings.batch_size  # in steps
        if not self.epoch:
            raise ValueError(
                f"Expected at most the {self.input.num_images} training images in a "
                f"batch, got batch_size={settings.batch_size}."
            )
        shape = (args.image_size, args.image_size, 3)
        task = Task(shape, self.input.num_classes, MEAN, STD)
        self.learner = Learner(settings, method, task, self.epoch, self.mesh)
        self.rate = learning_rate(settings, method, self.epoch)
        self.last = min(settings.epochs * self.epoch, args.max_steps or sys.maxsize)
        jit = functools.partial(jax.jit, out_shardings=processes.everywhere(self.mesh))
        self._init = jit(self._initial)
        self._step = jit(self._next, donate_argnums=0)
        self._count = jit(self._correct)
        self._finite = jit(_all_finite)

    @property
    def settings(self) -> dict[str, Any]:
        """What a training must have in common with one that it continues."""
        return {
            **dataclasses.asdict(self.learner.settings),
            **{name: vars(self.args)[name] for name in ("norm", "fold", "seed")},
            "image_size": self.args.image_size,
            "unreadable": self.args.unreadable,
            "train_images": self.input.num_images,
            "num_classes": self.input.num_classes,
            "flax_sbn": sbn.__version__,
        }

    def run(self, folder: Path, checkpoints: Checkpoints) -> int:
        """Trains from the newest checkpoint on; returns the exit status.

        Raises:
          CheckpointError: if there are checkpoints that cannot be used.
          DataError: if an image cannot be read.
          DivergedError: if parameters become infinite or NaN; the checkpoints are those
            from before.
        """
        state = self._init(jax.random.key(self.args.seed), self._placeholder())
        state = checkpoints.restore(state) or state
        begin = int(state.step)
        if begin:
            self.console.print(f"Goes on after step {begin:,} of {self.last:,}.")
        steps = range(begin + 1, self.last + 1)
        batches = self.input.train(begin) if steps else ()
        with processes.Stop() as stop, self._log(folder, steps) as log:
            for step, batch in zip(steps, batches, strict=False):
                state, totals = self._step(state, *self._on_devices(batch))
                log.add(step, totals)
                top1, last = None, step == self.last
                if last or step % self.epoch == 0:
                    top1 = self._evaluate(state, step, log)
                ending = stop.asked(step)
                due = last or step % self.args.checkpoint_every == 0
                if due or ending or top1 is not None:
                    log.flush()
                    self._check(state, step)
                    checkpoints.save(step, state, top1)
                if ending:
                    break
            checkpoints.wait()
        if skipped := int(state.skipped):
            self.console.print(f"{skipped:,} times an image could not be read.")
        if stop.signal is None:
            return 0
        self.console.print("Stopped; the same command goes on.")
        return 130 if stop.signal == signal.SIGINT else 0

    def _log(self, folder: Path, steps: range) -> Log:
        return Log(
            folder,
            self.console,
            self.args.norm,
            steps=steps,
            epoch=self.epoch,
            batch_size=self.learner.settings.batch_size,
            every=self.args.log_every,
            learning_rate=self.rate,
        )

    def _check(self, state: State, step: int) -> None:
        if not self._finite(state.model):
            raise DivergedError(
                f"The parameters are not finite after step {step:,}. The checkpoints "
                "are from before. Lower the learning rate, or train in float32."
            )

    def _initial(self, key: jax.Array, images: jax.Array) -> State:
        key, init_key = jax.random.split(key)
        zero = jnp.zeros((), jnp.int32)
        return State(self.learner.init(init_key, images), key, zero, zero)

    def _placeholder(self) -> Any:
        """Returns the images that methods start from which start from data."""
        if self.learner.method.starts_from_data:
            return self._on_devices(next(self.input.train(0)))[0]
        return ()

    def _next(
        self,
        state: State,
        images: jax.Array,
        labels: jax.Array,
        skipped: jax.Array,
    ) -> tuple[State, Totals]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        model, totals = self.learner.update(state.model, images, labels, *keys)
        skipped = state.skipped + skipped.sum()
        return State(model, state.key, state.step + 1, skipped), totals

    def _correct(
        self, variables: Variables, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """Returns how many labels are first, among the first five, and there at all."""
        logits = self.learner.evaluate(variables, images)
        _, order = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = order == labels[:, None]
        return jnp.stack([hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])

    def _evaluate(self, state: State, step: int, log: "Log") -> float | None:
        """Returns the accuracy, or None where there are no images to evaluate."""
        counts = np.zeros(3, int)
        for batch in self.input.test():
            counts += self._count(state.model.variables, *self._on_devices(batch))
        first, five, images = counts
        if not images:
            return None
        log.write(step, {"test/top1": first / images, "test/top5": five / images})
        self.console.print(
            f"epoch {step / self.epoch:.4g}: top-1 {first / images:.2%}, top-5 "
            f"{five / images:.2%} of {images:,} images"
        )
        return float(first / images)

    def _on_devices(self, batch: Batch) -> list[jax.Array]:
        """Returns this process's part of a batch as part of an array over all."""
        rows = processes.by_rows(self.mesh)
        return [
            jax.make_array_from_process_local_data(rows, array)
            for array in batch.values()
        ]


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


def _all_finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status."""
    args = parse(argv)
    console = Console(quiet=not processes.is_first())
    problem, folder = None, args.out
    try:
        training = Training(args, console)
        if processes.is_first():
            folder = open_folder(args)
    except (DataError, ValueError, FileExistsError) as error:
        problem = str(error)
    settings = {k: v for k, v in vars(args).items() if k != "distributed"}
    if problem := processes.agree(settings, problem):
        return fail(problem, 2)
    console.print(f"Logs and checkpoints: {folder}")
    with contextlib.closing(
        Checkpoints(folder / "checkpoints", training.settings, args.keep)
    ) as checkpoints:
        try:
            return training.run(folder, checkpoints)
        except (CheckpointError, DataError) as error:
            return fail(str(error), 2)
        except DivergedError as error:
            return fail(str(error), 1)


def fail(message: str, status: int) -> int:
    """Says why, and returns the exit status."""
    print(f"imagenet.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
