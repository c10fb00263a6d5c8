"""The script that changes the package: its edits are programs, and other ones."""

import ast

import pytest

from tests import mutants

SAMPLED = ["lattice.py", "statistics.py", "linen/switching.py", "nnx/switching.py"]


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


def test_results_are_kept_and_not_computed_again(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "flax_sbn").mkdir()
    (tmp_path / "flax_sbn" / "file.py").write_text("y = a - b\nz = a * b\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "_copy", lambda tree: tree)
    tried = []

    def killer(mutant, tree):
        tried.append(mutant.old)
        return None if mutant.old == "*" else "a test"

    monkeypatch.setattr(mutants, "killer", killer)
    results = tmp_path / "results.jsonl"
    argv = ["--json", str(results), "--count"]
    for count in ("1", "2", "2"):
        found = mutants.main([*argv, count])
        with results.open("a") as file:
            file.write('{"experiment": "cut')  # while it was written
    assert found == 1
    assert sorted(tried) == ["*", "-"]
    assert "survives: flax_sbn/file.py:2: '*' -> '/'" in capsys.readouterr().out
