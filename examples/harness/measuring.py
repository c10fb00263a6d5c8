"""Timing by turns, and what a reader of the figures has to know about them.

What runs in turns is hit alike by whatever else the machine does: a ratio of times of
the same round is worth more than the times themselves. The benchmarks use it, too.
"""

import argparse
import datetime
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_sbn as sbn

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    min_seconds: float = 0.01,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Runs the steps in turns and returns the seconds of each round.

    A step returns something that ``jax.block_until_ready`` can wait for. One that takes
    less than ``min_seconds`` is repeated in each round. ``time.process_time`` as the
    clock leaves out the time that other programs take.
    """
    repeats = {}
    for name, step in steps.items():
        jax.block_until_ready(step())
        begin = clock()
        jax.block_until_ready(step())
        repeats[name] = 1 + int(min_seconds / (clock() - begin))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin = clock()
            for _ in range(repeats[name]):
                result = steps[name]()
            jax.block_until_ready(result)
            seconds[name].append((clock() - begin) / repeats[name])
    return seconds


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median of the ratios of the same round.

    Example:
      >>> median_ratio([1.0, 6.0, 3.0], [2.0, 3.0, 3.0])
      1.0
    """
    return statistics.median(_ratios(times, reference))


def quartiles(
    times: Sequence[float], reference: Sequence[float]
) -> tuple[float, float]:
    """Returns the lower and upper quartile of the ratios of the same round.

    Example:
      >>> quartiles([1.0, 6.0, 3.0], [2.0, 3.0, 3.0])
      (0.75, 1.5)
      >>> quartiles([6.0], [3.0])
      (2.0, 2.0)
    """
    low, high = np.quantile(_ratios(times, reference), (0.25, 0.75))
    return float(low), float(high)


def _ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [mine / other for mine, other in zip(times, reference, strict=True)]


def add_counts(group: Any, **options: tuple[int, str]) -> None:
    """Adds options that are whole numbers, each with its default and a help text."""
    for name, (default, text) in options.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )


def check_positive(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str
) -> None:
    """Ends the program with an error if one of these counts is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def describe_device(*packages: str) -> dict[str, Any]:
    """Returns device, versions, of these packages too, and date."""
    device = jax.devices()[0]
    versions = {"flax_sbn": sbn.__version__}
    for package in (*_PACKAGES, *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["python"] = platform.python_version()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version.split("\n")[-1],
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "versions": versions,
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()
