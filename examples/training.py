"""One training run: the jitted step, evaluation, and the loop that reports progress.

Everything lives on the device: the images as uint8, the epoch's order, the totals of
loss and accuracy. The host dispatches compiled steps, many at a time on an accelerator,
and looks at the totals a few times a second. Several seeds can train side by side.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_sbn as sbn
from data import Dataset
from methods import Method, Tally
from networks import NETWORKS, Forward, Network, Settings, Variables
from optimizers import make_optimizer

_REFRESH_SECONDS = 0.25
_EVAL_BATCH = 500
# One after the other on a CPU, where a convolution in a loop is many times slower.
_MOST_STEPS = 50


class DeviceData(NamedTuple):
    """A data set on the device, once for all trainers."""

    images: jax.Array  # (N, H, W, C), uint8
    labels: jax.Array
    test: list[tuple[jax.Array, jax.Array]]  # batches of one size; label -1 is padding
    num_test: int  # without padding
    mean: jax.Array  # (C,), of the training images
    std: jax.Array
    num_classes: int


def to_device(dataset: Dataset) -> DeviceData:
    """Moves a data set to the device."""
    pixels = dataset.train_images.reshape(-1, dataset.train_images.shape[-1])
    size = min(_EVAL_BATCH, len(dataset.test_images))
    padding = -len(dataset.test_images) % size
    images = np.pad(dataset.test_images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(dataset.test_labels, (0, padding), constant_values=-1)
    count = len(images) // size
    batches = zip(np.split(images, count), np.split(labels, count), strict=True)
    return DeviceData(
        jax.device_put(dataset.train_images),
        jax.device_put(dataset.train_labels),
        jax.device_put(list(batches)),
        len(dataset.test_images),
        jax.device_put(pixels.mean(0).astype(np.float32)),
        jax.device_put(pixels.std(0).astype(np.float32)),
        dataset.num_classes,
    )


class State(NamedTuple):
    """Everything that a step changes, on the device."""

    variables: Variables
    optimizer: Any
    key: jax.Array
    order: jax.Array  # of the images in this epoch
    step: jax.Array  # in this epoch
    loss: jax.Array  # sum over the epoch's images so far
    correct: jax.Array  # likewise


class Epoch(NamedTuple):
    """How an epoch is going, or went when ``done``."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
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
        self.settings, self.method = settings, method
        size = len(data.images)
        if not 1 <= settings.batch_size <= size:
            raise ValueError(
                f"Expected a batch size between 1 and the {size} training images, got "
                f"batch_size={settings.batch_size}."
            )
        self.rows = settings.rows or settings.batch_size
        if settings.batch_size % self.rows:
            raise ValueError(
                "Expected a batch size that is a multiple of the rows normalized "
                f"together, got batch_size={settings.batch_size} and rows={self.rows}."
            )
        self.groups = settings.batch_size // self.rows
        self.steps = size // settings.batch_size
        self.data, self.shape = data, data.images.shape[1:]
        self.network = self._network(method)
        self.optimizer = make_optimizer(settings, method, self.steps)
        self.measured = self._measured()
        if most_steps is None:
            most_steps = 1 if jax.default_backend() == "cpu" else _MOST_STEPS
        most_steps = min(most_steps, self.steps)
        self.stride = next(n for n in range(most_steps, 0, -1) if self.steps % n == 0)
        self._alone = self._programs(lambda function, _: function)
        self._together = self._programs(jax.vmap)
        self.step = self._alone.step

    def init(self, seed: int) -> State:
        """Returns the state before the first step."""
        return self._alone.init(jax.random.key(seed))

    def train(self, seed: int) -> Iterator[Epoch]:
        """Trains from the start; yields progress a few times a second."""
        for (now,) in self.train_together([seed]):
            yield now

    def train_together(self, seeds: Sequence[int]) -> Iterator[tuple[Epoch, ...]]:
        """Trains with several seeds side by side; yields progress of each."""
        run = self._alone if len(seeds) == 1 else self._together
        keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
        state = run.init(keys[0] if len(seeds) == 1 else keys)
        for epoch in range(1, self.settings.epochs + 1):
            state = run.start_epoch(state)
            begin = shown = time.monotonic()
            for step in range(self.stride, self.steps + 1, self.stride):
                state = run.step(state, self.data.images, self.data.labels)
                if time.monotonic() - shown > _REFRESH_SECONDS and step < self.steps:
                    yield self._progress(state, epoch, step, begin)
                    shown = time.monotonic()
            now = self._progress(state, epoch, self.steps, begin)
            correct = sum(
                run.evaluate(state.variables, *batch) for batch in self.data.test
            )
            shares = np.atleast_1d(correct) / self.data.num_test
            yield tuple(
                one._replace(test_accuracy=float(share))
                for one, share in zip(now, shares, strict=True)
            )

    def _progress(
        self, state: State, epoch: int, step: int, begin: float
    ) -> tuple[Epoch, ...]:
        seen = step * self.settings.batch_size
        totals = jax.device_get((state.loss, state.correct))
        losses, accuracies = (np.atleast_1d(total) / seen for total in totals)
        rate = len(losses) * seen / (time.monotonic() - begin)
        return tuple(
            Epoch(epoch, step, self.steps, float(loss), float(accuracy), rate)
            for loss, accuracy in zip(losses, accuracies, strict=True)
        )

    def _programs(self, over: Callable[..., Any]) -> _Programs:
        """Compiles what ``over(function, axes)`` makes of each function."""
        return _Programs(
            jax.jit(over(self._initial, (0,))),
            jax.jit(over(self._shuffle, (0,)), donate_argnums=0),
            jax.jit(over(self._steps, (0, None, None)), donate_argnums=0),
            jax.jit(over(self._correct, (0, None, None))),
        )

    def _initial(self, key: jax.Array) -> State:
        key, init_key = jax.random.split(key)
        images = jnp.zeros((1, *self.shape))
        if self.method.starts_from_data:
            images = self._scale(self.data.images[: self.rows])
        variables = self.network.init(init_key, images)
        optimizer = self.optimizer.init(variables.params)
        order = jnp.zeros(len(self.data.images), jnp.int32)
        return State(variables, optimizer, key, order, *_zeros())

    def _shuffle(self, state: State) -> State:
        key, order_key = jax.random.split(state.key)
        order = jax.random.permutation(order_key, len(state.order)).astype(jnp.int32)
        return State(state.variables, state.optimizer, key, order, *_zeros())

    def _scale(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) - self.data.mean) / self.data.std

    def _network(self, method: Method) -> Network:
        network = NETWORKS[self.settings.api]
        return network(self.settings, method, self.shape, self.data.num_classes)

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
        rows = self.settings.batch_size
        keys = jax.random.split(state.key, 4)
        picked = jax.lax.dynamic_slice_in_dim(state.order, state.step * rows, rows)
        images, labels = all_images[picked], all_labels[picked]
        copies = self.method.copies
        if self.settings.augment:
            images = sbn.augment_batch(_crop_and_flip, keys[1], images, copies)
        else:
            images = sbn.repeat_rows(images, copies)
        repeated = sbn.repeat_rows(labels, copies)

        def loss_fn(params: Any, overwritten: Any) -> tuple[jax.Array, Any]:
            variables = Variables(params, overwritten, state.variables.rest)
            forward = self._forward(variables, images, keys[2], keys[3])
            loss = optax.softmax_cross_entropy_with_integer_labels(
                forward.logits, repeated
            )
            return loss.mean() + forward.loss, (loss, forward)

        (_, (loss, forward)), (grads, overwritten) = jax.value_and_grad(
            loss_fn, (0, 1), has_aux=True
        )(*state.variables[:2])
        params = state.variables.params
        updates, optimizer = self.optimizer.update(
            grads, state.optimizer, params, inputs=forward.inputs
        )
        # Of these, each group of rows gives the next value.
        overwritten = jax.tree.map(lambda each: each / self.groups, overwritten)
        params = optax.apply_updates(params, updates)
        correct = (forward.logits.argmax(-1) == repeated).sum()
        return State(
            Variables(params, overwritten, forward.rest),
            optimizer,
            keys[0],
            state.order,
            state.step + 1,
            state.loss + loss.sum() / copies,
            state.correct + correct / copies,
        )

    def _forward(
        self,
        variables: Variables,
        images: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> Forward:
        """Returns the logits, and the mean of what the groups of rows make besides."""
        x = self._scale(images)
        if self.groups == 1:
            return self._group_forward(variables, x, sampling_key, virtual_key)
        forward = jax.vmap(self._group_forward, (None, 0, 0, 0))(
            variables,
            x.reshape(self.groups, -1, *x.shape[1:]),
            jax.random.split(sampling_key, self.groups),
            jax.random.split(virtual_key, self.groups),
        )
        logits = forward.logits.reshape(len(x), -1)
        return jax.tree.map(_of_groups, forward)._replace(logits=logits)

    def _group_forward(
        self,
        variables: Variables,
        x: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> Forward:
        """Returns the logits of rows that are normalized together."""
        virtual = self.method.virtual
        if virtual is None:
            return self.network.train(variables, x, sampling_key)
        # VDN is these three lines: append at the input, measure in the layers (the
        # sampler says so), drop before the loss.
        count, strata = virtual.num_virtual, virtual.strata
        if not self.settings.fresh_virtual:
            virtual_key = jax.random.key(0)
        noise = sbn.virtual_samples(virtual_key, count, x.shape[1:])
        x = sbn.append_virtual(x, noise, strata)
        forward = self.network.train(variables, x, sampling_key)
        return forward._replace(logits=sbn.drop_virtual(forward.logits, count, strata))

    def _correct(
        self, variables: Variables, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        logits = self.network.evaluate(variables, self._scale(images))
        return (logits.argmax(-1) == labels).sum()

    def _measured(self) -> float | None:
        """Traces a forward pass and returns the share of values that is measured."""
        counts: list[tuple[int, int]] = []
        method = dataclasses.replace(
            self.method, sampler=Tally(self.method.sampler, counts)
        )
        network = self._network(method)
        rows = self.rows * self.method.copies
        if self.method.virtual is not None:
            rows += self.method.virtual.num_virtual

        def forward(key: jax.Array) -> jax.Array:
            x = jnp.zeros((rows, *self.shape))
            return network.train(network.init(key, x[:1]), x, key).logits

        jax.eval_shape(forward, jax.random.key(0))
        if not self.method.measures:
            return 1.0 if self.method.kind == "flax" else None
        return sum(n for n, _ in counts) / sum(total for _, total in counts)


def _of_groups(each: jax.Array) -> jax.Array:
    """Averages running statistics; counts and keys are the same in all groups."""
    return each.mean(0) if jnp.issubdtype(each.dtype, jnp.inexact) else each[0]


def _zeros() -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(())


def _crop_and_flip(key: jax.Array, image: jax.Array, pad: int = 4) -> jax.Array:
    """Shifts an image by up to ``pad`` pixels, and mirrors every other one."""
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    shift_key, flip_key = jax.random.split(key)
    y, x = jax.random.randint(shift_key, (2,), 0, 2 * pad + 1)
    image = jax.lax.dynamic_slice(padded, (y, x, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
