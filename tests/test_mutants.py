"""The script that changes the package: its edits are programs, and other ones."""

import ast

import pytest

from tests import mutants

SAMPLED = ["lattice.py", "statistics.py", "linen/linear_norm.py", "nnx/switching.py"]


@pytest.mark.parametrize("name", SAMPLED)
def test_every_mutant_is_another_program(name) -> None:
    path = mutants.ROOT / "flax_sbn" / name
    text = path.read_text()
    before, found = ast.dump(ast.parse(text)), [*mutants.mutants_of(path)]
    assert len(found) > 20
    assert len({mutant.applied(text) for mutant in found}) == len(found)
    for mutant in found:
        assert ast.dump(ast.parse(mutant.applied(text))) != before


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("y = a - b", "y = a + b"),
        ("y = x[1:]", "y = x[2:]"),
        ("y = s.mean", "y = s.var"),
        ("y = lax.stop_gradient(x)", "y = (x)"),
        ("y = not x", "y = x"),
        ("y = -x", "y = x"),
        ("y = f(x, flag=True)", "y = f(x, flag=False)"),
        ("y = 0 if x else a", "y = 0 if not (x) else a"),
    ],
)
def test_what_is_changed(source, changed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text(source)
    assert changed in [mutant.applied(source) for mutant in mutants.mutants_of(path)]


def test_there_are_all_the_tests_that_a_mutant_has_to_survive() -> None:
    for stem in mutants._TESTS:
        for path in mutants.tests_of(f"{stem}.py"):
            assert (mutants.ROOT / path).exists(), path


def test_complaints_and_annotations_are_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text('def f(x: A[1]) -> B[2]:\n    raise E(f"{x + 1}")\n')
    assert not [*mutants.mutants_of(path)]
