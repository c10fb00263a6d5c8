"""The options that training scripts share: one for each of the settings."""

import argparse
import dataclasses
from typing import Any

from harness.networks import DTYPES, NETWORKS, Settings
from models import LINEN

COUNTS = ("width", "epochs", "batch_size", "rows", "accumulate")  # 1 or more

_CHOICES = {"model": tuple(LINEN), "api": tuple(NETWORKS), "dtype": tuple(DTYPES)}
_HELP = {
    "model": f"one of {', '.join(LINEN)}",
    "api": f"one of {', '.join(NETWORKS)}",
    "epochs": "passes over the training images",
    "batch_size": "images in a step",
    "learning_rate": "peak of the schedule: warm-up, then cosine",
    "warmup": "share of all steps in which the learning rate rises",
    "weight_decay": "of kernels",
    "label_smoothing": "share of the target that is spread over all classes",
    "accumulate": "micro-batches in a step, one after the other",
    "dtype": f"of the computation: {', '.join(DTYPES)}; the rest is float32",
}


def add_settings(group: Any, default: Settings) -> None:
    """Adds the options to a group of a command line."""
    for option, help_text in _HELP.items():
        value = getattr(default, option)
        choices = _CHOICES.get(option)
        group.add_argument(
            f"--{option.replace('_', '-')}",
            type=type(value),
            default=value,
            choices=choices,
            metavar="NAME" if choices else "X" if isinstance(value, float) else "N",
            help=f"{help_text} (default: %(default)s)",
        )
    group.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="features of the first stage or hidden layer (default: the model's own)",
    )
    group.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="images normalized together, as on a device that holds so few (default: "
        "the batch); several such groups on a device are faster with --no-fold",
    )
    group.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold sampled norms into the convolution or dense layer before them "
        "(default: yes)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Returns the settings of a command line; others have their defaults."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    return Settings(**given)
