"""Draws the figures of the documentation: ``python docs/figures.py``.

Which values a sampler measures is read off the gradient of the measured mean: it is the
weight of each value in that mean, and zero for what is not measured.
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib.patches import Patch, Rectangle
from sklearn.datasets import load_digits

import flax_sbn as sbn

STATIC = pathlib.Path(__file__).parent / "_static"

IMAGES, VIRTUAL, SIDE = 32, 2, 16  # images, virtual images, pixels a side
DOWN, GAP = 4, 3  # maps in a column, pixels between maps
KEY = jax.random.key(30)

FS, VDN = sbn.FeatureSampling(1 / 16), sbn.VirtualSampling(VIRTUAL)
PANELS = {
    "Lattice": sbn.LatticeSampling(),
    "FS": FS,
    "FS, groups=1": sbn.FeatureSampling(1 / 16, groups=1),
    "BS": sbn.BatchSampling(2),
    "NS": sbn.NaiveSampling(2),
    "VDN": VDN,
    "FS + VDN": sbn.MixedSampling(FS, VDN),
}
NOTES = {
    "Lattice": "the same few positions in every image",
    "FS": "a different patch in each image",
    "FS, groups=1": "same patch in every image",
    "BS": "a run of images, drawn each time",
    "NS": "the last images, always",
    "VDN": "virtual images only",
    "FS + VDN": "both, half the weight each",
}

# Ink, ink of the notes, and the greys of what is not measured, darkest first.
THEMES = {
    "light": ("#1f2328", "#59636e", ("#a3acb8", "#f3f5f7")),
    "dark": ("#e6e9ed", "#9aa4b0", ("#1d2228", "#77828f")),
}
REAL, NOISE = ("#b23c00", "#ffc25c"), ("#075985", "#7dd3fc")


def feature_maps() -> jax.Array:
    """Returns one feature of a convolution of digits and virtual images: ``(N, H, W)``.

    The images get zero mean and unit variance first, as the virtual images have.
    """
    images = jnp.asarray(load_digits().images[:IMAGES, ..., None], jnp.float32)
    images = jax.image.resize(images, (IMAGES, SIDE, SIDE, 1), "linear")
    images = (images - images.mean()) / images.std()
    virtual = sbn.virtual_samples(jax.random.key(0), VIRTUAL, (SIDE, SIDE, 1))
    kernel = jnp.array([[2.0, 2.0, 0.0], [2.0, 0.0, -2.0], [0.0, -2.0, -2.0]]) / 6
    x = sbn.append_virtual(images, virtual)
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[..., 0]


def weights(sampler: sbn.Sampler, x: jax.Array) -> np.ndarray:
    """Returns the weight of each value of ``x`` in the mean that is measured."""

    def mean(x: jax.Array) -> jax.Array:
        return sbn.batch_statistics(x[..., None], sampler=sampler, key=KEY).mean[0]

    return np.asarray(jax.grad(mean)(x))


def corner(image: int) -> tuple[int, int]:
    """Returns the top left pixel of an image's map; images run down the columns."""
    across, down = divmod(image, DOWN)
    space = GAP * (image >= IMAGES)  # set virtual images apart
    return down * (SIDE + GAP), across * (SIDE + GAP) + 2 * space


def blocks(measured: np.ndarray) -> list[np.ndarray]:
    """Returns the first and last corners of the blocks that are measured of a map."""
    hit = np.argwhere(measured)
    if not len(hit):
        return []
    around = np.stack([hit.min(0), hit.max(0) + 1])
    if np.prod(around[1] - around[0]) == len(hit):
        return [around]
    return [np.stack([position, position + 1]) for position in hit]


def draw_legend(axes: plt.Axes, theme: str) -> None:
    """Draws what the colours mean."""
    ink, _, greys = THEMES[theme]
    meanings = {
        "measured, in an image": REAL[theme == "dark"],
        "measured, in a virtual image": NOISE[theme == "dark"],
        "normalized only": greys[theme == "dark"],
    }
    patches = [Patch(color=color, label=label) for label, color in meanings.items()]
    axes.legend(
        handles=patches, loc="center", frameon=False, labelcolor=ink, fontsize=10
    )
    axes.axis("off")


def blend(ends: tuple[str, str], level: np.ndarray) -> np.ndarray:
    """Returns the colour at ``level`` in [0, 1] between two colours."""
    low, high = (np.array(mpl.colors.to_rgba(end)) for end in ends)
    return low + level[..., None] * (high - low)


def draw_panel(axes: plt.Axes, x: jax.Array, name: str, theme: str) -> None:
    """Draws every map of the batch, with what is measured in colour."""
    ink, soft, greys = THEMES[theme]
    sampler = PANELS[name]
    if "VDN" not in name:
        x = x[:IMAGES]
    measured = weights(sampler, x) > 0
    assert measured.sum() == sbn.num_measured(sampler, x.shape)
    low, high = np.quantile(x, [0.02, 0.98])
    level = np.clip((np.asarray(x) - low) / (high - low), 0, 1)

    height, width = corner(IMAGES - 1)[0] + SIDE, corner(IMAGES)[1] + SIDE
    picture = np.zeros((height, width, 4))
    for image, here in enumerate(measured):
        top, left = corner(image)
        color = REAL if image < IMAGES else NOISE
        picture[top : top + SIDE, left : left + SIDE] = np.where(
            here[..., None], blend(color, level[image]), blend(greys, level[image])
        )
        for (y0, x0), (y1, x1) in blocks(here):
            axes.add_patch(
                Rectangle(
                    (left + x0 - 0.5, top + y0 - 0.5),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    edgecolor=color[theme == "dark"],
                    linewidth=0.9 if x1 - x0 > 1 else 0.4,
                )
            )
    axes.imshow(picture, interpolation="nearest")
    axes.set_xlim(-1.5, width + 0.5)
    axes.set_ylim(height + 0.5, -1.5)
    axes.axis("off")
    axes.set_title(name, loc="left", color=ink, fontsize=11.5, fontweight="bold", pad=4)
    edge = corner(IMAGES - 1)[1] + SIDE - 0.5
    label = {"y": -4.5, "ha": "right", "fontsize": 9}
    axes.text(edge, s=NOTES[name], color=soft, **label)
    if len(x) > IMAGES:
        axes.text(width - 0.5, s="virtual", color=NOISE[theme == "dark"], **label)


def main() -> None:
    """Writes ``_static/sampling-light.svg`` and ``_static/sampling-dark.svg``."""
    x = feature_maps()
    for theme in THEMES:
        figure, grid = plt.subplots(4, 2, figsize=(8, 8.1), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        *panels, legend = grid.flat
        for axes, name in zip(panels, PANELS, strict=True):
            draw_panel(axes, x, name, theme)
        draw_legend(legend, theme)
        figure.savefig(
            STATIC / f"sampling-{theme}.svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
        plt.close(figure)


if __name__ == "__main__":
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "flax_sbn", "svg.fonttype": "path"})
    main()
