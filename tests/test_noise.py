"""The noise of samples: none where all is measured, and what is known by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from accuracy import noise
from accuracy.geometries import Grid, Scattered
from harness.data import Dataset
from harness.networks import Settings


@pytest.fixture(scope="module")
def trained():
    """A tiny network, and batches of noise."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (32, 8, 8, 3), np.uint8)
    labels = random.integers(0, 10, 32).astype(np.int32)
    dataset = Dataset("noise", images, labels, images, labels, 10, augment=False)
    settings = Settings(width=2, epochs=1, batch_size=16)
    learner, variables, accuracy = noise.train(settings, dataset)
    assert 0 <= accuracy <= 1
    return learner, variables, list(noise.draw(learner, dataset, 8, 3))


def compare(trained, sampler) -> noise.Result:
    reference = noise.gradients(*trained, None)
    return noise.compare(*trained, reference, "mine", sampler)


def test_the_whole_batch_has_no_error(trained) -> None:
    result = compare(trained, None)
    assert (result.measured, result.batch_size, result.batches) == (1, 8, 3)
    assert result.gradient == result.gradient_error == result.systematic == 0
    assert [errors.size for errors in result.statistics] == [8, 4, 2]
    assert not any(
        errors.mean_noise or errors.mean_offset for errors in result.statistics
    )


@pytest.mark.parametrize("sampler", [sbn.BatchSampling(2), Grid(2), Scattered(4)])
def test_a_sample_has_errors(trained, sampler) -> None:
    result = compare(trained, sampler)
    assert result.gradient > 1e-3
    assert result.statistics[0].mean_noise > 1e-3
    assert result.statistics[0].log_var_noise > 1e-3
    assert 0 < result.measured < 1


def test_an_offset_is_told_from_noise() -> None:
    same = np.array([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]])
    assert noise._split(same) == (1.0, 0.0)
    offset, spread = noise._split(np.array([[1.0], [-1.0]]))
    assert offset == 0
    assert spread == pytest.approx(2**0.5)


def test_geometries_measure_what_they_say() -> None:
    x = jnp.arange(2 * 4 * 6.0).reshape(2, 4, 6, 1)
    (part,) = Grid(2).parts((2, 4, 6), None)
    np.testing.assert_array_equal(
        part.take(x, (0, 1, 2))[0, ..., 0], [[7, 10], [19, 22]]
    )
    assert sbn.num_measured(Grid(2), (2, 4, 6)) == 2 * 4
    assert sbn.num_measured(Scattered(5), (2, 4, 6)) == 2 * 5
    for sampler in Grid(8), Scattered(24):
        assert sbn.num_measured(sampler, (2, 4, 6)) == x.size


def test_it_needs_its_data(tmp_path, capsys) -> None:
    argv = ["--data-dir", str(tmp_path), "--json", str(tmp_path / "noise.json")]
    assert noise.main(argv) == 2
    assert "CIFAR-10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        noise.main([*argv, "--batch-size", "1"])
