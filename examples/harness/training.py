"""One training run: the jitted step, evaluation, and the loop that reports progress.

Everything lives on the device: the images as uint8, the epoch's order, the totals of
loss and accuracy. The host dispatches compiled steps, many at a time on an accelerator,
and looks at the totals a few times a second. Several seeds can train side by side.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

import flax_sbn as sbn
from harness.data import Dataset
from harness.learning import Learner, Model, Task, hits
from harness.methods import Method
from harness.networks import Settings, Variables
from harness.processes import by_example, everywhere, make_mesh, put

_REFRESH_SECONDS = 0.25
_EVAL_BATCH = 500
# One after the other on a CPU, where a convolution in a loop is many times slower.
_MOST_STEPS = 50


class DeviceData(NamedTuple):
    """A data set on the devices, once for all trainers; each has its part of it."""

    images: jax.Array  # (N, H, W, C), uint8
    labels: jax.Array
    test: list[tuple[jax.Array, jax.Array]]  # batches of one size; label -1 is padding
    num_test: int  # without padding
    task: Task
    mesh: Mesh


def to_device(dataset: Dataset, mesh: Mesh | None = None) -> DeviceData:
    """Moves a data set to the devices of a mesh, or to the first one there is.

    Training images that would not be the same number for each of them are left out.
    """
    mesh = make_mesh(1) if mesh is None else mesh
    count, split = mesh.size, by_example(mesh)
    train = len(dataset.train_images) // count * count
    pixels = dataset.train_images.reshape(-1, dataset.train_images.shape[-1])
    size = min(_EVAL_BATCH, len(dataset.test_images))
    size += -size % count
    padding = -len(dataset.test_images) % size
    images = _pad(dataset.test_images, padding, 0)
    labels = _pad(dataset.test_labels, padding, -1)
    parts = len(images) // size
    batches = zip(np.split(images, parts), np.split(labels, parts), strict=True)
    return DeviceData(
        put(dataset.train_images[:train], split),
        put(dataset.train_labels[:train], split),
        [(put(some, split), put(their, split)) for some, their in batches],
        len(dataset.test_images),
        Task(
            dataset.train_images.shape[1:],
            dataset.num_classes,
            pixels.mean(0).astype(np.float32),
            pixels.std(0).astype(np.float32),
            dataset.train_labels.shape[1:],
        ),
        mesh,
    )


def _pad(array: NDArray[Any], count: int, value: int) -> NDArray[Any]:
    """Appends so many examples of a value."""
    return np.pad(
        array, [(0, count), *[(0, 0)] * (array.ndim - 1)], constant_values=value
    )


class State(NamedTuple):
    """Everything that a step changes, on every device."""

    model: Model
    key: jax.Array
    order: jax.Array  # of each device's images in this epoch, (devices, images)
    step: jax.Array  # in this epoch
    loss: jax.Array  # sum over the epoch's images so far
    correct: jax.Array  # likewise


class Epoch(NamedTuple):
    """How an epoch is going, or went when ``done``.

    ``images_per_second`` is None as long as nothing has run but what was compiled.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float | None
    test_accuracy: float | None = None

    @property
    def done(self) -> bool:
        """Whether the epoch is over and evaluated."""
        return self.test_accuracy is not None


class _Programs(NamedTuple):
    """What is compiled, for one state or for several side by side."""

    init: Any
    start_epoch: Any
    step: Any
    evaluate: Any


class Trainer:
    """Trains a network with one method; compiles once for all seeds."""

    def __init__(
        self,
        settings: Settings,
        method: Method,
        data: DeviceData,
        most_steps: int | None = None,
    ) -> None:
        """Checks that the method fits the settings, without computing anything.

        Args:
          settings: what all runs have in common.
          method: the normalization.
          data: images and labels.
          most_steps: how many steps the host may dispatch at a time; by default 1 on a
            CPU and some dozen elsewhere.

        Raises:
          ValueError: if it does not: a sample larger than the batch, for instance.
        """
        size = len(data.images)
        if not 1 <= settings.batch_size <= size:
            raise ValueError(
                f"Expected a batch size between 1 and the {size} training images, got "
                f"batch_size={settings.batch_size}."
            )
        if settings.augment and (len(data.task.shape) != 3 or data.task.label_shape):
            raise ValueError(
                "Expected images with one label each for augment=True, got inputs of "
                f"{data.task.shape} and labels of {data.task.label_shape}."
            )
        self.settings, self.method, self.data = settings, method, data
        self.steps = size // settings.batch_size
        self.learner = Learner(settings, method, data.task, self.steps, data.mesh)
        if most_steps is None:
            most_steps = 1 if jax.default_backend() == "cpu" else _MOST_STEPS
        most_steps = min(most_steps, self.steps)
        self.stride = next(n for n in range(most_steps, 0, -1) if self.steps % n == 0)
        self._alone = self._programs(lambda function, _: function)
        self._together = self._programs(jax.vmap)
        self.step = self._alone.step

    def init(self, seed: int) -> State:
        """Returns the state before the first step."""
        return self._alone.init(jax.random.key(seed), self.data.images)

    def train(self, seed: int) -> Iterator[Epoch]:
        """Trains from the start; yields progress a few times a second."""
        for (now,) in self.train_together([seed]):
            yield now

    def train_together(self, seeds: Sequence[int]) -> Iterator[tuple[Epoch, ...]]:
        """Trains with several seeds side by side; yields progress of each."""
        run = self._alone if len(seeds) == 1 else self._together
        keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
        state = run.init(keys[0] if len(seeds) == 1 else keys, self.data.images)
        for epoch in range(1, self.settings.epochs + 1):
            state = run.start_epoch(state)
            begin, before = time.monotonic(), 0
            shown = begin
            for step in range(self.stride, self.steps + 1, self.stride):
                state = run.step(state, self.data.images, self.data.labels)
                if epoch == 1 and step == self.stride:  # this one may have compiled
                    jax.block_until_ready(state)
                    begin, before = time.monotonic(), step
                if time.monotonic() - shown > _REFRESH_SECONDS and step < self.steps:
                    yield self._progress(state, epoch, step, begin, before)
                    shown = time.monotonic()
            now = self._progress(state, epoch, self.steps, begin, before)
            shares = np.atleast_1d(self._correct_of(run, state)) / self.data.num_test
            yield tuple(
                one._replace(test_accuracy=float(share))
                for one, share in zip(now, shares, strict=True)
            )

    def epoch(self, state: State) -> State:
        """Returns the state after another epoch."""
        state = self._alone.start_epoch(state)
        for _ in range(0, self.steps, self.stride):
            state = self.step(state, self.data.images, self.data.labels)
        return state

    def accuracy(self, state: State) -> float:
        """Returns the accuracy in the test."""
        return float(self._correct_of(self._alone, state)) / self.data.num_test

    def _correct_of(self, run: _Programs, state: State) -> jax.Array:
        variables = state.model.variables
        return sum(run.evaluate(variables, *batch) for batch in self.data.test)

    def _progress(
        self, state: State, epoch: int, step: int, begin: float, before: int
    ) -> tuple[Epoch, ...]:
        """Returns how each seed does; its speed is that since ``before`` steps."""
        size = self.settings.batch_size
        totals = jax.device_get((state.loss, state.correct))
        losses, accuracies = (np.atleast_1d(total) / (step * size) for total in totals)
        timed = len(losses) * (step - before) * size
        rate = timed / (time.monotonic() - begin) if timed else None
        return tuple(
            Epoch(epoch, step, self.steps, float(loss), float(accuracy), rate)
            for loss, accuracy in zip(losses, accuracies, strict=True)
        )

    def _programs(self, over: Callable[..., Any]) -> _Programs:
        """Compiles what ``over(function, axes)`` makes of each function."""
        jit = functools.partial(jax.jit, out_shardings=everywhere(self.data.mesh))
        return _Programs(
            jit(over(self._initial, (0, None))),
            jit(over(self._shuffle, (0,)), donate_argnums=0),
            jit(over(self._steps, (0, None, None)), donate_argnums=0),
            jit(over(self._correct, (0, None, None))),
        )

    def _initial(self, key: jax.Array, images: jax.Array) -> State:
        key, init_key = jax.random.split(key)
        model = self.learner.init(init_key, images)
        order = jnp.zeros((self.data.mesh.size, self._share), jnp.int32)
        return State(model, key, order, *_zeros())

    def _shuffle(self, state: State) -> State:
        key, *keys = jax.random.split(state.key, 1 + self.data.mesh.size)
        orders = [jax.random.permutation(each, self._share) for each in keys]
        return State(state.model, key, jnp.stack(orders).astype(jnp.int32), *_zeros())

    @property
    def _share(self) -> int:
        """Number of training images that each device has."""
        return len(self.data.images) // self.data.mesh.size

    def _steps(self, state: State, images: jax.Array, labels: jax.Array) -> State:
        """Returns the state after as many steps as are dispatched at a time."""
        if self.stride == 1:
            return self._step(state, images, labels)

        def body(state: State, _: None) -> tuple[State, None]:
            return self._step(state, images, labels), None

        return jax.lax.scan(body, state, length=self.stride)[0]

    def _step(
        self, state: State, all_images: jax.Array, all_labels: jax.Array
    ) -> State:
        keys = jax.random.split(state.key, 4)
        images, labels = (self._pick(state, each) for each in (all_images, all_labels))
        copies = self.method.copies
        if self.settings.augment:
            images = sbn.augment_batch(crop_and_flip, keys[1], images, copies)
        else:
            images = sbn.repeat_examples(images, copies)
        labels = sbn.repeat_examples(labels, copies)
        model, totals = self.learner.update(
            state.model, images, labels, keys[2], keys[3]
        )
        return State(
            model,
            keys[0],
            state.order,
            state.step + 1,
            state.loss + totals.loss / copies,
            state.correct + totals.correct / copies,
        )

    def _pick(self, state: State, array: jax.Array) -> jax.Array:
        """Returns a batch: of each device's images, those whose turn it is."""
        devices, batch_size = self.data.mesh.size, self.settings.batch_size
        images = batch_size // devices
        turns = jax.lax.dynamic_slice_in_dim(
            state.order, state.step * images, images, 1
        )
        parts = array.reshape(devices, -1, *array.shape[1:])
        picked = jax.vmap(lambda part, turn: part[turn])(parts, turns)
        return picked.reshape(batch_size, *array.shape[1:])

    def _correct(
        self, variables: Variables, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        logits = self.learner.evaluate(variables, images)
        return hits(logits, labels)


def _zeros() -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(())


def crop_and_flip(key: jax.Array, image: jax.Array, pad: int = 4) -> jax.Array:
    """Shifts an image by up to ``pad`` pixels, and mirrors every other one."""
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    shift_key, flip_key = jax.random.split(key)
    y, x = jax.random.randint(shift_key, (2,), 0, 2 * pad + 1)
    image = jax.lax.dynamic_slice(padded, (y, x, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
