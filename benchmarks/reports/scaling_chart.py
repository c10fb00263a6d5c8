"""The chart of what many devices send: bytes, those due to the norm, and how often.

A row of panels for each target and model. Bars are of the most devices there are; a
stroke in each is of fewer.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter

from reports.theme import COLOURS, style_bars

Report = dict[str, Any]
Row = dict[str, Any]

_REFERENCE = "no norm, jit"
_WAYS = {
    "jit": "jit: statistics of the batch",
    "own": "shard_map: of a device's own rows",
    "pooled": "shard_map, axis_name: of all devices",
}
_SLOTS = 3.6  # bars of a method, and the gap to the next
_SLOT = 0.2  # height of a bar in inches


class Panel(NamedTuple):
    """A panel.

    Attributes:
      title: says what the values are.
      value: of a row, given that of as many devices without a norm.
      text: format of a value.
      logarithmic: whether the axis is.
    """

    title: str
    value: Callable[[Row, Row], float]
    text: str
    logarithmic: bool = False


_PANELS = (
    Panel(
        "MB sent by a device in a step",
        lambda row, without: row["sent_bytes"] / 1e6,
        "{:.1f}",
    ),
    Panel(
        "MB more than without a norm",
        lambda row, without: (row["sent_bytes"] - without["sent_bytes"]) / 1e6,
        "{:.2f}",
        logarithmic=True,
    ),
    Panel(
        "collectives in a step",
        lambda row, without: sum(row["kinds"].values()),
        "{:.0f}",
    ),
)


def cases(report: Report) -> dict[str, list[Row]]:
    """Returns by title what can be drawn: steps of many devices, and one norm-free."""
    found: dict[str, list[Row]] = {}
    for row in report["results"]:
        if row["devices"] > 1 and row["error"] is None:
            title = "{model} on {target}, {batch_size} images a device".format(**row)
            found.setdefault(title, []).append(row)
    return {
        title: kept
        for title, rows in found.items()
        if (kept := [row for row in rows if row["devices"] in _references(rows)])
    }


def figure(report: Report, ink: str, soft: str) -> Figure:
    """Draws a report of scaling.py in the two inks of a theme."""
    shown = cases(report)
    heights = [_SLOT * (len(_methods(rows)) * _SLOTS + 6) for rows in shown.values()]
    drawn = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    parts = drawn.subfigures(len(shown), squeeze=False, height_ratios=heights)
    for part, (title, rows) in zip(parts[:, 0], shown.items(), strict=True):
        part.set_facecolor("none")
        part.suptitle(title, color=ink, fontsize=10.5)
        for axes, panel in zip(part.subplots(1, 3, sharey=True), _PANELS, strict=True):
            _draw(axes, panel, rows, ink)
            style_bars(axes, panel.title, ink, soft)
        _legend(part, rows, ink)
    return drawn


def _references(rows: list[Row]) -> dict[int, Row]:
    """Returns what is sent without a norm, by number of devices."""
    return {row["devices"]: row for row in rows if row["variant"] == _REFERENCE}


def _legend(part: Any, rows: list[Row], ink: str) -> None:
    counts = sorted({row["devices"] for row in rows})
    handles: list[Any] = [
        Patch(color=colour, label=label)
        for colour, label in zip(COLOURS, _WAYS.values(), strict=False)
    ]
    fewer = " and ".join(map(str, counts[:-1]))
    if fewer:
        label = f"{fewer} devices (bars: {counts[-1]})"
        stroke: dict[str, Any] = {"marker": "|", "markersize": 10, "linestyle": "none"}
        handles.append(Line2D([], [], color=ink, label=label, **stroke))
    part.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=ink,
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"].rpartition(", ")[0] for row in rows))


def _draw(axes: Axes, panel: Panel, rows: list[Row], ink: str) -> None:
    methods = _methods(rows)
    counts = sorted({row["devices"] for row in rows})
    without = _references(rows)
    values = []
    for row in rows:
        method, _, way = row["variant"].rpartition(", ")
        place = list(_WAYS).index(way)
        y = methods.index(method) + (place - 1) / _SLOTS
        value = panel.value(row, without[row["devices"]])
        if panel.logarithmic and value <= 0:
            continue
        values.append(value)
        if row["devices"] < counts[-1]:
            axes.plot([value] * 2, [y - 0.11, y + 0.11], color=ink, linewidth=1.2)
            continue
        if panel.logarithmic:  # where bars have no length
            axes.plot(value, y, "o", color=COLOURS[place])
        else:
            axes.barh(y, value, height=0.9 / _SLOTS, color=COLOURS[place])
        axes.annotate(
            panel.text.format(value),
            (value, y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=ink,
        )
    low, high = min(values, default=0.1), max(values, default=1.0)
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(low)), 4 * high)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.grid(axis="x", color=ink, alpha=0.15)
    else:
        axes.set_xlim(0, 1.2 * high)
    axes.set_yticks(range(len(methods)), methods, fontsize=9.5)
    axes.set_ylim(len(methods) - 0.5, -0.5)
