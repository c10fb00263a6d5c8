"""The script that runs flax's tests: on a small checkout, and on wrong ones."""

import subprocess
import sys

import flax
import pytest

from tests import flax_suite

TESTS = """
import pytest
from flax import linen, nnx

@pytest.mark.parametrize("layer", [linen.BatchNorm, linen.normalization.BatchNorm,
    nnx.BatchNorm, nnx.nn.normalization.BatchNorm], ids=range(4))
def test_differs(layer):
    assert layer.__module__.startswith("flax.")

def test_fails_with_both():
    assert False

def test_passes():
    pass
"""


def checkout(path, version):
    for folder in ("flax", "tests"):
        (path / folder).mkdir()
    (path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (path / "flax" / "version.py").write_text(f"__version__ = '{version}'\n")
    (path / "tests" / "norm_test.py").write_text(TESTS)
    (path / "tests" / "other_test.py").write_text("def test_fails():\n    assert 0\n")


def test_lists_what_fails_with_our_layers_alone(tmp_path):
    checkout(tmp_path, flax.__version__)
    done = subprocess.run(
        [sys.executable, flax_suite.__file__, tmp_path, "--jobs", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-5:] == [
        "fails with flax's own layers, too: tests.norm_test.test_fails_with_both",
        *(f"differs: tests.norm_test.test_differs[{i}]" for i in range(4)),
    ]


@pytest.mark.parametrize(
    ("differs", "status"), [({"a"}, 0), ({"a", "b"}, 1), (set(), 1)]
)
def test_fails_where_other_tests_differ_than_documented(monkeypatch, differs, status):
    monkeypatch.setattr(flax_suite, "DIFFERENT", {"a": "a reason"})
    assert flax_suite.report(differs, set()) == status


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_other_versions_are_refused(tmp_path, version):
    if version:
        checkout(tmp_path, version)
    with pytest.raises(SystemExit, match=r"Expected a checkout of flax .*, got \["):
        flax_suite.files_with_batch_norm(tmp_path)
