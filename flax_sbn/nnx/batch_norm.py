"""flax.nnx.BatchNorm plus a sampler."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_sbn.alternatives.ghost import ghost_batch_norm
from flax_sbn.arguments import check_numbers
from flax_sbn.modules.estimation import ALL_INPUTS
from flax_sbn.modules.hooks import Hooks
from flax_sbn.nnx.variables import evaluates, fork_stream, scale_and_bias
from flax_sbn.sampling import Sampler, needs_key
from flax_sbn.statistics import Statistics, keep_unmeasured, reduction_axes

# As it is now: nnx.tabulate and nnx.capture replace it where Flax's own layer is in the
# model as well, and would take it for a call of its own.
_flax_call = nnx.BatchNorm.__call__


class BatchNorm(nnx.BatchNorm, Hooks):
    r"""Batch normalization with statistics from a sample of the batch.

    :class:`flax.nnx.BatchNorm` with four more arguments, ``sampler``,
    ``running_weight``, ``ghost_groups`` and ``rng_collection``; see there for the
    others. In training, with :math:`S` the positions that the sampler chooses:

    .. math::
      y = \mathit{scale} \cdot \frac{x - \mu_S}{\sqrt{v_S + \epsilon}} + \mathit{bias}

    Samplers that draw positions do so in each layer and step, with keys from the rng
    stream ``'sampling'``, forked from ``rngs`` when the layer is created. Nothing is
    drawn at evaluation. Input and output are ``(N, *spatial, C)``, of any real dtype;
    running statistics are float32. With ``sampler=None`` this is Flax's layer bit for
    bit, and parameters and statistics always have Flax's names: checkpoints load either
    way.

    A step whose mask leaves no position to measure normalizes with the running
    statistics and leaves them as they are; with ``sampler=None`` its output is Flax's,
    NaN. Samples are measured in float32 or wider, as exactly as in two passes, whatever
    ``use_fast_variance`` says.

    Args:
      num_features: number of features ``C``.
      sampler: which positions are measured in training; None measures all of them.
      running_weight: how far a step's statistics are moved towards the running ones
        before normalizing, in [0, 1]; see :func:`flax_sbn.renormalize`.
      ghost_groups: number of equal groups of images that are normalized separately in
        training: Ghost BN; see :func:`flax_sbn.alternatives.ghost_batch_norm`.
      rng_collection: name of the rng stream.
      rngs: keys for the parameters and, for samplers that draw, that stream (or a
        default stream). A layer that was created without a sampler that draws has no
        stream. To give it such a sampler later, set its attribute ``rngs`` as well, as
        in ``layer.set_attributes(sampler=sampler, rngs=nnx.Rngs(0))``.
      **options: those of :class:`flax.nnx.BatchNorm`.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or ``momentum`` or ``epsilon`` is not
        a number.
      ValueError: if the sampler does not fit the input, ``axis`` or ``running_weight``
        is out of range, or the rng stream is missing and needed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.BatchNorm(6, sampler=sbn.BatchSampling(4), rngs=nnx.Rngs(0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (32, 8, 8, 6)))
      >>> y.shape, bool((layer.var[...] != 1).all())
      ((32, 8, 8, 6), True)
      >>> layer.eval()
      >>> layer(jnp.ones((1, 8, 8, 6))).shape
      (1, 8, 8, 6)

    Source: Chen et al., "Batch Normalization Sampling", arXiv 1810.10962.
    """

    def __init__(
        self,
        num_features: int,
        *,
        sampler: Sampler | None = None,
        running_weight: float = 0.0,
        ghost_groups: int = 1,
        rng_collection: str = "sampling",
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.sampler, self.running_weight = sampler, running_weight
        self.ghost_groups, self.rng_collection = ghost_groups, rng_collection
        self.rngs: nnx.Rngs | nnx.RngStream | None = nnx.data(
            fork_stream(rngs, rng_collection, str(sampler))
            if needs_key(sampler)
            else None
        )

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
          use_running_average: normalize with the running statistics (evaluation); wins
            over the constructor's.
          mask: booleans that broadcast to ``x``: False is not measured.

        Returns:
          An array of the shape of ``x``.
        """
        reduction_axes(x.ndim, self.axis)
        check_numbers(momentum=self.momentum, epsilon=self.epsilon)
        evaluate = evaluates(self, use_running_average)
        if self._as_flax() or evaluate:
            running = self._running()
            y = _flax_call(self, x, use_running_average, mask=mask)
            if mask is not None and not evaluate:
                self._keep(keep_unmeasured(self._running(), running))
            return y

        affine, running = self._values()
        x, _, _, *affine = self.promote_dtype((x, *running, *affine), dtype=self.dtype)
        norm = functools.partial(
            ghost_batch_norm, x, num_groups=self.ghost_groups, axis=self.axis
        )
        y, _ = self._step(norm, affine, running, mask)
        return y

    def _key(self) -> jax.Array:
        """Draws a key for the sampler."""
        if self.rngs is None:
            raise ValueError(
                f"Expected an rng stream for {self.sampler}, got none in a layer that "
                "was made for a sampler that draws nothing. Set both: "
                "model.set_attributes(sbn.nnx.BatchNorm, sampler=sampler, "
                "rngs=nnx.Rngs(0))."
            )
        if isinstance(self.rngs, nnx.Rngs):
            return self.rngs[self.rng_collection]()
        return self.rngs()

    def _folds(self) -> bool:
        """Whether the statistics are known before all of the input is."""
        wanted = hasattr(self, ALL_INPUTS)
        return self.sampler is not None and self.ghost_groups == 1 and not wanted

    def _values(self) -> tuple[Any, Statistics]:
        """Returns scale and bias, None where there is none; the running statistics."""
        return scale_and_bias(self), self._running()

    def _running(self) -> Statistics:
        """Returns the running statistics."""
        return Statistics(self.mean[...], self.var[...])

    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step."""
        self.mean[...], self.var[...] = running


class CountingBatchNorm(BatchNorm):
    """:class:`BatchNorm` with the number of training steps so far, ``step``, int32."""

    def __init__(self, num_features: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _num_steps(self) -> jax.Array:
        """Returns the number of training steps so far."""
        return self.step[...]

    def _keep(self, running: Statistics) -> None:
        """Keeps the running statistics for the next step, and counts this one."""
        super()._keep(running)
        self.step[...] += 1
