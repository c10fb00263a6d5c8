"""The chart of how well samples represent their batch: the gradient's error.

Narrow, with each name above its values, so that it can be read on a phone.
"""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from reports.tables import percent
from reports.theme import COLOURS, style_bars

Report = dict[str, Any]

_ROW = 0.46  # height of a sampler in inches
_SIZES = 2  # batch sizes drawn, the largest
_FAMILIES = {"Lattice": COLOURS[0], "Feature": COLOURS[1], "Batch": COLOURS[2]}
_FAMILIES["Naive"] = COLOURS[3]


def figure(report: Report, ink: str, soft: str) -> Figure:
    """Draws the errors on a logarithmic axis: a line a sampler, the best first."""
    sizes = sorted({row["batch_size"] for row in report["results"]}, reverse=True)
    sizes = sizes[:_SIZES]
    rows = [row for row in report["results"] if row["batch_size"] in sizes]
    first = [row for row in rows if row["batch_size"] == sizes[0]]
    first.sort(key=lambda row: row["gradient"])
    figure = Figure(figsize=(5.4, _ROW * len(first) + 1.15), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    values = [row["gradient"] for row in rows]
    low, high = min(values) / 1.5, max(1.0, *values) * 1.5
    axes.set_xlim(low, high)
    axes.set_ylim(len(first) - 0.3, -0.75)
    for place, row in enumerate(first):
        _sampler(axes, place, row, rows, ink, soft)
    axes.axvline(1, color=ink, linestyle="--", linewidth=1)
    style_bars(axes, "", ink, soft)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(
        "error of the gradient, relative to the noise of batches (dashed):\n"
        f"less is better; measured shares are those of batch {sizes[0]}",
        color=ink,
        fontsize=9.5,
    )
    styles: Any = [{"markerfacecolor": ink}, {"markerfacecolor": "none"}]
    handles = [
        Line2D([], [], color=ink, linestyle="", marker="o", **style, label=f"batch {n}")
        for n, style in zip(sizes, styles, strict=False)
    ]
    others: Any = {"marker": "s", "linestyle": "", "label": "grey: for comparison"}
    handles.append(Line2D([], [], color=soft, **others))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        labelcolor=ink,
        fontsize=9.5,
        handletextpad=0.2,
    )
    return figure


def _sampler(
    axes: Axes,
    place: int,
    row: dict[str, Any],
    rows: list[dict[str, Any]],
    ink: str,
    soft: str,
) -> None:
    """Draws a line: the name and the measured share, below them the values."""
    name = row["sampler"]
    colour = next((c for key, c in _FAMILIES.items() if name.startswith(key)), soft)
    own = [each for each in rows if each["sampler"] == name]
    low, high = axes.get_xlim()
    axes.plot([low, high], [place, place], color=soft, alpha=0.25, linewidth=1)
    for each, filled in zip(own, (True, False), strict=False):
        value, error = each["gradient"], each["gradient_error"]
        axes.errorbar(
            value,
            place,
            xerr=error if error > 0.1 * value else None,
            fmt="o",
            markersize=8,
            color=colour,
            markerfacecolor=colour if filled else "none",
            markeredgewidth=1.8,
            elinewidth=1.2,
        )
    above: Any = {"va": "center", "fontsize": 9.5}
    across = axes.get_yaxis_transform()
    axes.text(0, place - 0.42, name, transform=across, color=ink, **above)
    share = f"{percent(row['measured'])} measured"
    axes.text(1, place - 0.42, share, transform=across, color=soft, ha="right", **above)
