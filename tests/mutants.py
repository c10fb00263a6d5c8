"""Changes the package in small ways, one at a time, and says which no test notices.

    python tests/mutants.py --count 120 --jobs 2

Each mutant is one edit of one file: another operator or comparison, a larger number,
a mean for a variance, a condition turned around, a gradient that is not stopped. The
tests of that file run in a copy of the tree until one fails, then those of all layers.
A mutant that survives is either equivalent, or a test is missing. By hand, as it takes
ten minutes to an hour. The same seed draws the same mutants as long as the files are
the same: with --json the same command goes on where an earlier one ended.
"""

import argparse
import ast
import concurrent.futures
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from harness import journal

ROOT = Path(__file__).parents[1]
# Left out: what only complains, documents, or is there for static types.
_LEFT_OUT = ("__init__.py", "arguments.py")
_SWAPS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
_OTHER = {"mean": "var", "var": "mean", "scale": "bias", "minimum": "maximum"}
# Tests of a file beyond those of its name, most telling first.
_TESTS = {
    "batched_slice": ["xla", "test_windows.py"],
    "transposes": ["xla"],
    "half_precision": ["test_folding_bfloat16.py"],
    "sharding": ["test_explicit_sharding.py", "test_data_parallel.py"],
    "hooks": ["test_linen.py", "test_nnx.py", "alternatives"],
    "switching": ["modules"],
    "estimation": ["modules"],
    "same_outputs": ["modules/test_same_outputs.py"],
    "as_stored": ["test_export.py"],
    "statistics": ["alternatives/test_batch_renorm.py", "test_devices.py"],
    "linear_layers": ["test_conv_norm_options.py", "test_folding_errors.py"],
    "moments": ["test_statistics.py", "test_devices.py"],
    "sampled_layer": ["test_folding.py", "test_folding_bfloat16.py"],
    "fixed_fold": ["test_folding.py", "test_folding_gradients.py", "test_lattice.py"],
    "linear_norm": [
        "test_conv_norm.py",
        "test_conv_norm_options.py",
        "test_conv_norm_models.py",
    ],
    "dense_norm": ["test_conv_norm.py", "test_conv_norm_options.py"],
    "batch_norm": ["test_linen.py", "test_nnx.py"],
    "preconditioning": ["optim"],
    "input_statistics": ["optim"],
    "activation": ["test_folding.py", "test_folding_bfloat16.py"],
    "lattice": ["test_lattice.py", "test_sampling.py"],
    "entropy": ["alternatives/test_shade.py"],
    "batch_renormalization": ["alternatives/test_batch_renorm.py"],
    "depthwise": ["alternatives/test_bnet.py"],
    "schedules": ["alternatives/test_batch_renorm.py"],
    "loss": ["alternatives/test_shade.py", "alternatives/test_batchless.py"],
}
# Of a survivor of those.
_ALL = [f"test_{name}.py" for name in ("api", "every_layer", "folding", "linen", "nnx")]
_MINUTES = 20


class Mutant(NamedTuple):
    """One edit: ``new`` in place of ``old``, at an offset in a file's text."""

    path: str
    line: int
    offset: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old!r} -> {self.new!r}"

    def applied(self, text: str) -> str:
        """Returns the file's text with the edit."""
        end = self.offset + len(self.old)
        assert text[self.offset : end] == self.old
        return text[: self.offset] + self.new + text[end:]


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yields all edits of a file that leave it a program."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    name = str(path.relative_to(ROOT))

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column  # the files are ASCII

    def edit(begin: int, end: int, old: str, new: str) -> Mutant | None:
        offset = text.find(old, begin, end)
        if offset < 0:
            return None
        return Mutant(name, text.count("\n", 0, offset) + 1, offset, old, new)

    def between(op: ast.AST, left: ast.expr, right: ast.expr) -> Mutant | None:
        if type(op) not in _SWAPS:
            return None
        begin = at(left.end_lineno or 0, left.end_col_offset or 0)
        end = at(right.lineno, right.col_offset)
        return edit(begin, end, *_SWAPS[type(op)])

    for node in _code(ast.parse(text)):
        begin, end = 0, 0
        if isinstance(node, ast.expr):
            begin = at(node.lineno, node.col_offset)
            end = at(node.end_lineno or 0, node.end_col_offset or 0)
        found: list[Mutant | None] = []
        match node:
            case ast.BinOp(left, op, right):
                found = [between(op, left, right)]
            case ast.Compare(left, [op], [right]):
                found = [between(op, left, right)]
            case ast.BoolOp(op, [left, right, *_]):
                found = [between(op, left, right)]
            case ast.UnaryOp(ast.Not()):
                found = [edit(begin, end, "not ", "")]
            case ast.UnaryOp(ast.USub()):
                found = [edit(begin, end, "-", "")]
            case ast.Constant(bool(value)):
                found = [edit(begin, end, str(value), str(not value))]
            case ast.Constant(int(value)):
                found = [edit(begin, end, text[begin:end], str(value + 1))]
            case ast.Attribute(value, attr) if attr in _OTHER:
                after = at(value.end_lineno or 0, value.end_col_offset or 0)
                found = [edit(after, end, f".{attr}", f".{_OTHER[attr]}")]
            case ast.Call(ast.Attribute(attr="stop_gradient") as function, [_]):
                what = ast.get_source_segment(text, function) or ""
                found = [edit(begin, end, what, "")]
            case ast.If(test) | ast.IfExp(test):
                first = at(test.lineno, test.col_offset)
                last = at(test.end_lineno or 0, test.end_col_offset or 0)
                what = text[first:last]
                found = [edit(first, last, what, f"not ({what})")]
        yield from filter(None, found)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what is computed: no annotations, decorators, texts or complaints."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import):
                continue
            if isinstance(child, ast.AST):
                yield child
                yield from _code(child)


def tests_of(path: str) -> list[str]:
    """Returns the tests that a file's mutants have to survive, most telling first."""
    stem = Path(path).stem
    own = [*_TESTS.get(stem, [])]
    for candidate in (f"test_{stem}.py", f"alternatives/test_{stem}.py"):
        if (ROOT / "tests" / candidate).exists():
            own.insert(0, candidate)
    return [f"tests/{test}" for test in dict.fromkeys([*own, *_ALL])]


def killer(mutant: Mutant, tree: Path) -> str | None:
    """Returns the first of its tests that fails in a copy of the tree, if one does."""
    path = tree / mutant.path
    text = path.read_text()
    path.write_text(mutant.applied(text))
    command = [sys.executable, "-m", "pytest", "-x", "-q", path, *tests_of(mutant.path)]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=60 * _MINUTES,
        )
        if done.returncode not in (0, 1, 2):  # passed, failed, could not be imported
            raise RuntimeError(f"The tests of {mutant} did not run: {command}.")
        if done.returncode == 0:
            return None
        failed = re.search(
            r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE
        )
        return failed[1] if failed else "the import"
    except subprocess.TimeoutExpired:
        return f"the limit of {_MINUTES} minutes"
    finally:
        path.write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws and runs mutants; returns how many survive."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=120, metavar="N", help="mutants")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at a time")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="files whose path has this in it"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results, to which others are added"
    )
    args = parser.parse_args(argv)
    files = [
        path
        for path in sorted((ROOT / "flax_sbn").rglob("*.py"))
        if path.name not in _LEFT_OUT and args.only in str(path)
    ]
    every = [mutant for path in files for mutant in mutants_of(path)]
    chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    print(f"{len(chosen)} of {len(every)} mutants of {len(files)} files")
    with (
        tempfile.TemporaryDirectory() as folder,
        journal.opened(args.json or Path(folder) / "results.jsonl") as results,
    ):
        killers = {Mutant(**r["experiment"]): r["killer"] for r in results.records}
        left = [mutant for mutant in chosen if mutant not in killers]
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(args.jobs):
            trees.put(_copy(Path(folder) / str(i)))

        def run(mutant: Mutant) -> str | None:
            tree = trees.get()
            try:
                return killer(mutant, tree)
            finally:
                trees.put(tree)

        with (
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
            Progress() as bar,
        ):
            found = bar.track(pool.map(run, left), len(left))
            for mutant, by in zip(left, found, strict=True):
                killers[mutant] = by
                results.append({"experiment": mutant._asdict(), "killer": by})
    survivors = [mutant for mutant in chosen if killers[mutant] is None]
    for mutant in survivors:
        print(f"survives: {mutant}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are noticed")
    return len(survivors)


def _copy(tree: Path) -> Path:
    """Returns a copy of the files that git knows."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return tree


if __name__ == "__main__":
    sys.exit(min(main(), 255))
