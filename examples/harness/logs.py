"""Progress of a long training: in the terminal, and in a file for TensorBoard."""

import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from tensorboard.summary import Writer

from harness import processes
from harness.learning import Totals
from harness.progress import numbers, progress_bar

_AHEAD = 2  # steps that are given to the devices before the first of them has ended


class Accuracy(NamedTuple):
    """Shares of so many images whose label comes first, or among the first five."""

    top1: float
    top5: float
    images: int


class Log:
    """What became of the steps; the first process writes an entry in so many."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        title: str,
        *,
        steps: range,
        epoch: int,
        batch_size: int,
        every: int,
        learning_rate: Callable[[int], Any],
    ) -> None:
        """Opens a new file.

        Args:
          folder: for the file.
          console: for the bar.
          title: of the bar.
          steps: that are to come.
          epoch: number of steps of an epoch.
          batch_size: images in a step.
          every: steps from one entry to the next.
          learning_rate: by number of steps done.
        """
        self.epoch, self.batch_size, self.every = epoch, batch_size, every
        self.learning_rate = learning_rate
        self._writer = Writer(str(folder)) if processes.is_first() else None
        self._pending: collections.deque[tuple[int, Totals]] = collections.deque()
        self._console, self._bar = console, progress_bar(console)
        self._task = self._bar.add_task(
            title, numbers="compiling", total=steps.stop - 1, completed=steps.start - 1
        )
        self._seconds: list[float] = []  # of each step, but for the first: it compiles
        self._entered = 0  # how many of them are in the file
        self._before: float | None = None
        self._last: tuple[int, Totals] | None = None

    def __enter__(self) -> "Log":
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends bar and file, whatever happened."""
        self._bar.stop()
        if self._writer:
            self._writer.close()

    def add(self, step: int, totals: Totals) -> None:
        """Takes what a step gives, and waits for one some steps before."""
        self._pending.append((step, totals))
        if len(self._pending) > _AHEAD:
            self._enter(*self._pending.popleft())

    def flush(self) -> None:
        """Returns when all steps are done, and their entries on the disk."""
        while self._pending:
            self._enter(*self._pending.popleft())
        if self._writer:
            self._writer.flush()

    def evaluated(self, step: int, accuracy: Accuracy) -> None:
        """Takes what an evaluation after a flush gives; its time is not counted."""
        self._before = time.monotonic()
        self._write(step, "test", {"top1": accuracy.top1, "top5": accuracy.top5})
        self._console.print(
            f"epoch {step / self.epoch:.4g}: top-1 {accuracy.top1:.2%}, top-5 "
            f"{accuracy.top5:.2%} of {accuracy.images:,} images"
        )

    def summary(self) -> None:
        """Tells a person how the last step went, and how fast all of them were."""
        if self._last:
            step, totals = self._last
            shown = self._shown(step, totals, self._seconds)
            self._console.print(f"step {step:,}: {shown}")

    def _enter(self, step: int, totals: Totals) -> None:
        jax.block_until_ready(totals)
        now = time.monotonic()
        if self._before is not None:
            self._seconds.append(now - self._before)
        self._before, self._last = now, (step, totals)
        if step % self.every:
            return
        seconds = self._seconds[self._entered :]
        self._entered = len(self._seconds)
        loss, accuracy = self._means(totals)
        entry = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.learning_rate(step - 1),
        }
        if speed := self._speed(seconds):
            entry["images_per_second"] = speed
        self._write(step, "train", entry)
        shown = self._shown(step, totals, seconds)
        self._bar.update(self._task, completed=step, numbers=shown)

    def _write(self, step: int, group: str, entry: dict[str, Any]) -> None:
        if self._writer:
            for name, value in entry.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def _shown(self, step: int, totals: Totals, seconds: list[float]) -> str:
        epoch = f"{step / self.epoch:.2f}"
        return numbers(epoch, *self._means(totals), self._speed(seconds))

    def _means(self, totals: Totals) -> tuple[float, float]:
        """Returns loss and accuracy of a step."""
        return (
            float(totals.loss) / self.batch_size,
            float(totals.correct) / self.batch_size,
        )

    def _speed(self, seconds: list[float]) -> float | None:
        return len(seconds) * self.batch_size / sum(seconds) if seconds else None
