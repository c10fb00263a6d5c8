"""flax.linen.BatchNorm plus a sampler."""

import functools
import inspect
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_sbn.alternatives.ghost import ghost_batch_norm
from flax_sbn.arguments import check_numbers
from flax_sbn.estimation import ALL_INPUTS
from flax_sbn.linen.affine import scale_and_bias
from flax_sbn.linen.keys import draw_key
from flax_sbn.renormalization import renormalize
from flax_sbn.sampling import Sampler, needs_key
from flax_sbn.statistics import (
    Moments,
    Statistics,
    keep_unmeasured,
    mean_and_var,
    reduction_axes,
    update_running,
)

# Without what linen wraps around it, to which it would be a call of its own: captured,
# intercepted and tabulated beside that of the layer.
_flax_call = inspect.unwrap(nn.BatchNorm.__call__)


class BatchNorm(nn.BatchNorm):
    r"""Batch normalization with statistics from a sample of the batch.

    :class:`flax.linen.BatchNorm` with four more fields, ``sampler``,
    ``running_weight``, ``ghost_groups`` and ``rng_collection``; see there for the
    others. In training, with :math:`S` the positions that the sampler chooses:

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu_S}{\sqrt{v_S + \epsilon}} + \mathit{bias}

    Positions are drawn anew in each layer and step, from the rng stream ``'sampling'``
    or, as flax's dropout does, from ``'params'`` where it is missing; nothing is drawn
    at evaluation and in ``init``. Input and output are ``(N, *spatial, C)``, of any
    real or complex dtype; running statistics are float32.
    With ``sampler=None`` this is flax's layer to the bit, and parameters and statistics
    always have flax's names, so that checkpoints load either way.

    A step whose mask leaves no position to measure normalizes with the running
    statistics and leaves them as they are; with ``sampler=None`` its output is flax's,
    NaN. Samples are measured in float32 or wider, as exactly as in two passes, whatever
    ``force_float32_reductions`` and ``use_fast_variance`` say.

    Attributes:
      sampler: which positions are measured in training; None measures all of them.
      running_weight: how far a step's statistics are moved towards the running ones
        before they normalize, in [0, 1]; see :func:`flax_sbn.renormalize`.
      ghost_groups: number of equal groups of rows that are normalized separately in
        training: Ghost BN; see :func:`flax_sbn.alternatives.ghost_batch_norm`.
      rng_collection: name of the rng stream.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or ``momentum`` or ``epsilon`` no
        number.
      ValueError: if the sampler does not fit the input, ``axis`` or ``running_weight``
        is out of range, or the rng stream is missing and needed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.BatchNorm(
      ...     use_running_average=False, sampler=sbn.BatchSampling(4)
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> rngs = {"sampling": jax.random.key(2)}
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
      >>> y.shape, jax.tree.map(jnp.shape, updates)
      ((32, 8, 8, 6), {'batch_stats': {'mean': (6,), 'var': (6,)}})

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    sampler: Sampler | None = None
    running_weight: float = 0.0
    ghost_groups: int = 1
    rng_collection: str = "sampling"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; in training also updates the running statistics.

        Args:
          x: ``(N, *spatial, C)``, or with features at ``axis``.
          use_running_average: normalize with the running statistics (evaluation).
          mask: booleans that broadcast to ``x``: False is not measured.

        Returns:
          An array of the shape of ``x``.
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        axes = reduction_axes(x.ndim, self.axis)
        # These complain, also where nothing is measured.
        needs_key(self.sampler)
        check_numbers(momentum=self.momentum, epsilon=self.epsilon)
        if evaluate or self.is_initializing():
            return _flax_call(self, x, use_running_average, mask=mask)

        features = tuple(n for a, n in enumerate(x.shape) if a not in axes)
        if self._as_flax():
            running = self._running(features)
            y = _flax_call(self, x, use_running_average, mask=mask)
            if mask is not None:
                self._keep(keep_unmeasured(self._running(features), running))
            return y

        norm = functools.partial(
            ghost_batch_norm, x, num_groups=self.ghost_groups, axis=self.axis
        )
        return self._measured(norm, features, mask)

    @nn.nowrap
    def _measured(
        self,
        norm: Callable[..., tuple[jax.Array, Statistics]],
        features: tuple[int, ...],
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes with what ``norm`` measures, and updates the running statistics.

        Args:
          norm: called with scale, bias and the layer's options.
          features: extent of the feature axes.
          mask: see ``__call__``.

        Returns:
          The first result of ``norm``.
        """
        key = None
        if needs_key(self.sampler):
            key = draw_key(self, self.rng_collection, str(self.sampler))
        running = self._running(features)
        y, statistics = norm(
            *self._affine(features),
            sampler=self.sampler,
            key=key,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            running=running,
            measure=self._measure,
            correct=self._correct,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        self._keep(self._update(running, statistics))
        return y

    # What methods that measure or correct otherwise have of their own.

    # Whether the running average is of standard deviations, not of variances.
    averages_deviations: ClassVar[bool] = False

    @nn.nowrap
    def _measure(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        where: jax.Array | None,
        one_pass: bool | None,
    ) -> Moments:
        """Returns the moments of measured values."""
        return mean_and_var(x, axes, where, one_pass)

    @nn.nowrap
    def _correct(
        self, statistics: Statistics, running: Statistics | None
    ) -> Statistics:
        """Returns what to normalize with, given what was measured."""
        return renormalize(
            statistics,
            running,
            running_weight=self.running_weight,
            epsilon=self.epsilon,
        )

    @nn.nowrap
    def _update(self, running: Statistics, statistics: Statistics) -> Statistics:
        """Returns the running statistics after a step."""
        epsilon = self.epsilon if self.averages_deviations else None
        return update_running(running, statistics, self.momentum, std_epsilon=epsilon)

    @nn.nowrap
    def _folds(self) -> bool:
        """Whether the statistics are known before all of the input is."""
        wanted = self.has_variable("batch_stats", ALL_INPUTS)
        return self.sampler is not None and self.ghost_groups == 1 and not wanted

    @nn.nowrap
    def _as_flax(self) -> bool:
        """Whether training is that of flax's own layer."""
        own = type(self)
        return (
            self.sampler is None
            and self.running_weight == 0
            and self.ghost_groups == 1
            and own._measure is BatchNorm._measure
            and own._correct is BatchNorm._correct
            and own._update is BatchNorm._update
            and not self.averages_deviations
        )

    @nn.nowrap
    def _affine(self, features: tuple[int, ...]) -> tuple[jax.Array | None, ...]:
        """Returns scale and bias, None where the layer has none."""
        return scale_and_bias(self, features)

    @nn.nowrap
    def _running(self, features: tuple[int, ...]) -> Statistics:
        """Returns the running statistics; where there are none, does as flax does."""
        assert self.scope is not None
        scope = self.scope.rewound()  # flax's call asks for them, too
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = scope.variable("batch_stats", "mean", jnp.zeros, features, dtype)
        var = scope.variable("batch_stats", "var", jnp.ones, features, dtype)
        return Statistics(mean.value, var.value)

    @nn.nowrap
    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step."""
        self.put_variable("batch_stats", "mean", running.mean)
        self.put_variable("batch_stats", "var", running.var)
