"""The training step that the benchmarks time and take apart: one for all models.

Stochastic gradient descent with momentum on the softmax cross entropy of a classifier;
parameters and statistics in float32, computation in a narrower dtype if you like.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from harness.methods import Method
from models import IMAGE_SHAPES, linen_model

_LATTICE = sbn.LatticeSampling()
_FS = sbn.FeatureSampling(1 / 64)
_EIGHT_PATCHES = sbn.FeatureSampling(1 / 64, groups=8)
_ONE_PATCH = sbn.FeatureSampling(1 / 64, groups=1)
_MIXED = sbn.MixedSampling(_FS, sbn.VirtualSampling(4))
# What is compared: flax's own layers, ours before and after folding, and the limit.
VARIANTS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("Flax BN", "flax"),
        Method("BS 8", sampler=sbn.BatchSampling(8)),
        Method("BS 8 folded", sampler=sbn.BatchSampling(8), folded=True),
        Method("FS 1/64", sampler=_FS),
        Method("FS 1/64 folded", sampler=_FS, folded=True),
        Method("FS 1/64 groups=8 folded", sampler=_EIGHT_PATCHES, folded=True),
        Method("FS 1/64 groups=1 folded", sampler=_ONE_PATCH, folded=True),
        Method("FS+VDN folded", sampler=_MIXED, folded=True),
        Method("Lattice", sampler=_LATTICE),
        Method("Lattice folded", sampler=_LATTICE, folded=True),
        Method("no norm", "none"),
    )
}


class State(NamedTuple):
    """What a step changes."""

    params: Any
    batch_stats: Any
    optimizer: Any


class Step(NamedTuple):
    """A training step.

    Attributes:
      function: ``function(state, images, labels, key)`` returns the new state and the
        loss. It is jitted, and takes over the state's memory.
      args: shapes and types of these arguments, as ``jax.ShapeDtypeStruct``.
    """

    function: Any
    args: tuple[State, Any, Any, Any]


def training_step(
    model: str,
    method: Method,
    batch_size: int,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> Step:
    """Returns the training step of a model on images of its usual size.

    Args:
      model: one of ``models.IMAGE_SHAPES``.
      method: the normalization.
      batch_size: number of images, virtual ones among them if there are any.
      dtype: of images and computation; the parameters are float32.
      mesh: devices along the axis ``data``, to each of which ``jax.shard_map`` gives
        its own images; None for one program, wherever its arguments lie.
    """
    shape = IMAGE_SHAPES[model]
    num_classes = 1000 if shape[0] > 32 else 10  # ImageNet's, or CIFAR-10's
    net = linen_model(
        model, method, num_classes=num_classes, train=True, dtype=jnp.dtype(dtype)
    )
    optimizer = optax.sgd(0.1, momentum=0.9)

    def init(key: jax.Array) -> State:
        variables = net.init(key, jnp.zeros((1, *shape), dtype))
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), optimizer.init(params))

    def step(
        state: State, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[State, jax.Array]:
        if mesh is not None:  # each device draws its own positions
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))

        def objective(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = net.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                mutable=["batch_stats"],
                rngs={"sampling": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return _average(losses.mean()), updates.get("batch_stats", {})

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params)
        updates, opt_state = optimizer.update(grads, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        return State(params, jax.tree.map(_average, batch_stats), opt_state), loss

    if mesh is not None:
        rows = P("data")
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), rows, rows, P()), out_specs=P()
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (
        jax.eval_shape(init, key),
        jax.ShapeDtypeStruct((batch_size, *shape), dtype),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        key,
    )
    return Step(jax.jit(step, donate_argnums=0), args)


def _average(x: jax.Array) -> jax.Array:
    """Averages what ``jax.shard_map`` says differs between devices."""
    axes = tuple(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pmean(x, axes) if axes else x
