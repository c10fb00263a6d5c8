"""Charts of the studies: learning curves, and accuracy against images."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

import flax_sbn as sbn
from reports.studies import Experiment, Study, short
from reports.theme import COLOURS, THEMES, save

Curves = np.ndarray  # (seeds, points)

# Whose curves are drawn, and names that say more than those of the command line.
_SHOWN = ("bn", "lattice", "fs:1/64")
_NAMES = {
    "bn": "batch norm",
    "bn~3/4": "BN, running_weight=0.75",
    "gn": "group norm",
    "mabn": "moving-average BN",
    "lattice": "LatticeSampling()",
    "lattice~3/4": "LatticeSampling(), running_weight=0.75",
    "lattice+vdn:2~3/4": "LatticeSampling(), 2 virtual images, running_weight=0.75",
    "fs:1/64": "FeatureSampling(1 / 64)",
    "fs:1/64+vdn:2": "FS(1 / 64), 2 virtual images",
    "fs:1/64+vdn:2~3/4": "the same, running_weight=0.75",
    "vdn:2": "2 virtual images",
    "bs:1+vdn:2": "1 image, 2 virtual ones",
    "brn": "Batch Renormalization",
    "kn": "Kalman normalization",
    "dbn": "diminishing BN",
    "mixture": "mixture normalization",
    "l1": "L1-norm BN",
    "range": "range BN",
    "ic": "IC",
    "shade": "SHADE, batch norm",
    "ba:2": "batch augmentation, 2 copies",
    "bnet": "BNET",
    "ghost:4": "Ghost BN, 4 groups",
    "bnp": "BN preconditioning",
    "nf": "norm-free, standardized weights",
    "none": "no norm",
    "batchless": "batchless normalization",
    "frn": "filter response normalization",
}
_ALONE = ("bnp", "nf", "none", "batchless", "frn", "gn")  # each image by itself

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
        _draw(curves, loss, _name(setting.norm), **style)
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


def few_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws test accuracy against the number of images normalized together."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    ax = figure.subplots()
    _style(ax, ink, soft)
    norms: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        name = setting.norm if setting.norm_batch_size else ""
        norms.setdefault(name, []).append(setting)
    ends = []  # value, label and colour
    for setting in norms.pop("", []):
        mean = _curves(study, setting, "test_accuracy")[:, -1].mean()
        ax.axhline(mean, color=soft, linestyle="--", linewidth=1.2)
        ends.append((mean, f"{_name(setting.norm)}, all 128", soft))
    most = max(s.norm_batch_size or 1 for settings in norms.values() for s in settings)
    for (norm, settings), style in zip(norms.items(), _STYLES, strict=False):
        sizes, means, errors = _by_images(study, settings)
        ax.errorbar(sizes, means, errors, **style, marker="o", ms=4, lw=1.6, capsize=2)
        ends.append((means[-1], _name(norm), style["color"]))
        if sizes[-1] < most:  # as far as its label
            dotted = {"color": style["color"], "linestyle": ":", "linewidth": 1}
            ax.plot([sizes[-1], most], [means[-1]] * 2, **dotted)
    ax.set_xscale("log", base=2)
    ticks = sorted({_num_images(s) for settings in norms.values() for s in settings})
    ax.set_xticks(ticks, [str(images) for images in ticks])
    ax.set_xlabel("images normalized together", color=ink, fontsize=9.5)
    ax.set_ylabel("test accuracy", color=ink, fontsize=9.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label_ends(ax, ends)
    return figure


def normalizers_chart(study: Study, ink: str, soft: str) -> Figure:
    """Draws accuracy with the fewest images and with all: a line a norm, sorted."""
    norms: dict[str, list[Experiment]] = {}
    for setting in study.settings:
        norms.setdefault(setting.norm, []).append(setting)
    fewest = min(_num_images(setting) for setting in study.settings)
    found = {}
    for norm, settings in norms.items():
        sizes, means, errors = _by_images(study, settings)
        # Images that are normalized alone are so in any batch.
        found[norm] = (sizes[0] == fewest or norm in _ALONE, means, errors)
    order = sorted(found, key=lambda norm: found[norm][1][0])
    figure = Figure(figsize=(8.5, 0.27 * len(order) + 0.9), layout="constrained")
    ax = figure.subplots()
    _style(ax, ink, soft)
    for y, norm in enumerate(order):
        few, means, errors = found[norm]
        dots: Any = {"fmt": "o", "ms": 5, "capsize": 2, "lw": 1.2}
        if few:
            ax.plot(means[[0, -1]], [y, y], color=soft, lw=1.2, zorder=1)
        ax.errorbar(means[-1], y, xerr=errors[-1], color=COLOURS[1], **dots)
        if few:
            ax.errorbar(means[0], y, xerr=errors[0], color=COLOURS[0], **dots)
    ax.set_yticks(range(len(order)), [_name(norm) for norm in order])
    for text, norm in zip(ax.get_yticklabels(), order, strict=True):
        text.set_fontweight("bold" if norm == "bn" else "normal")
    ax.set_xlabel("test accuracy", color=ink, fontsize=9.5)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles = [
        Line2D([], [], color=color, marker="o", ls="none", label=label)
        for color, label in zip(
            COLOURS, (f"{fewest} images normalized together", "all 128"), strict=False
        )
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=2,
        frameon=False,
        labelcolor=ink,
        fontsize=9.5,
    )
    return figure


CHARTS: dict[str, Callable[[Study, str, str], Figure]] = {
    "methods": methods_chart,
    "ratio": ratio_chart,
    "few": few_chart,
    "normalizers": normalizers_chart,
}
ALT = {
    "methods": "Training loss by epoch, and its distance from batch norm's",
    "ratio": "Test accuracy against the share of values measured, one line per family",
    "few": "Test accuracy against the number of images normalized together",
    "normalizers": "Test accuracy of each normalizer with two images normalized "
    "together, and with all",
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


def _name(norm: str) -> str:
    """Returns what a method is called where there is room."""
    return _NAMES.get(norm, short(norm))


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes on the right what lines are, each below the one before."""
    low, high = ax.get_ylim()
    least = 0.055 * (high - low)
    place = math.inf
    for value, label, color in sorted(ends, reverse=True):
        place = min(value, place - least)
        ax.annotate(
            label,
            (1.01, place),
            xycoords=ax.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=color,
        )


def _by_images(
    study: Study, settings: Sequence[Experiment]
) -> tuple[list[int], Curves, Curves]:
    """Returns numbers of images, ascending; the last accuracies' mean, deviation."""
    settings = sorted(settings, key=_num_images)
    return [_num_images(setting) for setting in settings], *_means(study, settings)


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


def _num_images(setting: Experiment) -> int:
    return setting.norm_batch_size or setting.batch_size


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
