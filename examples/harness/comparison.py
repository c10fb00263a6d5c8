"""What a comparison leaves behind: a new folder of numbers and a plot; a table."""

import csv
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from rich.table import Table

from harness.files import replacing
from harness.progress import outcome

# Okabe & Ito's colours, which colour-blind readers tell apart, and two of Tol's. What
# the others are compared with comes first, in the colour of the text.
_COLOURS = (
    *("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9"),
    *("#882255", "#999933"),
)


@dataclasses.dataclass
class Run:
    """One training: its curves by epoch, and whether it went to the end."""

    method: str
    seed: int
    loss: list[float] = dataclasses.field(default_factory=list)
    train_accuracy: list[float] = dataclasses.field(default_factory=list)
    test_accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite in the end."""
        return bool(self.loss) and not math.isfinite(self.loss[-1])


@dataclasses.dataclass
class Report:
    """All results of a comparison so far.

    Attributes:
      folder: where the files go; None for nowhere.
      about: settings, versions and device.
      measured: share of values measured by each method; None where nothing is.
      runs: the training runs so far.
      relative_time: time of a training step relative to the first method's.
    """

    folder: Path | None
    about: dict[str, Any]
    measured: dict[str, float | None]
    runs: list[Run] = dataclasses.field(default_factory=list)
    relative_time: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """Returns what :meth:`write` left in a folder."""
        about = json.loads((folder / "results.json").read_text())
        methods = about.pop("methods")
        runs = [Run(**run) for run in about.pop("runs")]
        for run in runs:
            run.loss = [math.nan if x is None else x for x in run.loss]
        return cls(
            folder,
            about,
            measured={row["method"]: row["measured"] for row in methods},
            runs=runs,
            relative_time={row["method"]: row["relative_time"] for row in methods},
        )

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row a method, from its complete runs if there are any."""
        rows = []
        for method, measured in self.measured.items():
            runs = [run for run in self.runs if run.method == method]
            runs = [run for run in runs if run.complete] or runs
            diverged = sum(run.diverged for run in runs)
            finals = [
                run.test_accuracy[-1]
                for run in runs
                if run.test_accuracy and not run.diverged
            ]
            rows.append(
                {
                    "method": method,
                    "measured": measured,
                    "seeds": sum(run.complete for run in runs),
                    "diverged": diverged,
                    "test_accuracy": statistics.mean(finals) if finals else None,
                    "spread": statistics.stdev(finals) if len(finals) > 1 else None,
                    "relative_time": self.relative_time.get(method),
                }
            )
        return rows

    def write(self) -> None:
        """Writes the files; each is replaced as a whole, so none is ever half there."""
        if self.folder is None:
            return
        results = {
            **self.about,
            "methods": self.rows(),
            "runs": [
                dataclasses.asdict(run)
                | {"loss": [x if math.isfinite(x) else None for x in run.loss]}
                for run in self.runs
            ],
        }
        with replacing(self.folder / "results.json") as path:
            path.write_text(json.dumps(results, indent=2) + "\n")
        with (
            replacing(self.folder / "results.csv") as path,
            path.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(self.rows()[0]))
            writer.writeheader()
            writer.writerows(self.rows())
        if any(map(_drawable, self.runs)):
            with replacing(self.folder / "curves.png") as path:
                self.figure().savefig(path, dpi=130, format="png")

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Returns what the table shows: its header, and a line a method."""
        reference = next(iter(self.measured))
        header = ["method", "values measured", "test accuracy", "seeds"]
        lines = [
            [
                row["method"],
                "-" if row["measured"] is None else f"{row['measured']:.1%}",
                outcome(row["test_accuracy"], row["spread"], row["diverged"]),
                str(row["seeds"]),
                f"{row['relative_time']:.2f}" if row["relative_time"] else "-",
            ]
            for row in self.rows()
        ]
        return [*header, f"time per step / {reference}"], lines

    def table(self) -> Table:
        """Returns the comparison as a table for the terminal."""
        (first, *others), lines = self.cells()
        table = Table(title=f"{self.about['title']}", title_justify="left")
        if self.relative_time and self.about.get("platform") == "cpu":
            table.caption = "A CPU gains no time: see README, What it costs, and saves."
        table.add_column(first, overflow="fold")
        for name in others:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(*line)
        return table

    def figure(self) -> Figure:
        """Draws loss and test error by epoch, in the colours of ``mpl.rcParams``."""
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        axes = figure.subplots(1, 2)
        colours = (mpl.rcParams["text.color"], *_COLOURS)
        # Half an image wrong stands for none on the logarithmic axis.
        least = 0.5 / self.about["test_images"]
        for i, method in enumerate(self.measured):
            runs = [r for r in self.runs if r.method == method and _drawable(r)]
            errors = [[max(1 - a, least) for a in run.test_accuracy] for run in runs]
            for axis, curves in zip(
                axes, ([r.loss for r in runs], errors), strict=True
            ):
                length = min((len(curve) for curve in curves), default=0)
                if length == 0:
                    continue
                values = np.array([curve[:length] for curve in curves])
                epochs = np.arange(1, length + 1)
                colour = colours[i % len(colours)]
                style = "-" if i < len(colours) else "--"
                axis.plot(
                    epochs, values.mean(0), style, color=colour, label=method, lw=1.8
                )
                axis.fill_between(
                    epochs, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0
                )
        for axis, label in zip(axes, ("training loss", "test error"), strict=True):
            axis.set(xlabel="epoch", ylabel=label, yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        first = [run.loss[0] for run in self.runs if _drawable(run)]
        axes[0].set_ylim(top=2 * min(first, default=1.0))  # what fails leaves the axes
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].yaxis.set_minor_formatter(NullFormatter())
        axes[1].legend(
            title="method", frameon=False, bbox_to_anchor=(1, 0.5), loc="center left"
        )
        figure.suptitle(f"{self.about['title']}: mean and range of the seeds")
        return figure


def _drawable(run: Run) -> bool:
    """Whether a run has a curve: a logarithmic axis shows no NaN, nor infinity."""
    return bool(run.loss) and all(map(math.isfinite, run.loss))
