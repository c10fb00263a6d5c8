"""The optimizer of each method: SGD with momentum, and what some methods add to it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import flax_sbn as sbn
from harness.methods import Method
from harness.networks import Settings

# What methods have of their own: the clipping of networks without a norm, Adam's rate
# of means and scales that are learned, and the share of the learning rate that trains
# preconditioned networks, which diverge with all of it.
_CLIPPING = 0.02
_MEAN_AND_SCALE_RATE = 5e-3
_PRECONDITIONED_SHARE = 0.1
_HEADS = {"Dense_0", "head"}


def make_optimizer(
    settings: Settings, method: Method, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Returns a method's optimizer.

    Args:
      settings: learning rate, weight decay and number of epochs.
      method: the normalization.
      steps: number of steps of an epoch.
    """
    sgd = optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=_is_kernel),
        optax.sgd(learning_rate(settings, method, steps), momentum=0.9, nesterov=True),
    )
    if method.preconditioned:
        sgd = optax.chain(sbn.optim.batch_norm_preconditioning(), sgd)
    if method.kind == "norm_free":
        clip = optax.adaptive_grad_clip(_CLIPPING)
        sgd = optax.chain(optax.masked(clip, _is_clipped), sgd)
    if method.kind == "batchless":
        own = optax.adam(_MEAN_AND_SCALE_RATE)
        sgd = optax.partition({"sgd": sgd, "own": own}, _label)
    return optax.with_extra_args_support(sgd)


def learning_rate(settings: Settings, method: Method, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: up for a share of all steps, then a cosine.

    The arguments are those of :func:`make_optimizer`.
    """
    total, peak = settings.epochs * steps, settings.learning_rate
    if method.preconditioned:
        peak *= _PRECONDITIONED_SHARE
    warmup = max(1, int(settings.warmup * total))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(2, total))


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda param: jnp.ndim(param) > 1, params)


def _is_clipped(params: Any) -> Any:
    """Tells the kernels of all layers but that which makes the logits.

    Gains and biases that start from zero would hardly move within a few hundred steps.
    """
    return jax.tree.map_with_path(
        lambda path, param: jnp.ndim(param) > 1 and _names(path)[0] not in _HEADS,
        params,
    )


def _label(params: Any) -> Any:
    """Tells the means and scales that are learned from other parameters."""
    return jax.tree.map_with_path(
        lambda path, _: "own" if {"mean", "log_scale"} & {*_names(path)} else "sgd",
        params,
    )


def _names(path: Any) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")
