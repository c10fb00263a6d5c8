"""A model behind three functional calls, the same ones for linen and nnx.

The training step knows only :class:`Network`: parameters, which have a gradient, and
the rest, which does not: running statistics and, in nnx, random streams.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from methods import Method
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
      rows: how many images are normalized together, as on a device that holds so many;
        the gradient is that of the whole batch. None for the whole batch.
      epochs: passes over the training images.
      learning_rate: peak of the schedule.
      weight_decay: of kernels.
      dtype: of the computation.
      augment: random crops and flips.
      fresh_virtual: whether virtual rows are drawn anew in each step, instead of being
        the same in all steps, and with all seeds.
    """

    model: str = "resnet8"
    api: str = "linen"
    width: int | None = None
    batch_size: int = 128
    rows: int | None = None
    epochs: int = 20
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    dtype: str = "float32"
    augment: bool = False
    fresh_virtual: bool = False


class Network(Protocol):
    """A model with functional parameters: the same three calls for linen and nnx."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns parameters, and whatever else changes in training."""

    def train(
        self, params: Any, rest: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns logits and the changed rest."""

    def evaluate(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
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
        self.shape = shape
        self.trained, self.evaluated = model(train=True), model(train=False)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns parameters and running statistics."""
        variables = self.trained.init(key, jnp.zeros((1, *self.shape)))
        return variables["params"], variables.get("batch_stats", {})

    def train(
        self, params: Any, rest: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns logits and running statistics."""
        logits, updates = self.trained.apply(
            {"params": params, "batch_stats": rest},
            x,
            mutable=["batch_stats"],
            rngs={"sampling": key},
        )
        return logits, updates.get("batch_stats", {})

    def evaluate(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
        """Returns logits, normalized with the running statistics."""
        return self.evaluated.apply({"params": params, "batch_stats": rest}, x)


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
        self.graph = nnx.graphdef(nnx.eval_shape(lambda: self.model(rngs=nnx.Rngs(0))))

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Returns parameters; running statistics and random streams."""
        state = nnx.state(self.model(rngs=nnx.Rngs(key)))
        params, rest = nnx.split_state(state, nnx.Param, ...)
        return params, rest

    def train(
        self, params: Any, rest: Any, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns logits; running statistics and random streams."""
        model = nnx.merge(self.graph, params, rest, copy=True)
        logits = model(x)
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    def evaluate(self, params: Any, rest: Any, x: jax.Array) -> jax.Array:
        """Returns logits, normalized with the running statistics."""
        model = nnx.merge(self.graph, params, rest)
        model.eval()
        return model(x)


NETWORKS: dict[str, Callable[..., Network]] = {
    "linen": LinenNetwork,
    "nnx": NnxNetwork,
}
