"""A model behind three functional calls, the same ones for linen and nnx.

The training step knows only :class:`Network` and its :class:`Variables`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

import flax_sbn as sbn
from harness.methods import Method
from models import linen_model, nnx_model

DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common.

    Attributes:
      model: one of ``models.LINEN``.
      api: ``'linen'`` or ``'nnx'``.
      width: features of the first stage or hidden layer; None for the model's own.
      batch_size: images in a step.
      norm_batch_size: how many images are normalized together, as on a device that
        holds so many; the gradient is that of the whole batch. None for all of it.
      epochs: passes over the training images.
      learning_rate: peak of the schedule.
      warmup: share of all steps in which the learning rate rises.
      weight_decay: of kernels.
      label_smoothing: share of the target that is spread over all classes.
      accumulate: micro-batches that a batch is divided into, one after the other.
      dtype: of the computation.
      augment: random crops and flips.
      fresh_virtual: whether virtual images are resampled in each step, instead of being
        the same in all steps, and with all seeds.
    """

    model: str = "resnet8"
    api: str = "linen"
    width: int | None = None
    batch_size: int = 128
    norm_batch_size: int | None = None
    epochs: int = 20
    learning_rate: float = 0.1
    warmup: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    accumulate: int = 1
    dtype: str = "float32"
    augment: bool = False
    fresh_virtual: bool = False

    @property
    def micro_batch_size(self) -> int:
        """Images that are in memory together."""
        return self.batch_size // self.accumulate


class Variables(NamedTuple):
    """What a network consists of.

    Attributes:
      params: what the optimizer trains.
      overwritten: running averages that are computed in the backward pass: what comes
        as their gradient is their next value.
      rest: running statistics and, in nnx, random streams.
    """

    params: Any
    overwritten: Any
    rest: Any


class Forward(NamedTuple):
    """What a forward pass gives in training.

    Attributes:
      logits: ``(N, num_classes)``.
      rest: the changed rest of the variables.
      loss: what layers add to the loss of the task.
      inputs: statistics of the layers' inputs, if the method needs them.
    """

    logits: jax.Array
    rest: Any
    loss: jax.Array
    inputs: Any


class Network(Protocol):
    """A model with functional parameters: the same three calls for linen and nnx."""

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """Returns the variables, given some images."""

    def train(self, variables: Variables, x: jax.Array, key: jax.Array) -> Forward:
        """Returns logits, and what changes and comes with them."""

    def evaluate(self, variables: Variables, x: jax.Array) -> jax.Array:
        """Returns logits."""


class LinenNetwork:
    """A linen model of the settings."""

    def __init__(
        self, settings: Settings, method: Method, shape: tuple[int, ...], classes: int
    ) -> None:
        model: Callable[..., Any] = functools.partial(
            linen_model,
            settings.model,
            method,
            num_classes=classes,
            dtype=DTYPES[settings.dtype],
            width=settings.width,
        )
        self.method = method
        self.trained, self.evaluated = model(train=True), model(train=False)

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """Returns the variables, given some images."""
        variables = self.trained.init(key, x)
        return Variables(
            variables["params"],
            variables.get(OVERWRITE_WITH_GRADIENT, {}),
            variables.get("batch_stats", {}),
        )

    def train(self, variables: Variables, x: jax.Array, key: jax.Array) -> Forward:
        """Returns logits, and what changes and comes with them."""
        apply = self.trained.apply
        if self.method.preconditioned:
            apply = functools.partial(sbn.linen.apply_with_inputs, self.trained)
        result = apply(
            _collections(variables),
            x,
            mutable=["batch_stats", "losses"],
            rngs={"sampling": key, "dropout": jax.random.fold_in(key, 1)},
        )
        inputs: Any = {}
        if self.method.preconditioned:
            result, inputs = result
        logits, updates = result
        rest = updates.get("batch_stats", {})
        return Forward(logits, rest, _total(updates.get("losses", {})), inputs)

    def evaluate(self, variables: Variables, x: jax.Array) -> jax.Array:
        """Returns logits, normalized with the running statistics."""
        return self.evaluated.apply(_collections(variables), x)


class NnxNetwork:
    """An nnx model of the settings."""

    def __init__(
        self, settings: Settings, method: Method, shape: tuple[int, ...], classes: int
    ) -> None:
        self.model = functools.partial(
            nnx_model,
            settings.model,
            method,
            in_shape=shape,
            num_classes=classes,
            dtype=DTYPES[settings.dtype],
            width=settings.width,
        )
        self.method = method
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: self.model(rngs=nnx.Rngs(0))))

    def init(self, key: jax.Array, x: jax.Array) -> Variables:
        """Returns the variables, given some images."""
        model = self.model(rngs=nnx.Rngs(key))
        if self.method.starts_from_data:
            sbn.nnx.initialize_batchless(model, x)
        return _variables(nnx.state(model))

    def train(self, variables: Variables, x: jax.Array, key: jax.Array) -> Forward:
        """Returns logits, and what changes and comes with them."""
        model = nnx.merge(self.graph, *variables, copy=True)
        inputs: Any = {}

        def forward(model: nnx.Module, x: jax.Array) -> jax.Array:
            nonlocal inputs
            if not self.method.preconditioned:
                return model(x)
            logits, inputs = sbn.nnx.call_with_inputs(model, x)
            return logits

        logits, losses = nnx.capture(forward, sbn.nnx.Loss)(model, x)
        rest = _variables(nnx.state(model)).rest
        return Forward(logits, rest, _total(losses), inputs)

    def evaluate(self, variables: Variables, x: jax.Array) -> jax.Array:
        """Returns logits, normalized with the running statistics."""
        model = nnx.merge(self.graph, *variables)
        model.eval()
        return model(x)


NETWORKS: dict[str, Callable[..., Network]] = {
    "linen": LinenNetwork,
    "nnx": NnxNetwork,
}


def _collections(variables: Variables) -> dict[str, Any]:
    return {
        "params": variables.params,
        OVERWRITE_WITH_GRADIENT: variables.overwritten,
        "batch_stats": variables.rest,
    }


def _variables(state: Any) -> Variables:
    kinds = (nnx.Param, sbn.nnx.OverwriteWithGradient, ...)
    return Variables(*nnx.split_state(state, *kinds))


def _total(losses: Any) -> jax.Array:
    return sum(jax.tree.leaves(losses), start=jnp.zeros(()))
