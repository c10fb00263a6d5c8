"""The sweep: its grid, its results file, and that it goes on where it stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import flax_sbn as sbn
import sweep
from harness import grid, journal
from harness.data import load_digits
from harness.grid import Experiment, GridError
from harness.journal import JournalError

ROOT = Path(__file__).parents[1]
SMALL = ["--model", "mlp", "--width", "16", "--epochs", "1", "--train-size", "256"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_grid_is_every_combination_and_each_once():
    found = grid.experiments(
        {"norm": ["bn", "bs:4", "bn"], "seed": [0, 1], "epochs": 3}
    )
    assert [(e.norm, e.seed, e.epochs) for e in found] == [
        ("bn", 0, 3),
        ("bn", 1, 3),
        ("bs:4", 0, 3),
        ("bs:4", 1, 3),
    ]


def test_a_grid_may_stand_in_a_file(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text('norm = ["bn", "fs:1/64"]\nlearning_rate = 1\nfold = false\n')
    found = grid.experiments(grid.read(path))
    assert [(e.norm, e.learning_rate, e.fold) for e in found] == [
        ("bn", 1.0, False),
        ("fs:1/64", 1.0, False),
    ]


def test_a_norm_may_be_written_as_in_python():
    (found,) = grid.experiments({"norm": "FeatureSampling(1/16, groups=1)"})
    method = found.method()
    assert method.sampler == sbn.FeatureSampling(1 / 16, groups=1)
    assert method.folded


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"norms": "bn"}, "an option, got 'norms'. Did you mean norm?"),
        ({"norm": "xn"}, "Expected a method"),
        ({"norm": []}, "at least one value of norm"),
        ({"model": "vgg"}, "model among .*resnet8.* got 'vgg'"),
        ({"seed": "one"}, "seed of type int, got 'one'"),
        ({"seed": True}, "seed of type int, got True"),
        ({"epochs": 0}, "epochs to be positive, got 0"),
        ({"dataset": "imagenet"}, "dataset among cifar10, digits"),
    ],
)
def test_a_wrong_grid_is_refused(table, message):
    with pytest.raises(GridError, match=message):
        grid.experiments(table)


@pytest.mark.parametrize("content", [None, "norm = ["])
def test_a_wrong_grid_file_is_refused(content, tmp_path):
    path = tmp_path / "grid.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GridError, match="grid in TOML"):
        grid.read(path)


def test_a_journal_returns_what_was_appended(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    with journal.opened(path) as results:
        results.append({"experiment": {"seed": 0}})
        results.append({"experiment": {"seed": 1}})
    assert journal.read(path) == [{"experiment": {"seed": seed}} for seed in (0, 1)]


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_others_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = '{"experiment": {"seed": 0}}\n'
    path.write_text(whole + '{"experiment": {"se')
    assert len(journal.read(path)) == 1
    with journal.opened(path) as results:
        assert "cut off" in results.message
        assert "kept the 1" in results.message
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"experiment": {}}\n{"broken\n{"experiment": {}}\n', "line 2"),
        ('{"benchmark": 1}\n', "another kind of record in line 1"),
        ("[1]\n", "another kind of record in line 1"),
        ("a letter to a friend", "got no line"),
    ],
)
def test_another_file_is_refused_and_left_as_it_is(content, message, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(JournalError, match=message), journal.opened(path):
        pass
    assert path.read_text() == content


def test_a_journal_has_one_writer(tmp_path):
    path = tmp_path / "results.jsonl"
    with (
        journal.opened(path),
        pytest.raises(JournalError, match="another process"),
        journal.opened(path),
    ):
        pass


def test_a_finished_sweep_does_nothing_and_says_so(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    args = [*SMALL, "--norm", "bn", "bs:8", "--results", str(path)]
    assert sweep.main(args) == 0
    before = path.read_bytes()
    assert [line["experiment"]["norm"] for line in lines(path)] == ["bn", "bs:8"]
    capsys.readouterr()
    assert sweep.main(args) == 0
    assert "All 2 training runs are in" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_a_finished_sweep_needs_no_data(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    (experiment,) = grid.experiments({"dataset": "cifar10"})
    record = {"experiment": dataclasses.asdict(experiment), "test_accuracy": [0.5]}
    record["train_loss"] = [1.0]
    path.write_text(json.dumps(record) + "\n")
    args = ["--dataset", "cifar10", "--results", str(path)]
    assert sweep.main(args) == 0
    assert "All 1 training runs are in" in capsys.readouterr().out
    assert sweep.main([*args, "--seed", "1"]) == 2


def test_only_what_is_missing_is_trained(tmp_path):
    path = tmp_path / "results.jsonl"
    args = [*SMALL, "--results", str(path)]
    assert sweep.main([*args, "--seed", "1"]) == 0
    assert sweep.main([*args, "--seed", "0", "1", "2"]) == 0
    assert [line["experiment"]["seed"] for line in lines(path)] == [1, 0, 2]


def test_a_training_is_the_same_in_whatever_sweep(tmp_path):
    alone, beside = tmp_path / "alone.jsonl", tmp_path / "beside.jsonl"
    sweep.main([*SMALL, "--seed", "1", "--results", str(alone)])
    sweep.main([*SMALL, "--seed", "0", "1", "--results", str(beside)])
    (one,), (_, same) = lines(alone), lines(beside)
    assert one["train_loss"] == same["train_loss"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_goes_on(signum, tmp_path):
    path = tmp_path / "results.jsonl"
    seeds = [str(seed) for seed in range(6)]
    args = [*SMALL, "--seed", *seeds, "--results", str(path)]
    command = [sys.executable, str(ROOT / "examples" / "sweep.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists() or not path.read_text().count("\n"):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.wait()
    done = path.read_text().count("\n")
    assert 0 < done <= 6
    assert sweep.main(args) == 0
    assert [line["experiment"]["seed"] for line in lines(path)] == list(range(6))


def test_a_killed_sweep_leaves_no_process_behind(tmp_path):
    path = tmp_path / "results.jsonl"
    seeds = [str(seed) for seed in range(50)]
    args = [*SMALL, "--jobs", "2", "--seed", *seeds, "--results", str(path)]
    command = [sys.executable, str(ROOT / "examples" / "sweep.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while not path.exists() or not path.read_text().count("\n"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)  # the output ends with the last that could write it


def test_two_processes_share_a_sweep(tmp_path):
    path = tmp_path / "results.jsonl"
    args = [*SMALL, "--seed", "0", "1", "--jobs", "2", "--results", str(path)]
    assert sweep.main(args) == 0
    # A thread of the pool, when Python ends, would write to what is closed by then.
    assert not [each for each in threading.enumerate() if "Executor" in repr(each)]
    assert {line["experiment"]["seed"] for line in lines(path)} == {0, 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--norm", "bs:512"], "num_samples"),
        (["--dataset", "cifar10"], "Expected --data-dir"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "to be a folder"),
        (["--image-size", "3"], "divides 8 x 8"),
    ],
)
def test_nothing_starts_where_something_could_not_be_trained(
    args, message, tmp_path, capsys
):
    path = tmp_path / "results.jsonl"
    assert sweep.main([*SMALL, *args, "--results", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_smaller_images_are_means_of_blocks():
    images = load_digits().resized(4).train_images
    blocks = load_digits().train_images.reshape(-1, 4, 2, 4, 2, 1)
    np.testing.assert_allclose(images, blocks.mean((2, 4)), atol=0.5)


def test_an_experiment_of_an_older_file_has_newer_options_by_default():
    assert grid.experiment_of({"experiment": {"seed": 3}}) == Experiment(seed=3)


def test_grids_of_a_file_share_what_stands_before_them(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        'norm = ["bn", "gn"]\nseed = [0, 1]\n'
        '[[grids]]\nnorm_batch_size = [2, 4]\n[[grids]]\nnorm = "bn"\n'
    )
    found = grid.experiments(grid.read(path), seed=3)
    assert [(e.norm, e.norm_batch_size, e.seed) for e in found] == [
        ("bn", 2, 3),
        ("gn", 2, 3),
        ("bn", 4, 3),
        ("gn", 4, 3),
        ("bn", None, 3),
    ]


def test_a_training_that_diverged_is_marked_and_not_averaged():
    wanted = [Experiment(seed=0), Experiment(seed=1)]
    records = [
        {
            "experiment": dataclasses.asdict(experiment),
            "train_loss": [1.0, loss],
            "test_accuracy": [0.1, 0.5],
        }
        for experiment, loss in zip(wanted, (1.0, float("nan")), strict=True)
    ]
    table = sweep.summary(records, wanted)
    assert [*table.columns[-1].cells] == ["50.0%, 1 diverged"]


def test_ctrl_c_before_any_result_shows_no_table(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "train", interrupted)
    path = tmp_path / "results.jsonl"
    assert sweep.main([*SMALL, "--norm", "bn", "gn", "--results", str(path)]) == 130
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("grids", [3, [3], {"norm": "bn"}])
def test_grids_of_another_form_are_refused(grids):
    with pytest.raises(GridError, match="a list of tables"):
        grid.experiments({"grids": grids})


def test_seeds_train_side_by_side_as_they_would_alone(tmp_path):
    together, alone = tmp_path / "together.jsonl", tmp_path / "alone.jsonl"
    args = [*SMALL, "--norm", "bn", "bs:8", "--seed", "0", "1", "2"]
    assert sweep.main([*args, "--together", "2", "--results", str(together)]) == 0
    assert sweep.main([*args, "--results", str(alone)]) == 0
    for one, same in zip(lines(together), lines(alone), strict=True):
        assert one["experiment"] == same["experiment"]
        np.testing.assert_allclose(one["train_loss"], same["train_loss"], rtol=1e-4)
    assert [line["together"] for line in lines(together)] == [2, 2, 1] * 2


def test_the_old_name_of_an_option_is_taken_and_warned_about(tmp_path, capsys):
    (new,) = grid.experiments({"norm_batch_size": 2})
    assert grid.experiments({"rows": 2}) == [new]
    assert "rows is now norm_batch_size" in capsys.readouterr().err
    record = {"experiment": {"rows": 2}}
    assert grid.experiment_of(record) == new
    args = sweep.parse(["--results", str(tmp_path / "x.jsonl"), "--rows=2"])
    assert args.norm_batch_size == [2]
    assert "--rows is now --norm-batch-size" in capsys.readouterr().err
