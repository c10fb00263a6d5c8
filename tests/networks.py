"""A small network in linen and nnx, and the loss of a training step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import flax_sbn as sbn
from tests import cases
from tests.samples import KEY

LAYERS, CLASSES = 2, 3
SHAPE = (32, 8, 8, 3)


@dataclasses.dataclass(frozen=True)
class Norm:
    """How a network is normalized; not at all if it is none of these."""

    sampler: Any = None
    axis_name: str | None = None
    folded: bool = False
    none: bool = False
    momentum: float = 0.9
    ghost_groups: int = 1


class Network(nn.Module):
    norm: Norm

    @nn.compact
    def __call__(self, x):
        options = {
            "sampler": self.norm.sampler,
            "axis_name": self.norm.axis_name,
            "use_running_average": False,
            "momentum": self.norm.momentum,
        }
        for _ in range(LAYERS):
            if self.norm.none:
                x = nn.relu(nn.Conv(4, (3, 3))(x))
            elif self.norm.folded:
                x = sbn.linen.ConvNorm(4, (3, 3), activation=nn.relu, **options)(x)
            else:
                x = nn.Conv(4, (3, 3), use_bias=False)(x)
                norm = sbn.linen.BatchNorm(
                    ghost_groups=self.norm.ghost_groups, **options
                )
                x = nn.relu(norm(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class NNXNetwork(nnx.Module):
    def __init__(self, norm, rngs):
        options = {
            "sampler": norm.sampler,
            "axis_name": norm.axis_name,
            "momentum": norm.momentum,
            "rngs": rngs,
        }
        layers, width = [], SHAPE[-1]
        for _ in range(LAYERS):
            if norm.none:
                layers += [nnx.Conv(width, 4, (3, 3), rngs=rngs), nnx.relu]
            elif norm.folded:
                layer = sbn.nnx.ConvNorm(
                    width, 4, (3, 3), activation=nnx.relu, **options
                )
                layers += [layer]
            else:
                conv = nnx.Conv(width, 4, (3, 3), use_bias=False, rngs=rngs)
                bn = sbn.nnx.BatchNorm(4, ghost_groups=norm.ghost_groups, **options)
                layers += [conv, bn, nnx.relu]
            width = 4
        self.layers = nnx.List(layers)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


def loss_of(logits, labels):
    return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()


def linen_step(norm):
    """Returns parameters, other state, and what makes loss and new state of them."""
    network = Network(norm)
    state = network.init(KEY, jnp.zeros((1, *SHAPE[1:])))
    params = state.pop("params")

    def loss(params, state, x, labels, key):
        logits, updates = network.apply(
            {"params": params, **state},
            x,
            mutable=["batch_stats"],
            rngs={"sampling": key},
        )
        return loss_of(logits, labels), updates

    return params, state, loss


def nnx_step(norm):
    network = NNXNetwork(norm, nnx.Rngs(params=0, sampling=1))
    graph, params, state = nnx.split(network, nnx.Param, ...)

    def loss(params, state, x, labels, key):
        network = nnx.merge(graph, params, state, copy=True)
        loss = loss_of(network(x), labels)
        return loss, nnx.state(network, nnx.Not(nnx.Param))

    return params, state, loss


def batch():
    labels = np.eye(CLASSES, dtype=np.float32)
    return cases.inputs(SHAPE), labels[np.arange(SHAPE[0]) % CLASSES]
