"""Bar charts of the results: horizontal bars in groups, and a reference at 1."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reports import noise_chart
from reports.theme import COLOURS, THEMES, Draw, save, style_bars

Report = dict[str, Any]

_ROW = 0.2  # height of a bar in inches
_TRAFFIC = {"HBM traffic": "traffic_bytes", "temporary memory": "temp_bytes"}
_WAYS = {"jit": "jit", "own": "shard_map", "pooled": "shard_map with axis_name"}
_NAMES = {
    "resnet": "ResNet-",
    "densenet": "DenseNet-",
    "h200": "H200",
    "v5e": "TPU v5e",
}


class Bar(NamedTuple):
    """A value relative to a reference.

    Attributes:
      value: the ratio.
      amount: what it is a ratio of, if that says more.
      quartiles: of the measurements, if there were several.
    """

    value: float
    amount: str = ""
    quartiles: tuple[float, float] | None = None


class Chart(NamedTuple):
    """Panels one below the other.

    Attributes:
      axis: what the values are.
      reference: what they are relative to.
      panels: by title, group and series: ``panels[title][group][series]``.
    """

    axis: str
    reference: str
    panels: dict[str, dict[str, dict[str, Bar]]]


def train_step(report: Report) -> Chart:
    """Returns the speed of training steps: a group a variant, a bar a batch size."""
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    for row in report["results"]:
        if row["ratio"] is not None and row["variant"] != "Flax BN":
            speed = 1 / row["ratio"]
            groups = panels.setdefault(row["model"], {})
            bars = groups.setdefault(row["variant"], {})
            bars[f"batch {row['batch_size']}"] = Bar(speed)
    axis = "images a second, relative to Flax's BatchNorm: more is better"
    return Chart(axis, "Flax BN", panels)


def block(report: Report) -> Chart:
    """Returns the time of whole blocks: a group a layer, a bar a variant."""
    groups: dict[str, dict[str, Bar]] = {}
    for row in report["results"]:
        if row["variant"] != "Flax":
            bars = groups.setdefault(row["layer"].removeprefix("resnet50-"), {})
            name = "no norm" if row["variant"] == "conv" else row["variant"]
            bars[name] = Bar(row["ratio"], quartiles=row["ratio_quartiles"])
    axis = (
        "time of a block, relative to that with Flax's BatchNorm: less is better\n"
        "(medians of rounds; lines from the lower to the upper quartile)"
    )
    return Chart(axis, "Flax BN", {"blocks of ResNet-50": groups} if groups else {})


def traffic(report: Report) -> Chart:
    """Returns traffic and memory of compiled steps: a group a variant."""
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    flax: dict[str, dict[str, Any]] = {}
    for row in report["results"]:
        case = f"{row['model']} on {row['target']}, batch {row['batch_size']}"
        if row["variant"] == "Flax BN":
            flax[case] = row
        if case not in flax:
            continue
        bars = {}
        for name, key in _TRAFFIC.items():
            if row[key] and flax[case][key]:
                ratio = row[key] / flax[case][key]
                bars[name] = Bar(ratio, f"{row[key] / 1e9:.1f} GB")
        panels.setdefault(case, {})[row["variant"]] = bars
    axis = (
        "of one training step as compiled, relative to Flax's BatchNorm: less is better"
    )
    return Chart(axis, "Flax BN", panels)


def scaling(report: Report) -> Chart:
    """Returns what the most devices send, of networks large enough to say something."""
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    most = max((row["devices"] for row in report["results"]), default=1)
    without: dict[str, float] = {}
    for row in report["results"]:
        if row["devices"] != most or row["error"] or row["model"] == "resnet8":
            continue
        case = f"{row['model']} on {most} x {row['target']}"
        method, _, way = row["variant"].rpartition(", ")
        sent = without.setdefault(case, row["sent_bytes"])
        if method != "no norm" and sent:
            ratio = row["sent_bytes"] / sent
            groups = panels.setdefault(case, {})
            bars = groups.setdefault(method, {})
            bars[_WAYS[way]] = Bar(ratio, f"{row['sent_bytes'] / 1e6:.0f} MB")
    axis = "bytes that a device sends in a training step, relative to no norm"
    return Chart(axis, "no norm", panels)


CHARTS: dict[str, Callable[[Report], Chart]] = {
    "train_step": train_step,
    "block": block,
    "traffic": traffic,
    "scaling": scaling,
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
    found = [bar for p in panels for bars in p.values() for bar in bars.values()]
    values = [max((bar.value, *(bar.quartiles or ()))) for bar in found]
    for axes, (title, groups) in zip(grid[:, 0], chart.panels.items(), strict=True):
        for i, bars in enumerate(groups.values()):
            for name, (value, amount, quartiles) in bars.items():
                number = series.index(name)
                y = i + (number - (len(series) - 1) / 2) / slots
                axes.barh(y, value, height=0.9 / slots, color=COLOURS[number])
                if quartiles:
                    axes.hlines(y, *quartiles, color=ink, linewidth=1)
                axes.text(  # in a column of its own, where no bar or line is
                    1.01,
                    y,
                    f"{value:.2f}\N{MULTIPLICATION SIGN}  {amount}",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=8.5,
                    color=ink,
                )
        axes.axvline(1, color=ink, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(groups)), list(groups), fontsize=9.5)
        axes.set_xlim(0, 1.05 * max(1, *values))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        for word, name in _NAMES.items():
            title = title.replace(word, name)
        style_bars(axes, title, ink, soft)
    axes.set_xlabel(chart.axis, color=ink, fontsize=9.5)
    handles: list[Any] = [
        Line2D([], [], color=ink, linestyle="--", label=chart.reference)
    ]
    if len(series) > 1:
        handles += [Patch(color=COLOURS[i], label=n) for i, n in enumerate(series)]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        labelcolor=ink,
        fontsize=9.5,
    )
    return figure
