"""flax.linen.BatchNorm plus a sampler."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_sbn.alternatives.ghost import ghost_batch_norm
from flax_sbn.arguments import check_numbers
from flax_sbn.linen.variables import draw_key, evaluates, scale_and_bias
from flax_sbn.modules.estimation import ALL_INPUTS
from flax_sbn.modules.hooks import Hooks
from flax_sbn.sampling import Sampler, needs_key
from flax_sbn.statistics import Statistics, feature_shape, keep_unmeasured

# Without what Linen wraps around it, to which it would be a call of its own: captured,
# intercepted and tabulated beside that of the layer.
_flax_call = inspect.unwrap(nn.BatchNorm.__call__)


def shared_options(layer: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """Returns the fields that a layer has in common with a class."""
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


class BatchNorm(nn.BatchNorm, Hooks):
    r"""Batch normalization with statistics from a sample of the batch.

    :class:`flax.linen.BatchNorm` with four more fields, ``sampler``,
    ``running_weight``, ``ghost_groups`` and ``rng_collection``; see there for the
    others. In training, with :math:`S` the positions that the sampler chooses:

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu_S}{\sqrt{v_S + \epsilon}} + \mathit{bias}

    Samplers that draw positions do so in each layer and step, with keys from the rng
    stream ``'sampling'`` or, if it is missing, ``'params'``, as Flax's dropout does.
    Nothing is drawn at evaluation or in ``init``. Input and output are
    ``(N, *spatial, C)``, of any real or complex dtype; running statistics are float32.
    With ``sampler=None`` this is Flax's layer bit for bit, and parameters and
    statistics always have Flax's names, so that checkpoints load either way.

    A step whose mask leaves no position to measure normalizes with the running
    statistics and leaves them as they are; with ``sampler=None`` its output is Flax's,
    NaN. Samples are measured in float32 or wider, as exactly as in two passes, whatever
    ``force_float32_reductions`` and ``use_fast_variance`` say.

    Attributes:
      sampler: which positions are measured in training; None measures all of them.
      running_weight: how far a step's statistics are moved towards the running ones
        before normalizing, in [0, 1]; see :func:`flax_sbn.renormalize`.
      ghost_groups: number of equal groups of images that are normalized separately in
        training: Ghost BN; see :func:`flax_sbn.alternatives.ghost_batch_norm`.
      rng_collection: name of the rng stream.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or ``momentum`` or ``epsilon`` is not
        a number.
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
        evaluate = evaluates(self.use_running_average, use_running_average)
        # These complain, also where nothing is measured.
        features = feature_shape(x.shape, self.axis)
        needs_key(self.sampler)
        check_numbers(momentum=self.momentum, epsilon=self.epsilon)
        if evaluate or self.is_initializing():
            return _flax_call(self, x, use_running_average, mask=mask)

        if self._as_flax():
            running = self._running(features)
            y = _flax_call(self, x, use_running_average, mask=mask)
            if mask is not None:
                self._keep(keep_unmeasured(self._running(features), running))
            return y

        norm = functools.partial(
            ghost_batch_norm, x, num_groups=self.ghost_groups, axis=self.axis
        )
        y, _ = self._step(norm, *self._values(features), mask)
        return y

    @nn.nowrap
    def _key(self) -> jax.Array:
        """Draws a key for the sampler."""
        return draw_key(self, self.rng_collection, str(self.sampler))

    @nn.nowrap
    def _folds(self) -> bool:
        """Whether the statistics are known before all of the input is."""
        wanted = self.has_variable("batch_stats", ALL_INPUTS)
        return self.sampler is not None and self.ghost_groups == 1 and not wanted

    @nn.nowrap
    def _values(self, features: tuple[int, ...]) -> tuple[Any, Statistics]:
        """Returns scale and bias, None where there is none; the running statistics."""
        return scale_and_bias(self, features), self._running(features)

    @nn.nowrap
    def _running(self, features: tuple[int, ...]) -> Statistics:
        """Returns the running statistics; where there are none, does as Flax does."""
        assert self.scope is not None
        scope = self.scope.rewound()  # Flax's call asks for them, too
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = scope.variable("batch_stats", "mean", jnp.zeros, features, dtype)
        var = scope.variable("batch_stats", "var", jnp.ones, features, dtype)
        return Statistics(mean.value, var.value)

    @nn.nowrap
    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step."""
        self.put_variable("batch_stats", "mean", running.mean)
        self.put_variable("batch_stats", "var", running.var)


# Not wrapped a second time.
_batch_norm_call = inspect.unwrap(BatchNorm.__call__)


class CountingBatchNorm(BatchNorm):
    """:class:`BatchNorm` with the number of training steps so far, ``step``, int32."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; see :class:`BatchNorm`."""
        self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        return _batch_norm_call(self, x, use_running_average, mask=mask)

    @nn.nowrap
    def _num_steps(self) -> jax.Array:
        """Returns the number of training steps so far."""
        assert self.scope is not None
        scope = self.scope.rewound()  # `__call__` asks for it, too
        return scope.variable("batch_stats", "step", jnp.zeros, (), jnp.int32).value

    @nn.nowrap
    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step, and counts this one."""
        super()._keep(running)
        self.put_variable("batch_stats", "step", self._num_steps() + 1)
