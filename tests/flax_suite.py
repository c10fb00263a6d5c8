"""Runs flax's own tests with our batch norms in place of flax's; lists what differs.

Not one of our tests, but a script: ``make flax-tests FLAX=folder``, with a checkout of
flax of the installed version. All files of its tests run that name batch norm: those of
normalization, summaries, transforms, bridges and modules. What fails runs again with
flax's own layers: a test differs if it passes then. The exit status is 1 if others
differ than those in ``DIFFERENT``.

pytest loads this file as a plugin, too, to replace the layers before it imports tests.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import flax
from flax import linen, nnx

import flax_sbn as sbn

# Documented differences: the test and the reason.
DIFFERENT: dict[str, str] = {}

_HERE = Path(__file__).parent
_ENVIRONMENT = {
    # As in flax's tests/run_all_tests.sh.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "FLAX_PROFILE": "1",
    # Our tests leave optimizations out. One of flax's needs the rounding with them.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(_HERE), str(_HERE.parent)]),
    "PYTHONSAFEPATH": "1",  # the installed flax, not that of the checkout
}


def pytest_configure() -> None:
    """Replaces flax's layers, wherever flax names them."""
    for module in (linen, linen.normalization):
        module.BatchNorm = sbn.linen.BatchNorm
    for module in (nnx, nnx.nn.normalization):
        module.BatchNorm = sbn.nnx.BatchNorm


def pytest_report_header() -> str:
    """Says which layers are tested."""
    return f"layers: {linen.BatchNorm}, {nnx.BatchNorm}"


def main() -> None:
    """Runs the tests, prints what differs and exits with 1 if it should not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder with flax and its tests")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args()
    files = files_with_batch_norm(arguments.checkout.resolve())
    with tempfile.TemporaryDirectory() as cache:
        command = [f"--numprocesses={arguments.jobs}", "-o", f"cache_dir={cache}"]
        command += map(str, files)
        ours = failures(*command, "-p", Path(__file__).stem)
        theirs = failures(*command, "--last-failed") if ours else set()
    sys.exit(report(ours - theirs, theirs))


def files_with_batch_norm(checkout: Path) -> Sequence[Path]:
    """Returns the files of a checkout's tests that name batch norm.

    Raises:
      SystemExit: if it is none, or of another version of flax than the installed one.
    """
    version = checkout / "flax" / "version.py"
    text = version.read_text() if version.exists() else ""
    got = re.findall(r"^__version__ = '(.*)'$", text, re.MULTILINE)
    if got != [flax.__version__]:
        sys.exit(
            f"Expected a checkout of flax {flax.__version__}, got {got} in {version}. "
            f"Check out the tag v{flax.__version__}, or the commit nearest to it."
        )
    tests = sorted((checkout / "tests").rglob("*_test.py"))
    return [test for test in tests if "BatchNorm" in test.read_text()]


def failures(*arguments: str) -> set[str]:
    """Runs pytest, and returns the names of the tests that failed.

    Raises:
      SystemExit: if pytest itself failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".xml") as results:
        options = (
            *("--tb=short", "--continue-on-collection-errors"),
            f"--junit-xml={results.name}",
        )
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        status = subprocess.run(command, env=os.environ | _ENVIRONMENT).returncode
        if status not in (0, 1):  # passed, failed
            sys.exit(status)
        return {
            f"{case.get('classname')}.{case.get('name')}"
            for case in ET.parse(results.name).iter("testcase")
            if {"failure", "error"} & {outcome.tag for outcome in case}
        }


def report(differs: set[str], fails: set[str]) -> int:
    """Prints what differs, and returns the exit status.

    Args:
      differs: tests that fail with our layers alone.
      fails: tests that fail with flax's own layers, too.
    """
    for test in sorted(fails):
        print(f"fails with flax's own layers, too: {test}")
    for test in sorted(differs & DIFFERENT.keys()):
        print(f"differs as documented: {test}: {DIFFERENT[test]}")
    for test in sorted(differs - DIFFERENT.keys()):
        print(f"differs: {test}")
    for test in sorted(DIFFERENT.keys() - differs):
        print(f"differs no longer, but is documented to: {test}")
    return int(differs != DIFFERENT.keys())


if __name__ == "__main__":
    main()
