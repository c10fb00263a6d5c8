"""What a batch norm does in training, in Linen as in NNX."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax

from flax_sbn.moments import Moments, mean_and_var
from flax_sbn.renormalization import renormalize
from flax_sbn.sampling import needs_key
from flax_sbn.statistics import Statistics, update_running


class Hooks:
    """How a batch norm measures, corrects and updates; knows neither Linen nor NNX.

    Mixed into the batch norms of both, behind Flax's class: its objects can become ours
    and plain again. A method that does one of these otherwise has hooks of its own
    beside its function in ``alternatives``, mixed into its two layers.
    """

    __slots__ = ()

    # Whether the running average is of standard deviations, not of variances.
    averages_deviations: ClassVar[bool] = False

    def _measure(
        self: Any,
        x: jax.Array,
        axes: tuple[int, ...],
        where: jax.Array | None,
        one_pass: bool | None,
    ) -> Moments:
        """Returns the moments of measured values."""
        return mean_and_var(x, axes, where, one_pass)

    def _correct(
        self: Any, statistics: Statistics, running: Statistics | None
    ) -> Statistics:
        """Returns what to normalize with, given what was measured."""
        return renormalize(
            statistics,
            running,
            running_weight=self.running_weight,
            epsilon=self.epsilon,
        )

    def _update(self: Any, running: Statistics, statistics: Statistics) -> Statistics:
        """Returns the running statistics after a step."""
        epsilon = self.epsilon if self.averages_deviations else None
        return update_running(running, statistics, self.momentum, std_epsilon=epsilon)

    def _as_flax(self: Any) -> bool:
        """Whether training is that of Flax's own layer."""
        own = type(self)
        return (
            self.sampler is None
            and self.running_weight == 0
            and self.ghost_groups == 1
            and own._measure is Hooks._measure
            and own._correct is Hooks._correct
            and own._update is Hooks._update
            and not self.averages_deviations
        )

    def _step(
        self: Any,
        norm: Callable[..., tuple[jax.Array, Statistics]],
        affine: Sequence[jax.Array | None],
        running: Statistics,
        mask: jax.Array | None = None,
        *,
        evaluate: bool = False,
    ) -> tuple[jax.Array, Statistics]:
        """Returns what ``norm`` does; in training also updates the running statistics.

        ``norm`` is :func:`batch_norm` or :func:`conv_norm`, less scale and bias (in
        ``affine``) and options.
        """
        options = {"epsilon": self.epsilon, "dtype": self.dtype}
        if evaluate:
            return norm(*affine, statistics=running, **options)
        y, statistics = norm(
            *affine,
            sampler=self.sampler,
            key=self._key() if needs_key(self.sampler) else None,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            running=running,
            measure=self._measure,
            correct=self._correct,
            **options,
        )
        self._keep(self._update(running, statistics))
        return y, statistics
