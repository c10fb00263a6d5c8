"""Timing by turns, and what a reader of the figures has to know about them.

What runs in turns is hit alike by whatever else the machine does: a ratio of times of
the same round is worth more than the times themselves.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import flax_sbn as sbn

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


def interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int, min_seconds: float = 0.01
) -> dict[str, list[float]]:
    """Runs the steps in turns and returns the seconds of each round.

    A step returns something that ``jax.block_until_ready`` can wait for. One that takes
    less than ``min_seconds`` is repeated in each round.
    """
    repeats = {}
    for name, step in steps.items():
        jax.block_until_ready(step())
        begin = time.perf_counter()
        jax.block_until_ready(step())
        repeats[name] = 1 + int(min_seconds / (time.perf_counter() - begin))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                result = steps[name]()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
    return seconds


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the median of the ratios of the same round.

    Example:
      >>> median_ratio([1.0, 6.0, 3.0], [2.0, 3.0, 3.0])
      1.0
    """
    return statistics.median(
        mine / other for mine, other in zip(times, reference, strict=True)
    )


class Deadline:
    """When to stop starting new measurements: ``minutes`` from now, or never."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._last = time.monotonic()
        self._longest = 0.0

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self._end - time.monotonic()

    def allows_another(self) -> bool:
        """Returns whether what takes as long as the longest so far would end in time.

        Ask before each.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        return self.left() >= self._longest


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the options that all timings have."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        metavar="N",
        help="measurements of each variant (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="X",
        help="start nothing that would take longer (default: measure everything)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="new file for the numbers (default: one in benchmarks/results)",
    )


def new_path(parser: argparse.ArgumentParser, wanted: Path | None, name: str) -> Path:
    """Returns where the numbers go: a file that does not exist yet."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = wanted or RESULTS / f"{name.format(device=device)}-{stamp}.json"
    if path.exists():
        parser.error(f"--json: {path} exists; give a new name")
    return path


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes or replaces a report as a whole, so that none is ever half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def describe() -> dict[str, Any]:
    """Returns device, versions and date."""
    device = jax.devices()[0]
    versions = {"flax_sbn": sbn.__version__}
    for package in _PACKAGES:
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


def say(message: str) -> None:
    """Reports progress, apart from the results."""
    print(message, file=sys.stderr, flush=True)
