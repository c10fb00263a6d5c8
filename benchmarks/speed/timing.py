"""What the benchmarks' command lines have in common: options, a time limit, files."""

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from harness.files import replacing

RESULTS = Path(__file__).parents[1] / "results"


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
    add_file_argument(parser)


def add_file_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says where the numbers go."""
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
    with replacing(path) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")


def say(message: str) -> None:
    """Reports progress, apart from the results."""
    print(message, file=sys.stderr, flush=True)
