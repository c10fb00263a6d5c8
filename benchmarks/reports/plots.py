"""Bar charts of the results: horizontal bars in groups, flax's batch norm at 1."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reports import noise_chart, scaling_chart
from reports.theme import COLOURS, THEMES, Draw, save, style_bars

Report = dict[str, Any]

_ROW = 0.2  # height of a bar in inches
_TRAFFIC = {"HBM traffic": "traffic_bytes", "temporary memory": "temp_bytes"}
_CUT = 3.0  # longer bars are cut; their text tells


class Bar(NamedTuple):
    """A value relative to that of flax's batch norm, and the text beside it."""

    value: float
    text: str


class Chart(NamedTuple):
    """Panels one below the other.

    Attributes:
      axis: what the values are.
      panels: by title, group and series: ``panels[title][group][series]``.
    """

    axis: str
    panels: dict[str, dict[str, dict[str, Bar]]]


def train_step(report: Report) -> Chart:
    """Returns the speed of training steps: a panel a model, at its first batch size."""
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    first: dict[str, int] = {}
    for row in report["results"]:
        model, batch_size = row["model"], row["batch_size"]
        if row["ratio"] is None or first.setdefault(model, batch_size) != batch_size:
            continue
        if row["variant"] != "flax BN":
            speed = 1 / row["ratio"]
            groups = panels.setdefault(f"{model}, batch {batch_size}", {})
            groups[row["variant"]] = {"speed": Bar(speed, f"{speed:.2f}")}
    return Chart("images a second relative to flax's BatchNorm: more is better", panels)


def block(report: Report) -> Chart:
    """Returns each norm's own cost: a group a layer, a bar a variant."""
    groups: dict[str, dict[str, Bar]] = {}
    for row in report["results"]:
        cost = row["own_ratio"]
        if row["variant"] not in ("flax", "conv") and cost is not None:
            bars = groups.setdefault(row["layer"].removeprefix("resnet50-"), {})
            bars[row["variant"]] = Bar(cost, f"{cost:.2f}")
    axis = "time that the norm adds to the convolution, relative to flax's BatchNorm"
    panels = {"blocks of ResNet-50": groups} if groups else {}
    return Chart(f"{axis}: less is better", panels)


def traffic(report: Report) -> Chart:
    """Returns traffic and memory of compiled steps: a group a variant."""
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    flax: dict[str, dict[str, Any]] = {}
    for row in report["results"]:
        case = f"{row['model']} on {row['target']}, batch {row['batch_size']}"
        if row["variant"] == "flax BN":
            flax[case] = row
        elif case in flax:
            bars = {
                name: Bar(row[key] / flax[case][key], f"{row[key] / 1e9:.1f} GB")
                for name, key in _TRAFFIC.items()
                if row[key] and flax[case][key]
            }
            panels.setdefault(case, {})[row["variant"]] = bars
    return Chart("relative to flax's BatchNorm: less is better", panels)


CHARTS: dict[str, Callable[[Report], Chart]] = {
    "train_step": train_step,
    "block": block,
    "traffic": traffic,
}


def files(report: Report, prefix: str) -> dict[str, str]:
    """Returns the file names of a report's chart by theme; none if it has no chart."""
    if _drawing(report) is None:
        return {}
    return {theme: f"{prefix}-{report['stem']}-{theme}.svg" for theme in THEMES}


def draw(report: Report, prefix: str, folder: Path) -> None:
    """Draws the chart of a report, if it has one."""
    if drawing := _drawing(report):
        save(drawing, files(report, prefix), folder)


def _drawing(report: Report) -> Draw | None:
    if report["benchmark"] == "scaling" and scaling_chart.cases(report):
        return functools.partial(scaling_chart.figure, report)
    if report["benchmark"] == "noise":
        return functools.partial(noise_chart.figure, report)
    if report["benchmark"] in CHARTS:
        chart = CHARTS[report["benchmark"]](report)
        return functools.partial(_figure, chart) if chart.panels else None
    return None


def _figure(chart: Chart, ink: str, soft: str) -> Figure:
    panels = chart.panels.values()
    series = list(dict.fromkeys(n for p in panels for bars in p.values() for n in bars))
    slots = len(series) + 0.6  # the rest is the gap between groups
    heights = [_ROW * slots * len(groups) for groups in panels]
    size = (8, sum(heights) + 0.4 * len(panels) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(panels), squeeze=False, sharex=True, height_ratios=heights
    )
    values = [bar.value for p in panels for bars in p.values() for bar in bars.values()]
    low, high = min(0, *values), 1.05 * max(1, *values)
    for axes, (title, groups) in zip(grid[:, 0], chart.panels.items(), strict=True):
        for i, bars in enumerate(groups.values()):
            for name, (value, text) in bars.items():
                number = series.index(name)
                y = i + (number - (len(series) - 1) / 2) / slots
                axes.barh(y, value, height=0.9 / slots, color=COLOURS[number])
                axes.text(  # in a column of its own, where no bar or line is
                    1.01,
                    y,
                    text,
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=8.5,
                    color=ink,
                )
        axes.axvline(1, color=ink, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(groups)), list(groups), fontsize=9.5)
        axes.set_xlim(max(low, -_CUT), min(high, _CUT))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        style_bars(axes, title, ink, soft)
    axes.set_xlabel(chart.axis, color=ink, fontsize=9.5)
    handles: list[Any] = [Line2D([], [], color=ink, linestyle="--", label="flax BN")]
    if len(series) > 1:
        handles += [Patch(color=COLOURS[i], label=n) for i, n in enumerate(series)]
    figure.legend(
        handles=handles,
        loc="outside upper right",
        ncols=len(handles),
        frameon=False,
        labelcolor=ink,
        fontsize=9.5,
    )
    return figure
