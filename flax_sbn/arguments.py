"""Checks of arguments that come from configuration files, often as strings."""

import numbers
from typing import Any

import jax
import numpy as np


def check_numbers(**given: Any) -> None:
    """Raises a TypeError if an argument, given by its name, is no number or array."""
    for name, value in given.items():
        if not isinstance(value, numbers.Real | np.ndarray | jax.Array):
            raise TypeError(
                f"Expected {name} to be a number, got {name}={value!r}. Configuration "
                "files give strings: write 0.015625, not 1/64, and 1.0e-5, not 1e-5."
            )


def check_positive(**given: Any) -> None:
    """Raises a ValueError if a number, given by its name, is no positive int."""
    for name, value in given.items():
        if (
            not isinstance(value, numbers.Integral)
            or isinstance(value, bool)
            or value < 1
        ):
            raise ValueError(
                f"Expected {name} to be an int >= 1, got {name}={value!r}."
            )


def positive_ints(instance: Any, *names: str) -> None:
    """Makes ints of fields of a frozen dataclass; see :func:`check_positive`."""
    for name in names:
        value = getattr(instance, name)
        check_positive(**{name: value})
        object.__setattr__(instance, name, int(value))  # NumPy's are none to slices
