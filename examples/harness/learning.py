"""What one step of training does, whatever feeds it: forward, loss, gradients, update.

Pure functions of arrays, for a caller to compile. Where the arrays lie on several
devices, each of these works on its own images.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import NDArray

import flax_sbn as sbn
from harness.methods import Method, Tally
from harness.networks import NETWORKS, Forward, Network, Settings, Variables
from harness.optimizers import make_optimizer
from harness.processes import AXIS


class Task(NamedTuple):
    """What is to be told apart.

    Attributes:
      shape: ``(H, W, C)``, or ``(L, C)`` of sequences.
      num_classes: how many there are.
      mean: ``(C,)``, of the training images, which are uint8.
      std: likewise.
      label_shape: extents of an input's labels; of pixels ``(H, W)``.
    """

    shape: tuple[int, ...]
    num_classes: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    label_shape: tuple[int, ...] = ()


class Model(NamedTuple):
    """What training changes."""

    variables: Variables
    optimizer: Any


class Totals(NamedTuple):
    """Sums over the images of a batch."""

    loss: jax.Array
    correct: jax.Array


class _Gradients(NamedTuple):
    """What a micro-batch gives, to be averaged."""

    params: Any
    inputs: Any


class Learner:
    """A network, its normalization and its optimizer."""

    def __init__(
        self, settings: Settings, method: Method, task: Task, steps: int, mesh: Mesh
    ) -> None:
        """Checks that all fit together, without computing anything.

        Args:
          settings: what all runs have in common.
          method: the normalization.
          task: what is to be told apart.
          steps: of an epoch.
          mesh: the devices.

        Raises:
          ValueError: if they do not: a sample larger than the batch, for instance.
        """
        self.settings, self.method, self.task = settings, method, task
        self.mesh, devices = mesh, mesh.size
        for name in ("label_smoothing", "warmup"):
            if not 0 <= (share := getattr(settings, name)) <= 1:
                raise ValueError(f"Expected {name} from 0 to 1, got {name}={share}.")
        whole = devices * settings.accumulate
        if settings.batch_size % whole:
            raise ValueError(
                "Expected a batch size that is a multiple of devices and micro-batches "
                f"({devices} x {settings.accumulate}), got "
                f"batch_size={settings.batch_size}."
            )
        micro_batch = settings.micro_batch_size
        self.norm_batch_size = settings.norm_batch_size or micro_batch
        if micro_batch % self.norm_batch_size:
            raise ValueError(
                f"Expected a batch size{' a micro-batch' * (settings.accumulate > 1)} "
                "that is a multiple of the images normalized together, got "
                f"batch_size={micro_batch} and "
                f"norm_batch_size={self.norm_batch_size}."
            )
        self.groups = micro_batch // self.norm_batch_size
        self.network = self._network(method)
        self.optimizer = make_optimizer(settings, method, steps)
        self.measured = self._measured()

    def init(self, key: jax.Array, images: jax.Array) -> Model:
        """Returns the model before the first step.

        Args:
          key: of the parameters.
          images: some, for methods that start from data.
        """
        x = jnp.zeros((1, *self.task.shape))
        if self.method.starts_from_data:
            x = self.scale(images[: self.norm_batch_size])
        variables = self.network.init(key, x)
        return Model(variables, self.optimizer.init(variables.params))

    def scale(self, images: jax.Array) -> jax.Array:
        """Returns images of mean 0 and standard deviation 1."""
        mean, std = (
            jnp.expand_dims(a, range(images.ndim - 1))
            for a in (self.task.mean, self.task.std)
        )
        return (images.astype(jnp.float32) - mean) / std

    def update(
        self,
        model: Model,
        images: jax.Array,
        labels: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> tuple[Model, Totals]:
        """Returns the model after a step, and how the model before it did."""
        batch = (images, labels, sampling_key, virtual_key)
        micro_batches = self.settings.accumulate
        if micro_batches == 1:
            variables, totals, gradients = self._gradients(model.variables, *batch)
        else:
            variables, totals, gradients = self._accumulate(model.variables, *batch)
        params = model.variables.params
        updates, optimizer = self.optimizer.update(
            gradients.params, model.optimizer, params, inputs=gradients.inputs
        )
        params = optax.apply_updates(params, updates)
        return Model(variables._replace(params=params), optimizer), totals

    def evaluate(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Returns logits, normalized with the running statistics."""
        return self.network.evaluate(variables, self.scale(images))

    def _accumulate(
        self,
        variables: Variables,
        images: jax.Array,
        labels: jax.Array,
        *keys: jax.Array,
    ) -> tuple[Variables, Totals, _Gradients]:
        """Goes through the micro-batches; each has images of every device."""
        count = self.settings.accumulate

        def divide(array: jax.Array) -> jax.Array:
            return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)

        micro_batches = (
            divide(images),
            divide(labels),
            *(jax.random.split(key, count) for key in keys),
        )
        first = jax.tree.map(lambda each: each[0], micro_batches)
        _, *shapes = jax.eval_shape(self._gradients, variables, *first)
        zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)

        def body(carry: Any, micro_batch: Any) -> tuple[Any, None]:
            variables, sums = carry
            variables, *more = self._gradients(variables, *micro_batch)
            return (variables, jax.tree.map(jnp.add, sums, more)), None

        (variables, (totals, gradients)), _ = jax.lax.scan(
            body, (variables, zeros), micro_batches
        )
        return variables, totals, jax.tree.map(lambda each: each / count, gradients)

    def _gradients(
        self,
        variables: Variables,
        images: jax.Array,
        labels: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> tuple[Variables, Totals, _Gradients]:
        """Returns variables with new running statistics, and the gradients."""

        def loss_fn(params: Any, overwritten: Any) -> tuple[jax.Array, Any]:
            given = Variables(params, overwritten, variables.rest)
            forward = self.forward(given, images, sampling_key, virtual_key)
            losses = _of_images(
                _cross_entropy(forward.logits, labels, self.settings.label_smoothing)
            )
            return losses.mean() + forward.loss, (losses, forward)

        (_, (losses, forward)), (grads, overwritten) = jax.value_and_grad(
            loss_fn, (0, 1), has_aux=True
        )(*variables[:2])
        # Of these, each group of images gives the next value.
        overwritten = jax.tree.map(lambda each: each / self.groups, overwritten)
        correct = hits(forward.logits, labels)
        return (
            Variables(variables.params, overwritten, forward.rest),
            Totals(losses.sum(), correct),
            _Gradients(grads, forward.inputs),
        )

    def forward(
        self,
        variables: Variables,
        images: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> Forward:
        """Returns the logits, and the mean of what else the groups of images make."""
        x = self.scale(images)
        if self.groups == 1:
            return self._group(variables, x, sampling_key, virtual_key)
        groups = self._groups
        if self.groups % self.mesh.size == 0:
            batch = PartitionSpec(AXIS)
            groups = jax.shard_map(
                groups,
                mesh=self.mesh,
                in_specs=(PartitionSpec(), batch, batch, batch),
                out_specs=batch,
            )
        forward = groups(
            variables,
            x.reshape(self.groups, -1, *x.shape[1:]),
            jax.random.split(sampling_key, self.groups),
            jax.random.split(virtual_key, self.groups),
        )
        logits = forward.logits.reshape(len(x), *forward.logits.shape[2:])
        return jax.tree.map(_of_groups, forward)._replace(logits=logits)

    def _groups(self, variables: Variables, x: jax.Array, *keys: jax.Array) -> Forward:
        """Returns what each group of images makes; alone, at the speed of one."""
        if len(x) > 1:
            return jax.vmap(self._group, (None, 0, 0, 0))(variables, x, *keys)
        forward = self._group(variables, x[0], *(key[0] for key in keys))
        return jax.tree.map(lambda each: each[None], forward)

    def _group(
        self,
        variables: Variables,
        x: jax.Array,
        sampling_key: jax.Array,
        virtual_key: jax.Array,
    ) -> Forward:
        """Returns the logits of images that are normalized together."""
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

    def _network(self, method: Method) -> Network:
        network = NETWORKS[self.settings.api]
        task = self.task
        return network(self.settings, method, task.shape, task.num_classes)

    def _measured(self) -> float | None:
        """Traces a forward pass and returns the share of values that is measured."""
        counts: list[tuple[int, int]] = []
        method = dataclasses.replace(
            self.method, sampler=Tally(self.method.sampler, counts)
        )
        network = self._network(method)
        images = self.norm_batch_size * self.method.copies
        if self.method.virtual is not None:
            images += self.method.virtual.num_virtual

        def forward(key: jax.Array) -> jax.Array:
            x = jnp.zeros((images, *self.task.shape))
            return network.train(network.init(key, x[:1]), x, key).logits

        logits = jax.eval_shape(forward, jax.random.key(0))
        if logits.shape[1:-1] != self.task.label_shape:
            raise ValueError(
                f"Expected logits for labels of shape {self.task.label_shape}, got "
                f"{logits.shape[1:-1]} of {self.settings.model}. A U-Net is for data "
                "sets with labels of pixels."
            )
        if not self.method.measures:
            return 1.0 if self.method.kind == "flax" else None
        return sum(n for n, _ in counts) / sum(total for _, total in counts)


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many images are right; of one with many labels, the share that is."""
    return _of_images(logits.argmax(-1) == labels).sum()


def _of_images(each: jax.Array) -> jax.Array:
    """Returns means over all of an example."""
    return each.reshape(len(each), -1).mean(1)


def _of_groups(each: jax.Array) -> jax.Array:
    """Averages running statistics; counts and keys are the same in all groups."""
    return each.mean(0) if jnp.issubdtype(each.dtype, jnp.inexact) else each[0]


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Returns each example's loss; smoothing spreads this share over all classes."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * losses + smoothing * uniform
