"""The options that training scripts share, in the words of all of them."""

import argparse
import dataclasses
from typing import Any

from harness import methods
from harness.command_line import one_of
from harness.networks import DTYPES, NETWORKS, Settings
from harness.tasks import DATASETS
from models import LINEN

COUNTS = ("width", "epochs", "batch_size", "norm_batch_size", "accumulate")  # 1 or more
NAMES = {
    "model": tuple(LINEN),
    "api": tuple(NETWORKS),
    "dtype": tuple(DTYPES),
    "dataset": DATASETS,
}
_HELP = {
    "model": f"one of {', '.join(LINEN)}",
    "api": f"one of {', '.join(NETWORKS)}",
    "width": "features of the first stage or hidden layer (default: the model's own)",
    "batch_size": "images per step",
    "norm_batch_size": "images normalized together, as on a device that holds so few "
    "(default: the batch); several such groups on a device are faster unfolded",
    "epochs": "passes over the training images",
    "learning_rate": "peak of the schedule: warm-up, then cosine",
    "warmup": "share of all steps in which the learning rate rises",
    "weight_decay": "weight decay of kernels",
    "label_smoothing": "share of the target that is spread over all classes",
    "accumulate": "micro-batches in a step, one after the other",
    "dtype": f"dtype of the computation: {', '.join(DTYPES)}; the rest is float32",
    "augment": "random crops and flips",
    "fresh_virtual": "draw new virtual images in each step",
    "dataset": f"one of {', '.join(DATASETS)}",
    "train_size": "use only this many training images",
    "image_size": "side of the images, averaged from larger ones (default: their own)",
    "norm": f"any of {', '.join(methods.NAMES)}, or a sampler as in Python; an amount "
    "may follow: lattice:4 measures about four positions of each map, bs:8 eight "
    "images, fs:1/16 that share of each map, vdn:4 four virtual images, lattice+vdn:4 "
    "mixes both, brn@lattice is Batch Renormalization of a lattice, ghost:8 eight "
    "groups, ba:4 four copies",
    "fold": "fold sampled norms into the convolution or dense layer before them",
    "seed": "seed of all that is random",
}


def help_of(name: str, default: Any = None) -> str:
    """Returns what an option means, and its default unless that is None."""
    if isinstance(default, bool):
        default = "true" if default else "false"  # as in TOML
    return _HELP[name] if default is None else f"{_HELP[name]} (default: {default})"


def add_option(group: Any, name: str, default: Any, **more: Any) -> None:
    """Adds an option of one value, whose kind is that of its default or else int."""
    flag = f"--{name.replace('_', '-')}"
    more = {"default": default, "help": help_of(name, default), **more}
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
        return
    kind = int if default is None else type(default)
    more = {"type": kind, "metavar": "X" if kind is float else "N"} | more
    if name in NAMES:
        more |= {"type": one_of(NAMES[name]), "metavar": "NAME"}
    group.add_argument(flag, **more)


def add_settings(group: Any, default: Settings) -> None:
    """Adds the options that say how to train to a group of a command line."""
    for field in dataclasses.fields(Settings):
        if field.name not in ("augment", "fresh_virtual"):
            add_option(group, field.name, getattr(default, field.name))
    add_option(group, "fold", True)


def settings_of(args: argparse.Namespace) -> Settings:
    """Returns the settings of a command line; others have their defaults."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    return Settings(**given)
