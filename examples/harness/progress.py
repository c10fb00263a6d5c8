"""What a training shows in the terminal: a bar, how it goes, how it ended."""

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class _OverNumbers(Progress):
    """Bars with a line below each for its ``numbers``: 80 columns hold no more."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yields what is shown."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield f"  {task.fields['numbers']}"


def numbers(
    epoch: str, loss: float, accuracy: float, images_per_second: float | None
) -> str:
    """Says how a training goes; the speed once it is known."""
    speed = f"  {images_per_second:,.0f} images/s" if images_per_second else ""
    return f"epoch {epoch}  loss {loss:.3f}  train acc {accuracy:.1%}{speed}"


def outcome(accuracy: float | None, spread: float | None, diverged: int) -> str:
    """Returns the accuracy of some training runs for a table, or that they diverged.

    Args:
      accuracy: the mean of those that did not diverge; None if there are none.
      spread: their standard deviation; None of a single one.
      diverged: how many others there are.
    """
    if accuracy is None:
        return "diverged" if diverged else "-"
    return (
        f"{accuracy:.1%}"
        + (f" ± {spread:.1%}" if spread is not None else "")
        + (f", {diverged} diverged" if diverged else "")
    )


def progress_bar(console: Console) -> Progress:
    """Returns a bar that shows a run, its ``numbers``, and the time left."""
    return _OverNumbers(
        TextColumn("{task.description}", table_column=Column()),  # wraps, if any does
        BarColumn(bar_width=24, table_column=Column(no_wrap=True)),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
