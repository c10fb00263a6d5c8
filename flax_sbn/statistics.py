"""Mean and variance of a batch, or of a sample of it; mixing and running averages.

Letters in shapes: ``N`` images, ``H W`` spatial axes (any number), ``C`` features.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_sbn.arguments import check_numbers
from flax_sbn.moments import Measure, abs_square, mean_and_var, pool_over_devices
from flax_sbn.sampling import Sampler, sampled_parts
from flax_sbn.windows import Part
from flax_sbn.xla.sharding import laid_out_by_xla

Axis = int | Sequence[int]


class Statistics(NamedTuple):
    """Mean and (biased) variance of every feature.

    Attributes:
      mean: ``(C,)``, float32 or wider; complex for complex inputs.
      var: ``(C,)``, real, float32 or wider.
    """

    mean: jax.Array
    var: jax.Array


def _flatten(statistics: Statistics) -> tuple[tuple[jax.Array, ...], None]:
    return tuple(statistics), None


# Numbered in paths of trees, not named: nnx.tabulate fails on named tuples.
jax.tree_util.register_pytree_node(
    Statistics, _flatten, lambda _, arrays: Statistics(*arrays)
)


def reduction_axes(ndim: int, axis: Axis) -> tuple[int, ...]:
    """Returns all axes but the feature axes, ascending: the batch first.

    Args:
      ndim: rank of the input.
      axis: the feature axis or axes; negative ones count from the end.

    Raises:
      ValueError: if an axis is out of range.

    Example:
      >>> reduction_axes(4, -1), reduction_axes(4, 1)
      ((0, 1, 2), (0, 2, 3))
    """
    features = set()
    for a in (axis,) if isinstance(axis, int) else axis:
        if not -ndim <= operator.index(a) < ndim:
            raise ValueError(
                f"Expected axis in [{-ndim}, {ndim}) for an input of rank {ndim}, got "
                f"{axis=}. Features last is axis=-1, features first axis=1."
            )
        features.add(a % ndim)
    return tuple(a for a in range(ndim) if a not in features)


def feature_shape(shape: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Returns the extent of the feature axes, ascending; see :func:`reduction_axes`."""
    axes = reduction_axes(len(shape), axis)
    return tuple(n for a, n in enumerate(shape) if a not in axes)


def of_features(
    name: str, value: ArrayLike, shape: Sequence[int], axis: Axis, *stack: int
) -> jax.Array:
    """Returns an array that has one number, or a stack, for each feature of an input.

    Raises:
      ValueError: if the array, called ``name``, has another shape than the features.
    """
    value = jnp.asarray(value)
    features = (*stack, *feature_shape(shape, axis))
    if value.shape != features:
        raise ValueError(
            f"Expected {name} of shape {features}, got {name} of shape {value.shape} "
            f"for an input of shape {tuple(shape)} and {axis=}. Is `axis` the feature "
            "axis?"
        )
    return value


def batch_statistics(
    x: ArrayLike,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    running: Statistics | None = None,
    measure: Measure | None = None,
) -> Statistics:
    r"""Measures mean and variance of every feature, on a sample of the batch.

    With :math:`S` the sampled positions and :math:`m = |S|`:

    .. math::
      \begin{aligned}
      \mu_c &= \frac{1}{m} \sum_{i \in S} x_{ic} \\
      v_c &= \frac{1}{m} \sum_{i \in S} |x_{ic} - \mu_c|^2
      \end{aligned}

    Args:
      x: ``(N, *spatial, C)``, or with features at ``axis``; the first of the other axes
        holds the images. Any real or complex dtype; measured in float32 or wider.
      sampler: which positions are measured; None measures all of them.
      key: random key, for samplers that draw positions.
      axis: the feature axis or axes.
      mask: booleans that broadcast to ``x``: False leaves a position out.
      axis_name: name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) over whose
        devices statistics are pooled, weighted by the number of values, with one small
        all-reduce.
      axis_index_groups: groups of devices along ``axis_name`` that pool separately.
      use_fast_variance: measure a whole batch in one pass, as :math:`E|x|^2 - |E x|^2`.
        A sample is always measured in one pass about one of its values, which is as
        exact as two passes. (On GPUs a bfloat16 sample is measured about zero: its own
        rounding is larger.)
      running: statistics returned for a feature of which nothing was measured, because
        the mask is False at every sampled position; by default mean 0, variance 1. When
        devices pool their statistics, these also serve as the origin, which keeps
        precision.
      measure: what is made of the measured values; None for mean and variance. Other
        methods have their own, such as :func:`flax_sbn.alternatives.l1_moments`.

    Returns:
      Statistics of shape ``(C,)``.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if the sampler does not fit the shape, its key is missing, ``axis`` is
        out of range or ``mask`` does not broadcast.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import BatchSampling, batch_statistics
      >>> x = 1000 + jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
      >>> s = batch_statistics(x, sampler=BatchSampling(16), key=jax.random.key(1))
      >>> bool((abs(s.mean - 1000) < 0.1).all() and (abs(s.var - 1) < 0.1).all())
      True

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """
    how = Measurement(
        sampler=sampler,
        key=key,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        running=running,
        measure=measure,
    )
    return how.measured(jnp.asarray(x), axis)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """How a batch is measured: the options of :func:`batch_statistics` as one value."""

    sampler: Sampler | None = None
    key: jax.Array | None = None
    mask: ArrayLike | None = None
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    running: Statistics | None = None
    measure: Measure | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        """What :func:`dataclasses.replace` takes where functions may not close over."""
        return {"key": self.key, "mask": self.mask, "running": self.running}

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Returns what is measured, of measured axes of extent ``shape``."""
        devices = 1
        if self.axis_name is not None:
            # Of a number that all devices know, the sum is known, too.
            groups = self.axis_index_groups
            devices = lax.psum(1, self.axis_name, axis_index_groups=groups)
        return sampled_parts(self.sampler, shape, self.key, devices)

    def measured(self, x: jax.Array, axis: Axis) -> Statistics:
        """Returns the statistics of ``x``."""
        axes = reduction_axes(x.ndim, axis)
        arrays = self.arrays
        if self.mask is not None:
            arrays["mask"] = broadcast_mask(self.mask, x.shape)

        def measured(x: jax.Array, arrays: dict[str, Any]) -> Statistics:
            how = dataclasses.replace(self, **arrays)
            parts = how.parts(tuple(x.shape[a] for a in axes))
            return how.statistics(parts, [part.take(x, axes) for part in parts], axes)

        return laid_out_by_xla(measured, x, arrays)

    def statistics(
        self, parts: Sequence[Part], values: Sequence[jax.Array], axes: tuple[int, ...]
    ) -> Statistics:
        """Returns the statistics of values that were taken part by part.

        ``axes`` are those of the batch and its spatial axes.
        """
        masks: list[jax.Array | None] = [None] * len(parts)
        if self.mask is not None:
            masks = [part.take(jnp.asarray(self.mask), axes) for part in parts]
        one_pass = self.use_fast_variance if self.sampler is None else None
        measure = self.measure or mean_and_var
        moments = [
            measure(x, axes, where, one_pass)
            for x, where in zip(values, masks, strict=True)
        ]
        if self.axis_name is not None:
            origin = 0.0 if self.running is None else self.running.mean
            moments = pool_over_devices(
                moments, self.axis_name, self.axis_index_groups, origin
            )
        statistics = [Statistics(mean, var) for _, mean, var in moments]
        if self.mask is None:
            return mix_statistics(statistics, [part.weight for part in parts])

        # A part of which nothing was measured leaves its weight to the others.
        weights = [
            jnp.where(count > 0, part.weight, 0.0)
            for part, (count, _, _) in zip(parts, moments, strict=True)
        ]
        total = sum(weights)
        measured = mix_statistics(
            statistics,
            [weight / jnp.where(total > 0, total, 1.0) for weight in weights],
        )
        mean, var = lax.stop_gradient(self.running or (0.0, 1.0))
        return Statistics(
            jnp.where(total > 0, measured.mean, mean),
            jnp.where(total > 0, measured.var, var),
        )


def mix_statistics(
    statistics: Sequence[Statistics], weights: Sequence[float | jax.Array]
) -> Statistics:
    r"""Returns the statistics of a mixed population.

    .. math::
      \begin{aligned}
      \mu &= \sum_k w_k \mu_k \\
      v &= \sum_k w_k \left( v_k + |\mu_k - \mu|^2 \right)
      \end{aligned}

    Args:
      statistics: those of each population, ``(C,)``.
      weights: the share ``w_k`` of each, adding up to one; scalars or ``(C,)``.

    Returns:
      Statistics of shape ``(C,)``.

    Raises:
      ValueError: if there is not one weight for each population.

    Example:
      >>> import jax.numpy as jnp
      >>> low = Statistics(jnp.array([-1.0]), jnp.array([2.0]))
      >>> high = Statistics(jnp.array([3.0]), jnp.array([4.0]))
      >>> mix_statistics([low, high], [0.5, 0.5])
      Statistics(mean=Array([1.], dtype=float32), var=Array([7.], dtype=float32))
    """
    if len(statistics) != len(weights) or not statistics:
        raise ValueError(
            f"Expected one weight for each population, got {len(weights)} weights and "
            f"{len(statistics)} statistics."
        )
    if len(statistics) == 1:
        return statistics[0]
    pairs = list(zip(weights, statistics, strict=True))
    mean = functools.reduce(operator.add, (w * s.mean for w, s in pairs))
    var = functools.reduce(
        operator.add, (w * (s.var + abs_square(s.mean - mean)) for w, s in pairs)
    )
    return Statistics(mean, var)


def update_running(
    running: Statistics,
    statistics: Statistics,
    momentum: float | jax.Array,
    *,
    std_epsilon: float | None = None,
) -> Statistics:
    r"""Returns the exponential moving average, which carries no gradient.

    .. math::
      r \leftarrow r + (1 - \mathit{momentum}) (s - r)

    Args:
      running: the average so far, ``(C,)``.
      statistics: those of this step, ``(C,)``.
      momentum: decay rate of the average, as in Flax: the weight of the old value.
      std_epsilon: if given, standard deviations :math:`\sqrt{v + \epsilon}` are
        averaged, and the variance is that of their average: Batch Renormalization's
        rule.

    Raises:
      TypeError: if ``momentum`` is not a number.

    Returns:
      Statistics of shape ``(C,)``, in the dtype of ``running``. Where ``statistics``
      equals ``running``, nothing changes, not even by rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> running = Statistics(jnp.array([0.0]), jnp.array([1.0]))
      >>> update_running(running, Statistics(jnp.array([2.0]), jnp.array([3.0])), 0.5)
      Statistics(mean=Array([1.], dtype=float32), var=Array([2.], dtype=float32))
    """

    def update(r: jax.Array, s: jax.Array) -> jax.Array:
        updated = r + (1 - momentum) * (lax.stop_gradient(s) - r)
        # As in Flax, a running mean that starts real becomes complex with its data.
        return updated if jnp.iscomplexobj(updated) else updated.astype(r.dtype)

    check_numbers(momentum=momentum)
    if std_epsilon is None:
        return Statistics(*map(update, running, statistics))
    old, new = (jnp.sqrt(s.var + std_epsilon) for s in (running, statistics))
    # In terms of the variance, so that where both are equal nothing changes.
    step = update(old, new) - old
    var = running.var + step * (2 * old + step)
    return Statistics(
        update(running.mean, statistics.mean), var.astype(running.var.dtype)
    )


def keep_unmeasured(updated: Statistics, running: Statistics) -> Statistics:
    """Returns ``updated``, or ``running`` where nothing was measured and it is NaN."""
    return jax.tree.map(lambda u, r: jnp.where(jnp.isnan(u), r, u), updated, running)


def broadcast_mask(mask: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns a mask of the given shape, or raises a ValueError that says why not."""
    mask = jnp.asarray(mask, bool)
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"Expected mask to broadcast to the input, got mask of shape {mask.shape} "
            f"and input of {shape=}. Give it size 1 on the axes that it does not mask."
        ) from None
