"""Batch augmentation: copies, keys, gradients, and one measured copy of each image."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_sbn as sbn
from flax_sbn import augment_batch, repeat_examples
from tests import cases
from tests.closeness import assert_close
from tests.teaching import message_while_tracing

KEY = jax.random.key(0)
SHAPE = (6, 4, 4, 3)


def noisy(key, image):
    return image + jax.random.normal(key, image.shape)


def unchanged(key, image):
    return image


@pytest.mark.parametrize("num_copies", [1, 3])
def test_copies_of_an_image_are_next_to_each_other_and_augmented_each_on_its_own(
    num_copies,
):
    x = cases.inputs(SHAPE)
    y = augment_batch(noisy, KEY, x, num_copies)
    chex.assert_shape(y, (6 * num_copies, *SHAPE[1:]))
    noise = np.asarray(y - repeat_examples(x, num_copies)).reshape(len(y), -1)
    # Standard normal, and no two alike: five standard errors.
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5
    correlation = np.corrcoef(noise) - np.eye(len(y))
    assert abs(correlation).max() < 5 / noise.shape[1] ** 0.5


def test_unchanged_images_are_repeated():
    x = cases.inputs(SHAPE)
    repeated = repeat_examples(x, 3)
    chex.assert_trees_all_equal(augment_batch(unchanged, KEY, x, 3), repeated)
    for copy in range(3):
        chex.assert_trees_all_equal(repeated[copy::3], x)
    chex.assert_trees_all_equal(repeat_examples(x, 1), x)


def test_the_key_alone_decides():
    x = cases.inputs(SHAPE)
    augment = jax.jit(lambda key, x: augment_batch(noisy, key, x, 2))
    y = augment(KEY, x)
    chex.assert_trees_all_equal(augment(KEY, x), y)
    assert (augment(jax.random.key(1), x) != y).any()
    # An image's augmentation has nothing to do with the other images' values.
    chex.assert_trees_all_equal(augment(KEY, x.at[1:].set(0))[:2], y[:2])


def test_trees_of_arrays_stay_together_and_images_may_change_their_form():
    batch = {"image": cases.inputs(SHAPE), "box": jnp.arange(12).reshape(6, 2)}

    def crop(key, example):
        start = jax.random.randint(key, (), 0, 3)
        pixels = jax.lax.dynamic_slice_in_dim(example["image"], start, 2)
        return {"image": pixels, "box": example["box"] - start, "start": start}

    found = augment_batch(crop, KEY, batch, 4)
    chex.assert_shape(found["image"], (24, 2, 4, 3))
    again = repeat_examples(batch, 4)
    assert set(found["start"].tolist()) == {0, 1, 2}
    for i, start in enumerate(found["start"]):
        expected = again["image"][i, start : start + 2]
        chex.assert_trees_all_equal(found["image"][i], expected)
        chex.assert_trees_all_equal(found["box"][i], again["box"][i] - start)


@pytest.mark.parametrize("norm", ["none", "per image", "running"])
def test_the_gradient_is_that_of_as_many_batches_accumulated(norm, x64):
    x, labels = cases.inputs(SHAPE, "float64"), cases.inputs((6, 2), "float64", seed=1)
    weights = cases.inputs((3, 5), "float64", seed=2)
    out = cases.inputs((5, 2), "float64", seed=3)
    statistics = sbn.Statistics(jnp.arange(5.0), jnp.arange(1.0, 6.0))

    def loss(weights, x, labels):
        y = x @ weights
        if norm == "per image":
            y /= 1 + y.std((1, 2), keepdims=True)
        elif norm == "running":
            y = sbn.normalize(y, statistics)
        return ((jnp.tanh(y).mean((1, 2)) @ out - labels) ** 2).mean()

    y, repeated = augment_batch(noisy, KEY, x, 3), repeat_examples(labels, 3)
    gradient = jax.jit(jax.grad(loss))
    accumulated = [gradient(weights, y[copy::3], labels) for copy in range(3)]
    actual = gradient(weights, y, repeated)
    assert_close(actual, np.mean(accumulated, axis=0), "float64", num=y.size)


def test_one_copy_of_each_says_what_all_copies_say_where_they_are_equal():
    x = cases.inputs((16, 4, 4, 3))
    y = repeat_examples(x, 4)
    expected = sbn.batch_statistics(x)
    copies = sbn.batch_statistics(y, sampler=sbn.CopySampling(4), key=KEY)
    chex.assert_trees_all_close(copies, expected, rtol=1e-5)
    # A run of as many images holds four images only.
    run = sbn.batch_statistics(y, sampler=sbn.BatchSampling(16), key=KEY)
    assert (abs(run.mean - expected.mean) > 1e-2).any()


def test_one_copy_of_each_errs_less_than_a_run_of_as_many_images():
    spread = 0.5

    @jax.jit
    @jax.vmap
    def errors(key):
        images, copies, place = jax.random.split(key, 3)
        x = jax.random.normal(images, (16, 1))
        y = augment_batch(
            lambda key, image: image + spread * jax.random.normal(key, image.shape),
            copies,
            x,
            4,
        )
        return [
            sbn.batch_statistics(y, sampler=sampler, key=place).mean[0]
            for sampler in (sbn.CopySampling(4), sbn.BatchSampling(16))
        ]

    copies, run = (
        np.square(each).mean() for each in errors(jax.random.split(KEY, 4000))
    )
    # Of 16 images, each with its own noise, and of 4 images with the noise of 16.
    for found, expected in (
        (copies, (1 + spread**2) / 16),
        (run, 1 / 4 + spread**2 / 16),
    ):
        assert abs(found - expected) < 5 * expected * (2 / 4000) ** 0.5


ERRORS = {
    "copies": (lambda x: augment_batch(unchanged, KEY, x, 0), "num_copies=0", ">= 1"),
    "repeats": (lambda x: repeat_examples(x, 2.0), "num_copies=2.0", "an int >= 1"),
    "images": (
        lambda x: augment_batch(unchanged, KEY, {"x": x, "y": x[1:]}, 2),
        "shapes=[(6, 4, 4, 3), (5, 4, 4, 3)]",
        "first axis",
    ),
    "scalar": (
        lambda x: repeat_examples([x[0, 0, 0, 0]], 2),
        "shapes=[()]",
        "examples as first axis",
    ),
    "nothing": (lambda x: repeat_examples({}, 2), "shapes=[]", "as first axis"),
    "sampler": (lambda x: sbn.CopySampling(0), "num_copies=0", "an int >= 1"),
    "sampled-images": (
        lambda x: sbn.batch_norm(x, sampler=sbn.CopySampling(4), key=KEY),
        "num_copies=4 and batch size 6",
        "augment_batch(augment, key, x, 4)",
    ),
    "key": (
        lambda x: sbn.batch_norm(x, sampler=sbn.CopySampling(2)),
        "key=None",
        "jax.random.key(",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_given_and_how_to_mend_it(name):
    call, given, fix = ERRORS[name]
    message = message_while_tracing(SHAPE, call, ValueError, given, fix)
    assert message.startswith("Expected")


def test_the_old_name_warns():
    with pytest.warns(DeprecationWarning, match="repeat_examples"):
        assert sbn.repeat_rows is repeat_examples
