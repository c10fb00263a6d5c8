"""The training example: what it is told, what it does, what it leaves behind."""

import csv
import dataclasses
import functools
import json
import math
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import flax_sbn as sbn
import train
from harness import files, methods, tasks
from harness.comparison import Report, Run
from harness.data import load_digits
from harness.networks import NETWORKS, Settings
from harness.training import Trainer, to_device

SMALL = ["--model", "mlp", "--width", "16", "--epochs", "2", "--seeds", "1"]
DIGITS = to_device(load_digits().limited(256))


@functools.cache
def made_of_digits(name):
    """A few examples for training, and for the test."""
    data = tasks.load(name).limited(64)
    few = {each: getattr(data, each)[:64] for each in ("test_images", "test_labels")}
    return to_device(dataclasses.replace(data, **few))


def small_trainer(name: str, **settings: object) -> Trainer:
    settings = {"model": "resnet8", "width": 16, "epochs": 1, **settings}
    return Trainer(Settings(**settings), methods.parse_method(name), DIGITS)


@pytest.mark.parametrize(
    ("text", "sampler"),
    [
        ("bn", None),
        ("ns:1", sbn.NaiveSampling(1)),
        ("bs", sbn.BatchSampling(4)),
        ("fs:1/16", sbn.FeatureSampling(1 / 16)),
        ("vdn:3", sbn.VirtualSampling(3)),
        (
            "bs:8+vdn:2",
            sbn.MixedSampling(sbn.BatchSampling(8), sbn.VirtualSampling(2)),
        ),
    ],
)
def test_short_forms_name_samplers(text, sampler) -> None:
    assert methods.parse_method(text).sampler == sampler


@pytest.mark.parametrize("text", [*methods.NAMES, *methods.DEFAULT])
def test_every_offered_name_is_understood(text) -> None:
    assert methods.parse_method(text).name == text


@pytest.mark.parametrize(
    "text", ["BN", "bs:x", "fs:0", "fs:1/0", "vdn:2+fs", "bs+bs", "fs+vdn+bs", ""]
)
def test_other_names_are_refused(text) -> None:
    with pytest.raises(ValueError, match="Expected"):
        methods.parse_method(text)


def test_samplers_are_written_as_in_python() -> None:
    text = "MixedSampling(FeatureSampling(1/16, groups=2), VirtualSampling(4, 2), 0.25)"
    assert methods.parse_sampler(text).sampler == eval(text, vars(sbn))
    assert methods.parse_sampler(text).virtual == sbn.VirtualSampling(4, strata=2)
    assert methods.parse_method("bs:4").virtual is None


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "BatchSampling", "BatchSampling(n)", "3", "Batch(", "f()"],
)
def test_a_sampler_argument_is_never_run_as_code(text) -> None:
    with pytest.raises(ValueError, match="Expected"):
        methods.parse_sampler(text)


@pytest.mark.parametrize("api", list(NETWORKS))
def test_a_network_trains_in_half_precision(api) -> None:
    trainer = small_trainer("fs:1/64+vdn:4", api=api, width=4, dtype="bfloat16")
    *_, last = trainer.train(seed=0)
    assert last.done
    assert np.isfinite(last.loss)
    assert 0 <= last.test_accuracy <= 1


def test_training_lowers_the_loss_and_learns() -> None:
    settings = Settings(model="mlp", epochs=5)
    trainer = Trainer(settings, methods.parse_method("bs:32"), to_device(load_digits()))
    losses = [epoch for epoch in trainer.train(seed=0) if epoch.done]
    assert losses[-1].loss < losses[0].loss / 2
    assert losses[-1].test_accuracy > 0.8


def test_a_seed_repeats_exactly_and_another_does_not() -> None:
    trainer = small_trainer("bs:4", model="mlp")
    first, again, other = (list(trainer.train(seed))[-1].loss for seed in (0, 0, 1))
    assert first == again != other


def test_one_program_serves_all_steps_and_seeds(monkeypatch) -> None:
    steps, traces = Trainer._steps, []

    def traced(*args):
        traces.append(None)
        return steps(*args)

    monkeypatch.setattr(Trainer, "_steps", traced)
    trainer = small_trainer("bs:4", model="mlp", epochs=2)
    for seed in range(2):
        list(trainer.train(seed))
    assert len(traces) == 1


def test_a_step_moves_nothing_between_host_and_device() -> None:
    trainer = small_trainer("bs:4+vdn:4", model="mlp")
    data = trainer.data.images, trainer.data.labels
    state = trainer.step(trainer.init(0), *data)
    with jax.transfer_guard("disallow"):
        state = trainer.step(state, *data)
    assert int(state.step) == 2


@pytest.mark.parametrize("api", list(NETWORKS))
def test_images_are_normalized_as_on_devices_of_their_own(api) -> None:
    options = {"batch_size": 32, "norm_batch_size": 16}
    trainer = small_trainer("bn", model="mlp", api=api, **options)
    state, images = trainer.init(0), trainer.data.images[:32]
    variables = state.model.variables
    forward = jax.jit(trainer.learner.forward)(variables, images, state.key, state.key)
    halves = [
        trainer.learner.network.train(variables, trainer.learner.scale(half), state.key)
        for half in (images[:16], images[16:])
    ]
    expected = jnp.concatenate([half.logits for half in halves])
    np.testing.assert_allclose(forward.logits, expected, atol=1e-5)
    rest = forward.rest
    means = jax.tree.map(lambda a, b: (a + b) / 2, *(h.rest for h in halves))
    for actual, mean in zip(jax.tree.leaves(rest), jax.tree.leaves(means), strict=True):
        np.testing.assert_allclose(actual, mean, atol=1e-5)


@pytest.mark.parametrize("api", list(NETWORKS))
def test_groups_of_images_train_with_virtual_images_of_their_own(api) -> None:
    trainer = small_trainer("bs:4+vdn:2", api=api, model="mlp", norm_batch_size=8)
    assert trainer.learner.measured == pytest.approx(6 / 10)
    *_, last = trainer.train(seed=0)
    assert np.isfinite(last.loss)


@pytest.mark.parametrize("images", [None, 4])
def test_pixels_are_told_apart(images) -> None:
    scenes = made_of_digits("scenes")
    settings = Settings(
        model="unet", width=4, batch_size=8, norm_batch_size=images, epochs=2
    )
    trainer = Trainer(settings, methods.parse_method("lattice+vdn:2"), scenes)
    losses = [epoch for epoch in trainer.train(seed=0) if epoch.done]
    assert losses[-1].loss < losses[0].loss
    images, labels = scenes.test[0]
    variables = trainer.init(0).model.variables
    logits = trainer.learner.evaluate(variables, images)
    right = (np.argmax(logits, -1) == labels).mean((1, 2)).sum()
    correct = trainer._alone.evaluate(variables, images, labels)
    np.testing.assert_allclose(correct, right, rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "dataset", "options", "message"),
    [
        ("unet", "digits", {}, r"labels of shape \(\), got \(8, 8\) of unet"),
        ("resnet8", "scenes", {}, r"labels of shape \(64, 64\), got \(\) of resnet8"),
        ("unet", "scenes", {"augment": True}, "Expected images with one label each"),
        ("resnet8", "sequences", {"augment": True}, "Expected images with one label"),
    ],
)
def test_models_and_data_sets_that_do_not_fit_are_refused(
    model, dataset, options, message
) -> None:
    settings = Settings(model=model, batch_size=8, **options)
    with pytest.raises(ValueError, match=message):
        Trainer(settings, methods.parse_method("bn"), made_of_digits(dataset))


def test_a_batch_has_whole_groups_of_images() -> None:
    with pytest.raises(ValueError, match="batch_size=128 and norm_batch_size=48"):
        small_trainer("bn", norm_batch_size=48)


def test_share_of_values_measured_is_that_of_the_samplers() -> None:
    assert small_trainer("bn").learner.measured == 1
    assert small_trainer("bs:4").learner.measured == pytest.approx(4 / 128)
    assert small_trainer("vdn:2").learner.measured == pytest.approx(2 / 130)
    assert small_trainer("flax").learner.measured == 1
    assert small_trainer("gn").learner.measured is None


@pytest.mark.parametrize("api", list(NETWORKS))
def test_sampled_norms_are_folded_unless_told_otherwise(api) -> None:
    argv = ["--norm", "bn", "bs:4", "gn", "--api", api, *SMALL]
    folded, unfolded = (
        train.make_trainers(train.parse([*argv, option]), load_digits())
        for option in ("--fold", "--no-fold")
    )
    assert [trainer.method.folded for trainer in folded] == [False, True, False]
    assert not any(trainer.method.folded for trainer in unfolded)
    assert [t.learner.measured for t in folded] == [
        t.learner.measured for t in unfolded
    ]


def test_augmentation_shifts_and_flips_each_image_its_own_way() -> None:
    from harness.training import crop_and_flip

    image = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    crop = functools.partial(crop_and_flip, pad=1)
    images = sbn.augment_batch(crop, jax.random.key(0), image, 64)
    assert images.shape == (64, 4, 4, 1)
    distinct = {tuple(np.ravel(i)) for i in images}
    assert 10 < len(distinct) <= 18  # 3 x 3 shifts, flipped or not


def test_the_script_writes_its_files_and_prints_the_table(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--norm", "bn", "bs:4", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"bs:4\s+│\s+3\.1%\s+│\s+\d+\.\d%", printed)
    (folder,) = (tmp_path / "runs").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == ["bn", "bs:4"]
    assert results["methods"][0]["relative_time"] == 1
    assert all(len(run["test_accuracy"]) == 2 for run in results["runs"])
    assert {"jax", "flax", "flax_sbn"} <= results["versions"].keys()
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["measured"]) == 4 / 128
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*"))


def test_results_are_never_overwritten(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {files.new_folder(None, "digits") for _ in range(3)}
    assert len(folders) == 3
    kept = tmp_path / "mine"
    kept.mkdir()
    assert train.main(["--norm", "bn", "--out", str(kept), *SMALL]) == 2
    assert "to be a new folder" in capsys.readouterr().err
    assert not list(kept.iterdir())


def test_ctrl_c_leaves_the_results_so_far(tmp_path, monkeypatch, capsys) -> None:
    train_one = train.train_one

    def interrupted(trainer, run, *rest) -> None:
        if run.method == "bs:4":
            run.loss, run.test_accuracy = [1.0], [0.5]
            raise KeyboardInterrupt
        train_one(trainer, run, *rest)

    monkeypatch.setattr(train, "train_one", interrupted)
    out = tmp_path / "out"
    assert train.main(["--norm", "bn", "bs:4", "--out", str(out), *SMALL]) == 130
    assert "so far" in capsys.readouterr().out
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["complete"] for run in runs] == [True, False]
    assert len(runs[0]["test_accuracy"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--norm", "bs:1000"], r"num_samples=1000 and batch size 128"),
        (["--norm", "fs", "--model", "mlp"], "Use LatticeSampling or BatchSampling"),
        (["--norm", "zzz"], "Expected a method among bn, flax"),
        (["--norm", "latice:4"], "Did you mean lattice?"),
        (["--norm", "latice+vdn:4"], "'latice'. Did you mean lattice?"),
        (["--norm", "gn+vdn"], "Expected a sampler among lattice, ns"),
        (["--sampler", "BatchSample(8)"], "Did you mean BatchSampling?"),
        (["--sampler", "BatchSampling(0)"], "num_samples=0"),
        (["--batch-size", "5000"], "batch_size=5000"),
        (["--model", "resnet18", "--api", "nnx"], "Expected one of the nnx models"),
        (["--norm", "gn", "--model", "densenet121"], "at least 32 x 32"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "to be a folder"),
        (["--dataset", "cifar10", "--data-dir", "."], "found none of"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, argv, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--dataset", "cifar10"], "go together"),
        (["--model", "vgg"], "Expected a name among resnet8, "),
        (["--model", "ResNet-8"], "Did you mean resnet8?"),
        (["--lerning-rate=1"], "Did you mean --learning-rate?"),
    ],
)
def test_bad_options_are_told_by_the_parser(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        train.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No PIL", name="PIL.Image"), "install '.[examples]'\n"),
        (ModuleNotFoundError("No h", name="hypothesis"), "install '.[test]'\n"),
        (KeyboardInterrupt(), "Interrupted.\n"),
        (ModuleNotFoundError("No fla", name="fla"), "ModuleNotFoundError: No fla\n"),
    ],
)
def test_a_script_that_ends_early_says_why(error, message, capsys) -> None:
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err.endswith(message)


def test_ctrl_c_before_any_result_leaves_nothing(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train.main(["--norm", "bn", "--out", str(out), *SMALL])
    assert not out.exists()
    assert not capsys.readouterr().out.strip()


def test_runs_that_diverged_are_marked_and_have_no_curve(tmp_path) -> None:
    report = Report(tmp_path, {"title": "", "test_images": 10}, {"bn": 1.0, "gn": None})
    for method, loss in (("bn", 1.0), ("bn", math.nan), ("gn", math.inf)):
        report.runs.append(Run(method, 0, [9.0, loss], [0.5] * 2, [0.5] * 2))
    console = Console(width=120)
    with console.capture() as shown:
        console.print(report.table())
    assert re.search(r"bn .* 50.0%, 1 diverged .*\n.* gn .* diverged", shown.get())
    report.write()
    assert (tmp_path / "curves.png").exists()
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)


def test_a_comparison_that_diverges_ends_with_its_table(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    argv = ["--norm", "none", "--learning-rate", "1e30", "--out", str(out), *SMALL]
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert "none, seed 0: diverged" in printed
    assert re.search(r"│ none .* diverged", printed)
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv"}


def test_a_speed_leaves_out_the_time_to_compile() -> None:
    begin = time.monotonic()
    first = next(e for e in small_trainer("bn", model="mlp").train(0) if e.done)
    assert first.images_per_second > 256 / (time.monotonic() - begin)
    settings = Settings(model="mlp", epochs=2)
    trainer = Trainer(settings, methods.parse("bn"), DIGITS, most_steps=2)
    one, two = (epoch.images_per_second for epoch in trainer.train(0) if epoch.done)
    assert one is None
    assert two > 0


def test_spread_is_the_standard_deviation_over_complete_runs(tmp_path) -> None:
    results = Report(tmp_path, {"title": ""}, {"bn": 1.0})
    for accuracy, complete in ((0.8, True), (0.9, True), (0.1, False)):
        results.runs.append(
            Run("bn", 0, [1.0], [1.0], [accuracy], complete=complete),
        )
    (row,) = results.rows()
    assert row["seeds"] == 2
    assert row["test_accuracy"] == pytest.approx(0.85)
    assert row["spread"] == pytest.approx(np.std([0.8, 0.9], ddof=1))


@pytest.mark.parametrize("name", ["bn", "bs:8"])
def test_many_steps_in_one_dispatch_are_the_same_steps(name) -> None:
    settings = Settings(model="mlp", width=16, epochs=2, batch_size=40)
    few, many = (
        Trainer(settings, methods.parse(name), DIGITS, most_steps=most)
        for most in (1, 10)
    )
    assert (few.stride, many.stride) == (1, 6)
    assert few.steps % many.stride == 0
    first, second = ([e for e in t.train(0) if e.done] for t in (few, many))
    assert len(first) == len(second) == 2
    for one, same in zip(first, second, strict=True):
        assert one.loss == pytest.approx(same.loss, rel=1e-5)
        assert one.test_accuracy == pytest.approx(same.test_accuracy, abs=0.01)


@pytest.mark.parametrize("fresh", [True, False])
def test_virtual_images_are_drawn_anew_or_stay_the_same(fresh) -> None:
    options = {"norm_batch_size": 32, "fresh_virtual": fresh}
    trainer = small_trainer("vdn:4", model="mlp", **options)
    state, images = trainer.init(0), trainer.data.images[:32]
    forward = jax.jit(trainer.learner.forward)
    one, other = (
        forward(state.model.variables, images, state.key, key).logits
        for key in jax.random.split(state.key)
    )
    assert (one != other).any() == fresh


def test_a_weight_of_the_running_statistics_may_follow_a_method() -> None:
    method = methods.parse("fs:1/64~3/4")
    assert method.name == "fs:1/64~3/4"
    assert method.sampler == sbn.FeatureSampling(1 / 64)
    assert method.running_weight == 0.75
    assert methods.parse("BatchSampling(8)~0.5").running_weight == 0.5
    assert methods.parse("bn~1").sampler is None
    assert methods.parse("bn").running_weight == 0


@pytest.mark.parametrize("text", ["gn~0.5", "bn~", "bn~2", "bn~-1", "bn~1/0", "bn~nan"])
def test_another_weight_is_refused(text) -> None:
    with pytest.raises(ValueError, match="Expected a weight in"):
        methods.parse(text)


@pytest.mark.parametrize("api", list(NETWORKS))
@pytest.mark.parametrize("folded", [False, True])
def test_the_weight_reaches_the_layers(api, folded) -> None:
    plain, moved = (
        dataclasses.replace(methods.parse(name), folded=folded)
        for name in ("bs:8", "bs:8~3/4")
    )
    settings = Settings(model="mlp", width=16, api=api)
    trainers = [Trainer(settings, method, DIGITS) for method in (plain, moved)]
    state = trainers[0].init(0)
    one, other = (
        jax.jit(trainer.learner.forward)(
            state.model.variables, DIGITS.images[:16], state.key, state.key
        )
        for trainer in trainers
    )
    assert (one.logits != other.logits).any()
    assert np.isfinite(other.logits).all()


NORMALIZERS = [name for name in methods.NAMES if methods.parse(name).sampler is None]


# One of each that has more than parameters and running averages trains in nnx, too: a
# counter, statistics to hand on, overwritten gradients, losses, gathered inputs.
STATEFUL = ("brn", "kn", "mabn", "shade", "bnp")


@pytest.mark.parametrize(
    ("name", "api"),
    [(name, "linen") for name in NORMALIZERS] + [(name, "nnx") for name in STATEFUL],
)
def test_every_normalizer_trains(name, api) -> None:
    model = "resnet8" if name in ("frn", "bnet") else "mlp"  # these need maps
    trainer = small_trainer(name, model=model, api=api, width=8, epochs=3)
    first, *_, last = (epoch for epoch in trainer.train(0) if epoch.done)
    assert last.loss < first.loss
    assert np.isfinite(last.test_accuracy)


@pytest.mark.parametrize("api", list(NETWORKS))
@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_normalizer_fits_a_convolutional_network(name, api) -> None:
    # Traces a training pass.
    options = {"width": 16, "norm_batch_size": 32}
    trainer = small_trainer(name, model="resnet8", api=api, **options)
    logits = jax.eval_shape(
        lambda key, x: trainer.learner.network.evaluate(
            trainer.learner.network.init(key, x), x
        ),
        jax.random.key(0),
        jnp.zeros((2, *trainer.data.task.shape)),
    )
    assert logits.shape == (2, 10)


def test_a_method_that_samples_is_told_how() -> None:
    assert methods.parse("brn@fs:1/64").sampler == sbn.FeatureSampling(1 / 64)
    assert methods.parse("kn@BatchSampling(4)").sampler == sbn.BatchSampling(4)
    assert methods.parse("brn@bs:4").fold().folded
    assert not methods.parse("kn@bs:4").fold().folded
    assert methods.parse("ghost:8").ghost_groups == 8
    assert methods.parse("ba:3").copies == 3


@pytest.mark.parametrize(
    "text", ["gn@bs:4", "bs:4@bs:4", "brn@gn", "brn@", "ghost:0", "ba:x", "bn:2"]
)
def test_what_cannot_be_told_is_refused(text) -> None:
    with pytest.raises(ValueError, match="Expected"):
        methods.parse(text)
