"""Charts of the studies: learning curves, and accuracy against rows."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import flax_sbn as sbn
from reports.studies import Experiment, Study, short
from reports.theme import COLOURS, THEMES, save

Curves = np.ndarray  # (seeds, points)

_COLUMNS = 4  # of panels
# Whose curves are drawn, and names that say more than those of the command line.
_SHOWN = ("bn", "lattice", "fs:1/64")
_NAMES = {
    "bn": "batch norm",
    "bn~3/4": "batch norm, running_weight=0.75",
    "gn": "group norm",
    "mabn": "moving-average BN",
    "lattice": "LatticeSampling()",
    "lattice~3/4": "LatticeSampling(), running_weight=0.75",
    "lattice+vdn:2~3/4": "LatticeSampling(), 2 virtual images, running_weight=0.75",
    "fs:1/64": "FeatureSampling(1 / 64)",
}

# Of the lines in a panel, in turn: all colours, and then all of them dotted.
_STYLES: list[Any] = [
    {"color": color, "linestyle": linestyle}
    for linestyle in ("-", ":")
    for color in COLOURS
]


def methods_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws the training loss by epoch, and how far it is from batch norm's."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    curves, apart = figure.subplots(1, 2)
    for ax in (curves, apart):
        _style(ax, ink, soft)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch", color=ink, fontsize=9.5)
    shown = [s for s in study.settings if s.norm in _SHOWN]
    for setting, style in zip(shown, _STYLES, strict=False):
        loss = _curves(study, setting, "train_loss")
        _draw(curves, loss, _NAMES[setting.norm], **style)
        if setting.norm == "bn":
            continue
        runs, reference = study.runs(setting), study.reference(setting)
        pairs = [
            np.subtract(runs[seed]["train_loss"], reference[seed]["train_loss"])
            for seed in sorted(runs.keys() & reference.keys())
        ]
        mean, error = np.mean(pairs, 0), _error(pairs)
        epochs = np.arange(1, len(mean) + 1)
        apart.plot(epochs, mean, lw=1.6, **style)
        apart.fill_between(
            epochs, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0
        )
    apart.axhline(0, color=_STYLES[0]["color"], lw=1.6)
    curves.legend(frameon=False, labelcolor=ink, fontsize=9)
    for ax, title in (
        (curves, "training loss"),
        (apart, "training loss less batch norm's, same seed"),
    ):
        ax.set_title(title, loc="left", color=ink, fontsize=10, weight="bold")
    return figure


def ratio_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws the last test accuracy against the share measured: a line a family."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    _style(ax, ink, soft)
    families: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        families.setdefault(_family(setting), []).append(setting)
    (reference,) = families.pop("")
    for (family, settings), style in zip(families.items(), _STYLES, strict=False):
        settings = sorted(settings, key=lambda s: _share(study, s))
        ax.errorbar(
            [_share(study, setting) for setting in settings],
            *_means(study, settings),
            **style,
            marker="o",
            markersize=4,
            linewidth=1.6,
            capsize=2,
            label=family,
        )
    (mean,), (error,) = _means(study, [reference])
    ax.axhline(mean, color=ink, lw=1.2, ls="--", label="batch norm, its seeds")
    ax.axhspan(mean - error, mean + error, color=ink, alpha=0.1, lw=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of the values that is measured", color=ink, fontsize=9.5)
    ax.set_ylabel("test accuracy", color=ink, fontsize=9.5)
    figure.legend(loc="outside right center", frameon=False, labelcolor=ink, fontsize=9)
    return figure


def rows_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws test accuracy against the number of images normalized together."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    _style(ax, ink, soft)
    norms: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        norms.setdefault(setting.norm if setting.rows else "", []).append(setting)
    whole = norms.pop("", [])
    jitter = np.linspace(0.96, 1.04, max(2, len(norms)))
    for factor, (norm, settings), style in zip(
        jitter, norms.items(), _STYLES, strict=False
    ):
        sizes, means, errors = _by_rows(study, settings)
        ax.errorbar(
            factor * np.array(sizes),
            means,
            errors,
            **style,
            marker="o",
            markersize=4,
            linewidth=1.6,
            capsize=2,
            label=_NAMES.get(norm, short(norm)),
        )
    for setting, linestyle in zip(whole, ("--", ":", "-."), strict=False):
        mean = _curves(study, setting, "test_accuracy")[:, -1].mean()
        label = f"{_NAMES.get(setting.norm, setting.norm)}, all 128"
        ax.axhline(mean, color=ink, linestyle=linestyle, linewidth=1.2, label=label)
    ax.set_xscale("log", base=2)
    ticks = sorted({s.rows for settings in norms.values() for s in settings if s.rows})
    ax.set_xticks(ticks, [str(rows) for rows in ticks])
    ax.set_xlabel("images normalized together", color=ink, fontsize=9.5)
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
    "methods": methods_chart,
    "ratio": ratio_chart,
    "rows": rows_chart,
    "normalizers": normalizers_chart,
}
ALT = {
    "methods": "Training loss by epoch, and its distance from batch norm's",
    "ratio": "Test accuracy against the share of values measured, one line a family",
    "rows": "Test accuracy against the number of images normalized together",
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
    weighted = ", running_weight=0.75" if method.running_weight else ""
    match method.sampler:
        case None:
            return ""
        case sbn.FeatureSampling(groups=None):
            return f"FeatureSampling{weighted}"
        case sbn.FeatureSampling():
            return "FeatureSampling, a patch for several images"
        case sampler:
            return f"{type(sampler).__name__}{weighted}"


def _share(study: Study, setting: Experiment) -> float:
    share: float = next(iter(study.runs(setting).values()))["measured"]
    return share


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
    return [_num_rows(setting) for setting in settings], *_means(study, settings)


def _means(study: Study, settings: Sequence[Experiment]) -> tuple[Curves, Curves]:
    """Returns mean and deviation of the last accuracies."""
    last = [_curves(study, s, "test_accuracy")[:, -1] for s in settings]
    means = np.array([values.mean() for values in last])
    errors = np.array([values.std(ddof=min(1, len(values) - 1)) for values in last])
    return means, errors


def _error(pairs: Sequence[Curves]) -> Curves:
    """Returns the standard error of a mean; none of a single one."""
    deviation: Curves = np.std(pairs, 0, ddof=min(1, len(pairs) - 1))
    return deviation / len(pairs) ** 0.5


def _num_rows(setting: Experiment) -> int:
    return setting.rows or setting.batch_size


def _draw(ax: Axes, curves: Curves, label: str, *, color: str, linestyle: str) -> None:
    """Draws the mean of some curves, and their range."""
    epochs = np.arange(1, curves.shape[1] + 1)
    style: Any = {"color": color, "linestyle": linestyle}
    ax.plot(epochs, curves.mean(0), label=label, lw=1.6, **style)
    low, high = curves.min(0), curves.max(0)
    ax.fill_between(epochs, low, high, color=color, alpha=0.12, lw=0)


def _style(ax: Axes, ink: str, soft: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(soft)
    ax.tick_params(color=soft, labelcolor=ink, labelsize=9)
    ax.grid(color=soft, alpha=0.2)
