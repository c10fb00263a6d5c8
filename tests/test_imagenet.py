"""The long training: what it learns, logs and keeps, and that it goes on as if nothing
had happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagenet
from harness import logs, pipeline, resumable
from tests import pictures

STEPS = 9  # three epochs
SMALL = (
    *("--model", "mlp", "--width", "8", "--norm", "bs:4+vdn:2", "--devices", "1"),
    *("--image-size", "8", "--batch-size", "16", "--epochs", "3", "--threads", "1"),
    *("--dtype", "float32", "--log-every", "1", "--checkpoint-every", "2"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures.write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def whole(images):
    """A training without interruption, the same for all tests."""
    out = images / "whole"
    if not out.exists():
        assert train(images, out) == 0
    return out


def train(images, out, *more):
    return imagenet.main([str(images), "--out", str(out), *SMALL, *more])


def steps_kept(out):
    names = (path.name for path in (out / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def assert_same_training(whole, out):
    """Every loss that was ever logged, and all bytes of the last checkpoint."""
    expected, found = pictures.logged(whole), pictures.logged(out)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, values in found.items():
        assert {*values} == {*expected[step]}
    for tag in ("test/top1", "test/top5", "train/learning_rate"):
        last = [pictures.logged(folder, tag)[STEPS][-1] for folder in (whole, out)]
        assert last[0] == last[1]
    first, second = (arrays(folder) for folder in (whole, out))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def arrays(out):
    import orbax.checkpoint as ocp

    path = (out / "checkpoints" / str(steps_kept(out)[-1]) / "state").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path)
    return {**state, "key": jax.random.key_data(state["key"])}


def test_a_training_logs_every_step_and_every_evaluation(whole) -> None:
    losses = pictures.logged(whole)
    assert [*losses] == [*range(1, STEPS + 1)]
    speeds = pictures.logged(whole, "train/images_per_second")
    assert [*speeds] == [*range(2, STEPS + 1)]  # the first step compiles
    assert min(*speeds.values()) > [0]
    accuracies = pictures.logged(whole, "test/top1")
    assert [*accuracies] == [3, 6, 9]
    assert set(np.concatenate([*pictures.logged(whole, "test/top5").values()])) == {1}
    whole_images = np.array([*accuracies.values()]) * pictures.TEST
    np.testing.assert_allclose(whole_images, np.round(whole_images), atol=1e-5)


def test_the_last_checkpoints_are_kept_and_the_best(whole, images, tmp_path) -> None:
    accuracies = pictures.logged(whole, "test/top1")
    best = max(accuracies, key=lambda step: (accuracies[step][-1], step))
    assert set(steps_kept(whole)) == {6, 8, 9} | {best}


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_training_that_goes_on_is_the_same(whole, images, tmp_path, stop) -> None:
    assert train(images, tmp_path, "--max-steps", str(stop)) == 0
    assert steps_kept(tmp_path)[-1] == stop
    assert train(images, tmp_path) == 0
    assert_same_training(whole, tmp_path)


def test_sigterm_saves_and_the_training_goes_on(
    whole, images, tmp_path, monkeypatch, capsys
) -> None:
    add = logs.Log.add

    def terminated(log, step, totals) -> None:
        add(log, step, totals)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(logs.Log, "add", terminated)
        assert train(images, tmp_path) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps_kept(tmp_path)[-1] == 5
    assert "Stopped" in capsys.readouterr().out
    assert train(images, tmp_path) == 0
    assert_same_training(whole, tmp_path)


def test_a_killed_training_goes_on_and_is_the_same(whole, images, tmp_path) -> None:
    script = Path(imagenet.__file__)
    command = [sys.executable, script, images, "--out", tmp_path, *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert train(images, tmp_path) == 0
    assert_same_training(whole, tmp_path)


def break_state(checkpoint) -> None:
    for file in (checkpoint / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def remove_state(checkpoint) -> None:
    shutil.rmtree(checkpoint / "state")


def remove_settings(checkpoint) -> None:
    (checkpoint / "settings" / "metadata").unlink()


@pytest.mark.parametrize("damage", [break_state, remove_state, remove_settings])
@pytest.mark.filterwarnings(  # of readers that are still at it
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_a_broken_checkpoint_is_set_aside(whole, images, tmp_path, damage) -> None:
    assert train(images, tmp_path, "--max-steps", "6") == 0
    damage(tmp_path / "checkpoints" / "6")
    with pytest.warns(UserWarning, match="step 6 cannot be read and is set aside"):
        assert train(images, tmp_path) == 0
    assert (tmp_path / "checkpoints" / "broken-6").is_dir()
    assert_same_training(whole, tmp_path)


def test_without_a_whole_checkpoint_nothing_begins(images, tmp_path, capsys) -> None:
    assert train(images, tmp_path, "--max-steps", "1") == 0
    remove_state(tmp_path / "checkpoints" / "1")
    with pytest.warns(UserWarning, match="set aside"):
        assert train(images, tmp_path) == 2
    assert "Begin anew in another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--norm", "bn"], r"norm='bs:4\+vdn:2', and this one norm='bn'"),
        (["--width", "16"], r"width=8, and this one width=16"),
        (["--epochs", "5"], r"epochs=3, and this one epochs=5"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    whole, images, capsys, more, message
) -> None:
    before = arrays(whole)
    assert train(images, whole, *more) == 2
    assert re.search(message, capsys.readouterr().err)
    jax.tree.map(np.testing.assert_array_equal, before, arrays(whole))


def test_a_checkpoint_of_another_version_is_refused(
    whole, images, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(imagenet.sbn, "__version__", "9.0")
    assert train(images, whole) == 2
    assert re.search(r"flax_sbn='0\.\S+', and this", capsys.readouterr().err)


def test_parameters_that_are_not_finite_are_never_saved(
    images, tmp_path, capsys, monkeypatch
) -> None:
    assert train(images, tmp_path, "--max-steps", "2") == 0
    monkeypatch.setattr(resumable, "MEAN", resumable.MEAN * np.nan)
    assert train(images, tmp_path) == 1
    assert "not finite after step 3" in capsys.readouterr().err
    assert steps_kept(tmp_path) == [2]


def test_a_folder_of_something_else_is_left_alone(images, tmp_path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert train(images, tmp_path) == 2
    assert "Expected --out to be a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "Expected nowhere to be a folder"),
        (["--fake-data", "--norm", "nonsense"], "Expected a method"),
        (["--fake-data", "--norm", "ba:2"], "without batch augmentation"),
        (["--fake-data", "--norm", "bs:99"], "num_samples=99"),
        (["--fake-data", "--devices", "3"], "multiple of devices"),
        (["--fake-data", "--devices", "99"], "at most the 8 devices"),
        (["--fake-data", "--accumulate", "3"], r"1 x 3\), got batch_size=16"),
        (["--fake-data", "--label-smoothing", "2"], "label_smoothing=2"),
        (["--fake-data", "--warmup", "-1"], "warmup=-1"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, argv, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert imagenet.main([*SMALL, *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["DIR", "--fake-data"],
        ["DIR", "--keep", "0"],
        ["DIR", "--distributed"],
        ["DIR", "--out", "x", "--distributed", "localhost:1", "2", "2"],
        ["DIR", "--out", "x", "--distributed", "localhost:1"],
    ],
)
def test_bad_options_are_told_by_the_parser(argv, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        imagenet.main(argv)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_refused_or_counted(
    images, tmp_path, capsys
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    shutil.rmtree(folder / "whole", ignore_errors=True)
    for split in ("train", "val"):
        file = next((folder / split / "digit-0").iterdir())
        file.write_bytes(file.read_bytes()[:40])
    assert train(folder, tmp_path / "refused") == 2
    assert re.search(r"Expected an image in .*digit-0", capsys.readouterr().err)
    out = tmp_path / "skipped"
    assert train(folder, out, "--unreadable", "skip", "--max-steps", "3") == 0
    printed = capsys.readouterr().out
    assert "1 times an image could not be read" in printed
    assert f"of {pictures.TEST - 1} images" in printed


@pytest.mark.parametrize("more", [["--norm-batch-size", "2"], ["--accumulate", "2"]])
def test_eight_devices_train_on_noise(tmp_path, capsys, more) -> None:
    argv = ["--fake-data", "--out", str(tmp_path), *SMALL, "--devices", "8"]
    argv += ["--norm", "bn", "--max-steps", "2", "--num-classes", "3", *more]
    assert imagenet.main(argv) == 0
    losses = pictures.logged(tmp_path)
    assert np.isfinite([*losses.values()]).all()
    found = re.search(
        r"step 2: .*loss (\S+)  train acc \S+%  \S+ images/s", capsys.readouterr().out
    )
    assert float(found[1]) == pytest.approx(losses[2][0], abs=6e-4)
    assert steps_kept(tmp_path) == [2]


def test_a_training_goes_on_with_another_number_of_devices(images, tmp_path) -> None:
    options = ["--norm", "bn", "--devices"]
    assert train(images, tmp_path, *options, "1", "--max-steps", "4") == 0
    assert train(images, tmp_path, *options, "8") == 0
    assert [*pictures.logged(tmp_path)] == [*range(1, STEPS + 1)]


def test_a_convolutional_network_learns_in_half_precision(images, tmp_path) -> None:
    more = ["--model", "resnet8", "--norm", "fs:1/16", "--dtype", "bfloat16"]
    assert train(images, tmp_path, *more, "--epochs", "10") == 0
    assert pictures.logged(tmp_path, "test/top1")[30][0] > 0.8


def test_hits_are_counted_among_the_first_five() -> None:
    argv = ["--fake-data", "--num-classes", "10", *SMALL]
    training = imagenet.make_training(imagenet.parse(argv))
    logits = np.random.default_rng(0).normal(size=(64, 10))
    labels = np.arange(64) % 11 - 1
    training.learner.evaluate = lambda variables, images: jnp.asarray(logits)
    first, five, count = training._correct(None, None, jnp.asarray(labels))
    order = np.argsort(-logits)
    assert first == (order[:, 0] == labels).sum()
    assert five == (order[:, :5] == labels[:, None]).sum()
    assert count == (labels >= 0).sum() < 64


def test_the_pipeline_is_asked_for_the_batch_after_the_checkpoint(
    images, tmp_path, monkeypatch
) -> None:
    begins = []
    train_of = pipeline.DiskInput.train

    def spied(self, begin):
        begins.append(begin)
        return train_of(self, begin)

    monkeypatch.setattr(pipeline.DiskInput, "train", spied)
    train(images, tmp_path, "--max-steps", "2")
    train(images, tmp_path, "--max-steps", "4")
    train(images, tmp_path, "--max-steps", "4")
    assert begins == [0, 2]
