"""Training on several devices and in several processes, and what they agree on."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import imagenet
import train
from harness import methods, processes
from harness.data import load_digits
from harness.networks import Settings
from harness.training import Trainer, to_device
from tests import pictures
from tests.devices import collectives

DIGITS = load_digits().limited(256)
EXAMPLES = Path(train.__file__).parent


def trainer_of(name, devices, **settings):
    data = to_device(DIGITS, processes.make_mesh(devices))
    settings = {"model": "mlp", "width": 16, "epochs": 2, "batch_size": 64, **settings}
    return Trainer(Settings(**settings), methods.parse(name).fold(), data)


def all_reduces(trainer) -> int:
    data = trainer.data
    found = collectives(trainer.step, trainer.init(0), data.images, data.labels)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    return len(found)


def test_each_device_has_its_part_of_images_and_order() -> None:
    trainer = trainer_of("bn", 8)
    images = trainer.data.images
    assert images.shape[0] == 256
    assert {s.data.shape[0] for s in images.addressable_shards} == {32}
    state = trainer._alone.start_epoch(trainer.init(0))
    order = np.asarray(state.order)
    assert (np.sort(order, 1) == np.arange(32)).all()
    assert len({tuple(row) for row in order}) == 8
    batch = trainer._pick(state, trainer.data.labels)
    parts = np.asarray(trainer.data.labels).reshape(8, 32)
    expected = [part[turn[:8]] for part, turn in zip(parts, order, strict=True)]
    np.testing.assert_array_equal(batch, np.concatenate(expected))


def test_images_that_devices_cannot_share_are_left_out() -> None:
    data = to_device(DIGITS.limited(203), processes.make_mesh(8))
    assert len(data.images) == 200
    assert all(len(labels) % 8 == 0 for _, labels in data.test)
    assert sum(int((labels >= 0).sum()) for _, labels in data.test) == data.num_test


def test_a_step_with_images_of_each_device_sums_once() -> None:
    # Gradients, statistics and totals together.
    trainer = trainer_of("bs:4", 8, norm_batch_size=8)
    assert all_reduces(trainer) == 1
    assert all_reduces(trainer_of("bn", 8)) > 2


@pytest.mark.parametrize("together", [8, 4, 16])
def test_images_are_normalized_alike_on_one_device_and_many(together) -> None:
    """The same groups of images, on devices of their own or side by side on one."""
    images, key = np.asarray(DIGITS.train_images[:64]), jax.random.key(0)
    forwards = []
    for devices in (1, 8):
        trainer = trainer_of("bs:4+vdn:2", devices, norm_batch_size=together)
        variables = trainer.init(0).model.variables
        forward = jax.jit(trainer.learner.forward)(variables, images, key, key)
        forwards.append(jax.tree.leaves(forward))
    for first, second in zip(*forwards, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_micro_batches_follow_each_other_and_their_gradients_are_averaged() -> None:
    learner = trainer_of("bs:4", 1, accumulate=4).learner
    images, labels = DIGITS.train_images[:64], DIGITS.train_labels[:64]
    key = jax.random.key(1)
    model = learner.init(jax.random.key(0), images)
    whole = jax.jit(learner._accumulate)(model.variables, images, labels, key, key)
    each = jax.jit(learner._gradients)
    variables, sums = model.variables, None
    for number, one in enumerate(jax.random.split(key, 4)):
        part = slice(number, None, 4)
        variables, *more = each(variables, images[part], labels[part], one, one)
        sums = more if sums is None else jax.tree.map(np.add, sums, more)
    totals, gradients = sums
    expected = variables, totals, jax.tree.map(lambda g: g / 4, gradients)
    for one, other in zip(*map(jax.tree.leaves, (whole, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_micro_batches_without_a_norm_change_nothing_but_rounding() -> None:
    """On eight devices, each of which has images of every micro-batch."""
    images, labels = DIGITS.train_images[:64], DIGITS.train_labels[:64]
    updated = []
    for devices, accumulate in ((1, 1), (8, 4)):
        trainer = trainer_of("none", devices, accumulate=accumulate)
        model, key = trainer.init(0).model, jax.random.key(0)
        update = jax.jit(trainer.learner.update)(model, images, labels, key, key)
        updated.append(jax.tree.leaves(update))
    for one, other in zip(*updated, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8 x 1\), got batch_size=60"):
        trainer_of("bn", 8, batch_size=60)
    with pytest.raises(ValueError, match=r"\(8 x 3\), got batch_size=64"):
        trainer_of("bn", 8, accumulate=3)


def test_one_process_agrees_with_itself() -> None:
    assert processes.agree(argparse.Namespace(epochs=3), None) is None
    assert processes.agree(argparse.Namespace(epochs=3), "no folder") == "no folder"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"settings": {"epochs": 4}, "problem": None}, "epochs=3 in process 0 and 4"),
        ({"settings": {"epochs": 3}, "problem": "no disk"}, "In process 1: no disk"),
    ],
)
def test_what_processes_do_not_agree_on_is_named(monkeypatch, others, message) -> None:
    theirs = json.dumps(others).encode()

    def gather(array):
        if array.size == 1:
            return np.stack([array, [len(theirs)]])
        row = np.frombuffer(theirs.ljust(array.size), np.uint8)
        return np.stack([array, row])

    monkeypatch.setattr(processes, "_gather", gather)
    assert message in processes.agree(argparse.Namespace(epochs=3), None)


def run(script, *argv, devices, count):
    """Runs a script in so many processes that meet; returns statuses and output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        here = [a[index] if isinstance(a, tuple) else a for a in argv]
        meet = ["--distributed", address, str(count), str(index)]
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / script, *here, *meet],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [p.returncode for p in started], outputs


def test_two_processes_train_as_one_does(tmp_path) -> None:
    argv = ("--model", "mlp", "--width", "16", "--epochs", "1", "--seeds", "1")
    argv += ("--norm", "BatchSampling(8, strata=8)", "--train-size", "512", "--out")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*argv, str(one), "--devices", "8"]) == 0
    statuses, outputs = run("train.py", *argv, str(two), devices=4, count=2)
    assert statuses == [0, 0], outputs
    results = [
        json.loads((out / "results.json").read_text())["runs"] for out in (one, two)
    ]
    ((one,), (two,)) = results
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    np.testing.assert_allclose(one["test_accuracy"], two["test_accuracy"])


def test_processes_with_other_settings_all_end_before_any_work(tmp_path) -> None:
    statuses, outputs = run(
        "train.py",
        *("--model", "mlp", "--epochs", ("1", "2"), "--out", str(tmp_path / "out")),
        devices=1,
        count=2,
    )
    assert statuses == [2, 2]
    for _, error in outputs:
        assert "epochs=1 in process 0 and 2 in process 1" in error
    assert not (tmp_path / "out").exists()


def test_two_processes_go_on_where_one_ended_and_write_one_checkpoint(tmp_path):
    """The last checkpoint is broken; both set it aside, and use the one before."""
    images, out = pictures.write_folder(tmp_path / "images"), tmp_path / "out"
    argv = [str(images), "--model", "mlp", "--width", "8", "--norm", "bs:4"]
    argv += ["--image-size", "8", "--batch-size", "16", "--epochs", "2"]
    argv += ["--norm-batch-size", "4"]
    argv += ["--dtype", "float32", "--log-every", "1", "--checkpoint-every", "4"]
    argv += ["--threads", "1", "--out", str(out)]
    assert imagenet.main([*argv, "--devices", "4"]) == 0
    shutil.rmtree(out / "checkpoints" / "6" / "state")
    statuses, outputs = run("imagenet.py", *argv, devices=2, count=2)
    assert statuses == [0, 0], outputs
    assert "Goes on after step 4 of 6" in outputs[0][0]
    assert all("step 6 cannot be read" in error for _, error in outputs)
    assert {"4", "6", "broken-6"} <= {p.name for p in (out / "checkpoints").iterdir()}
    assert (out / "checkpoints" / "6" / "state").is_dir()
    assert len([*out.glob("events.*")]) == 2  # one of the two processes
    losses = pictures.logged(out)
    assert [len(losses[step]) for step in range(1, 7)] == [1, 1, 1, 1, 2, 2]
    assert np.isfinite(np.concatenate([*losses.values()])).all()
