"""Running statistics measured anew: those of all values of many batches.

What :func:`flax_sbn.linen.estimate_statistics` and its like for NNX have in common.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flax_sbn.moments import (
    Measure,
    Moments,
    mean_and_var,
    pool_moments,
    pool_over_devices,
)
from flax_sbn.statistics import Statistics, broadcast_mask, reduction_axes
from flax_sbn.xla.sharding import laid_out_by_xla

# Where a norm keeps what it has measured. While it is there, no layer folds: all of its
# output is wanted.
ALL_INPUTS = "all_inputs"

Path = tuple[Any, ...]
State = TypeVar("State")


class Measured(NamedTuple):
    """What all inputs of a norm so far amount to.

    Attributes:
      origin: mean of the first batch. Near it float32 has digits to spare, however
        large the mean is and however many batches are added.
      moments: those of the inputs less the origin.
    """

    origin: jax.Array
    moments: Moments


def nothing_measured(running: Statistics) -> Measured:
    """Returns what no inputs amount to, of the shape of running statistics."""
    zero = jnp.zeros(running.var.shape, jnp.promote_types(running.var.dtype, "float32"))
    return Measured(zero, Moments(zero, zero, zero))


def add_call(
    norm: Any,
    before: Measured,
    running: Statistics,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> Measured:
    """Returns what all inputs so far amount to, given those of another call of a norm.

    Its input is measured as a whole, as ours measure (Flax's, mean and variance),
    unless it evaluates. Its running mean is the origin between devices.
    """
    if use_running_average is None:
        use_running_average = norm.use_running_average
    if use_running_average:
        return before
    x = jnp.asarray(x)
    axes = reduction_axes(x.ndim, norm.axis)
    if mask is not None:
        mask = broadcast_mask(mask, x.shape)
    measure: Measure = getattr(norm, "_measure", mean_and_var)

    def added(
        x: jax.Array, mask: jax.Array | None, before: Measured, running: Statistics
    ) -> Measured:
        new = measure(x, axes, mask, False)
        if norm.axis_name is not None:
            [new] = pool_over_devices(
                [new], norm.axis_name, norm.axis_index_groups, running.mean
            )
        origin = jnp.where(before.moments.num > 0, before.origin, new.mean)
        new = new._replace(mean=new.mean - origin)
        return Measured(origin, pool_moments(before.moments, new))

    return laid_out_by_xla(added, x, mask, before, running)


def over_batches(
    step: Callable[[State, Any, int], State], state: State, batches: Iterable[Any]
) -> State:
    """Returns the state after a step with each batch and its number."""
    if isinstance(batches, jax.Array | np.ndarray):
        raise TypeError(
            f"Expected an iterable of batches, got an array of shape {batches.shape}. "
            "Pass [x] for a single batch x, list(x) for batches along the first axis."
        )
    num = 0
    for batch in batches:
        state = step(state, batch, num)
        num += 1
    if num == 0:
        raise ValueError(
            "Expected at least one batch, got none. A generator can be run through "
            "only once: make a new one."
        )
    return state


def estimated(
    running: Mapping[Path, Statistics], measured: Mapping[Path, Measured]
) -> dict[Path, Statistics]:
    """Returns new running statistics, the old ones where nothing was measured."""
    on_host = jax.device_get([m.moments for m in measured.values()])
    if not any(np.any(m.num > 0) for m in on_host):
        raise ValueError(
            "Expected a model that trains batch norms, got none that normalizes with "
            f"its batch, of {len(running)} with running statistics. Call the model as "
            "in training: train=True, or however it is told; model.train() in nnx."
        )
    bad = [
        "/".join(map(str, path)) or "the model itself"
        for path, m in zip(measured, on_host, strict=True)
        if not np.all(np.isfinite(m.mean) & np.isfinite(m.var))
    ]
    if bad:
        raise ValueError(
            f"Expected finite inputs of all batch norms, got NaN, infinity or an "
            f"overflow in {len(bad)} of {len(running)}: {', '.join(bad[:3])}"
            f"{', ...' if bad[3:] else ''}. Look for them in parameters and batches."
        )
    return {path: _replaced(old, measured[path]) for path, old in running.items()}


def _replaced(running: Statistics, measured: Measured) -> Statistics:
    origin, (num, mean, var) = measured

    def replace(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.where(num > 0, new, old)
        # As in training, a running mean that starts real becomes complex with its data.
        return new if jnp.iscomplexobj(new) else new.astype(old.dtype)

    return Statistics(replace(running.mean, origin + mean), replace(running.var, var))
