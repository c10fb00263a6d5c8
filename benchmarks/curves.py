"""Charts of the studies: learning curves, and accuracy against rows."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import flax_sbn as sbn
from studies import Experiment, Study, short
from theme import COLOURS, THEMES, save

Curves = np.ndarray  # (seeds, points)

_COLUMNS = 4  # of panels

# Of the lines in a panel, in turn: all colours, and then all of them dotted.
_STYLES: list[Any] = [
    {"color": color, "linestyle": linestyle}
    for linestyle in ("-", ":")
    for color in COLOURS
]


def ratio_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws training loss and test accuracy by epoch: a row a family of methods."""
    families: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        families.setdefault(_family(setting), []).append(setting)
    families.pop("", None)  # the reference
    figure = Figure(figsize=(8.5, 2.6 * len(families)), layout="constrained")
    axes = figure.subplots(len(families), 2, squeeze=False, sharex=True, sharey="col")
    reference = next(s for s in study.settings if s.norm == "bn")
    for row, (family, settings) in zip(axes, families.items(), strict=True):
        for ax, key in zip(row, ("train_loss", "test_accuracy"), strict=True):
            _style(ax, ink, soft)
            for setting, style in zip(settings, itertools.cycle(_STYLES), strict=False):
                _draw(ax, _curves(study, setting, key), setting.norm, **style)
            _draw(ax, _curves(study, reference, key), "bn", color=ink, linestyle="--")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        row[0].set_title(family, loc="left", color=ink, fontsize=10.5, weight="bold")
        row[1].legend(
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            labelcolor=ink,
            fontsize=8.5,
        )
    for ax, label in zip(axes[0], ("training loss", "test accuracy"), strict=True):
        ax.annotate(
            label, (1, 1.03), xycoords="axes fraction", ha="right", color=ink, size=9.5
        )
    for ax in axes[-1]:
        ax.set_xlabel("epoch", color=ink, fontsize=9.5)
    return figure


def rows_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws test accuracy against the number of rows that are normalized together."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    _style(ax, ink, soft)
    norms: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        norms.setdefault(setting.norm if setting.rows else "", []).append(setting)
    whole = norms.pop("", [])
    for (norm, settings), style in zip(
        norms.items(), itertools.cycle(_STYLES), strict=False
    ):
        ax.errorbar(
            *_by_rows(study, settings),
            **style,
            marker="o",
            markersize=4,
            linewidth=1.6,
            capsize=2,
            label=short(norm),
        )
    for setting, linestyle in zip(whole, ("--", ":", "-."), strict=False):
        mean = _curves(study, setting, "test_accuracy")[:, -1].mean()
        label = f"{setting.norm}, whole batch"
        ax.axhline(mean, color=ink, linestyle=linestyle, linewidth=1.2, label=label)
    ax.set_xscale("log", base=2)
    ticks = sorted({s.rows for settings in norms.values() for s in settings if s.rows})
    ax.set_xticks(ticks, [str(rows) for rows in ticks])
    ax.set_xlabel("rows normalized together", color=ink, fontsize=9.5)
    ax.set_ylabel("test accuracy", color=ink, fontsize=9.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside right center", frameon=False, labelcolor=ink, fontsize=9)
    return figure


def normalizers_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws accuracy against rows: a panel a norm, with batch norm's in each."""
    norms: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        norms.setdefault(setting.norm, []).append(setting)
    reference = norms.pop("bn")
    rows = math.ceil(len(norms) / _COLUMNS)
    figure = Figure(figsize=(8.5, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(norms) :]:
        ax.axis("off")
    for ax, (norm, settings) in zip(axes.flat, norms.items(), strict=False):
        _style(ax, ink, soft)
        _draw_by_rows(ax, study, reference, color=soft, linestyle="--")
        _draw_by_rows(ax, study, settings, color=COLOURS[0], linestyle="-")
        ax.set_title(short(norm), loc="left", color=ink, fontsize=10, weight="bold")
        ax.set_xscale("log", base=2)
        ticks = sorted({_num_rows(setting) for setting in reference})
        labels = ["all" if n == ticks[-1] else str(n) for n in ticks]
        ax.set_xticks(ticks, labels)
        ax.tick_params(labelbottom=True)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supxlabel("rows normalized together", color=ink, fontsize=9.5)
    figure.supylabel("test accuracy", color=ink, fontsize=9.5)
    return figure


CHARTS: dict[str, Callable[[Study, str, str], Figure]] = {
    "ratio": ratio_chart,
    "rows": rows_chart,
    "normalizers": normalizers_chart,
}
ALT = {
    "ratio": "Training loss and test accuracy by epoch, one line a method",
    "rows": "Test accuracy against the number of rows normalized together",
    "normalizers": "Test accuracy against the number of rows, a panel a normalizer, "
    "with that of batch normalization in each",
}


def files(study: Study, prefix: str) -> dict[str, str]:
    """Returns the file names of a study's chart by theme.

    None if it has no chart, or nothing has been trained to be compared with batch norm.
    """
    if study.kind not in CHARTS or {s.norm for s in study.settings} <= {"bn"}:
        return {}
    return {theme: f"{prefix}-{study.name}-{theme}.svg" for theme in THEMES}


def draw(study: Study, prefix: str, folder: Path) -> None:
    """Draws the chart of a study, if it has one."""
    if named := files(study, prefix):
        save(functools.partial(CHARTS[study.kind], study), named, folder)


def _family(setting: Experiment) -> str:
    method = setting.method()
    if method.running_weight:
        return "with the running statistics"
    match method.sampler:
        case None:
            return ""
        case sbn.NaiveSampling() | sbn.BatchSampling():
            return "rows: NS and BS"
        case sbn.FeatureSampling():
            return "patches: FS"
    return "virtual rows: VDN and FS+VDN"


def _curves(study: Study, setting: Experiment, key: str) -> Curves:
    return np.array([record[key] for record in study.runs(setting).values()])


def _draw_by_rows(
    ax: Axes,
    study: Study,
    settings: Sequence[Experiment],
    *,
    color: str,
    linestyle: str,
) -> None:
    """Draws the mean of the last accuracies and their deviation by number of rows.

    A norm that was trained with whole batches only is one for which rows do not matter:
    a line across the panel.
    """
    rows, means, errors = _by_rows(study, settings)
    style: Any = {"color": color, "linestyle": linestyle}
    if [setting.rows for setting in settings] == [None]:
        ax.axhline(means[0], lw=1.6, **style)
        ax.axhspan(*(means + [-1, 1] * errors), color=color, alpha=0.12, lw=0)
        return
    ax.errorbar(rows, means, errors, marker="o", ms=3.5, lw=1.6, capsize=2, **style)


def _by_rows(
    study: Study, settings: Sequence[Experiment]
) -> tuple[list[int], Curves, Curves]:
    """Returns rows, ascending, and mean and deviation of the last accuracies."""
    settings = sorted(settings, key=_num_rows)
    last = [_curves(study, s, "test_accuracy")[:, -1] for s in settings]
    means = np.array([values.mean() for values in last])
    errors = np.array([values.std(ddof=min(1, len(values) - 1)) for values in last])
    return [_num_rows(setting) for setting in settings], means, errors


def _num_rows(setting: Experiment) -> int:
    return setting.rows or setting.batch_size


def _draw(ax: Axes, curves: Curves, label: str, *, color: str, linestyle: str) -> None:
    """Draws the mean of some curves, and their range."""
    epochs = np.arange(1, curves.shape[1] + 1)
    style: Any = {"color": color, "linestyle": linestyle}
    ax.plot(epochs, curves.mean(0), label=short(label), lw=1.6, **style)
    low, high = curves.min(0), curves.max(0)
    ax.fill_between(epochs, low, high, color=color, alpha=0.12, lw=0)


def _style(ax: Axes, ink: str, soft: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(soft)
    ax.tick_params(color=soft, labelcolor=ink, labelsize=9)
    ax.grid(color=soft, alpha=0.2)
