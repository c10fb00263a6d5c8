"""What the charts of the results share: colours, style, files for light and dark."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Draws a chart in the two inks of a theme.
Draw = Callable[[str, str], Figure]

# Ink and soft ink, on the light and the dark page.
THEMES = {"light": ("#1f2328", "#59636e"), "dark": ("#e6e9ed", "#9aa4b0")}
# Okabe & Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_SVG: Any = {"svg.hashsalt": "flax_sbn", "svg.fonttype": "path"}


def save(figure: Draw, named: Mapping[str, str], folder: Path) -> None:
    """Saves what ``figure(ink, soft)`` draws for each theme, the same bytes each time.

    Args:
      figure: draws a chart in the two inks of a theme.
      named: names of the files by theme.
      folder: where to save them.
    """
    for theme, name in named.items():
        ink, soft = THEMES[theme]
        inks = dict.fromkeys(("text.color", "axes.labelcolor"), ink)
        inks |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), soft)
        with mpl.rc_context(_SVG | inks):
            figure(ink, soft).savefig(
                folder / name,
                transparent=True,
                metadata={"Date": None, "Creator": None},
            )


def style_bars(axes: Axes, title: str, ink: str, soft: str) -> None:
    """Gives a panel of horizontal bars its title, and only the axis of the values."""
    axes.set_title(title, loc="left", color=ink, fontsize=10.5, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(soft)
    axes.tick_params(axis="y", length=0, labelcolor=ink)
    axes.tick_params(axis="x", color=soft, labelcolor=ink, labelsize=9)
