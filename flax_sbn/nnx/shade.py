"""SHADE as an NNX layer."""

import jax
from flax import nnx

from flax_sbn.alternatives.entropy import shade, shade_init, shade_update
from flax_sbn.nnx.loss import sow_loss
from flax_sbn.nnx.variables import evaluates


class Shade(nnx.Module):
    r"""Returns its input, and in training sows a loss that regularizes it.

    Put it between a layer and its nonlinearity. The loss, ``weight`` times
    :func:`flax_sbn.alternatives.shade`, is sown as a :class:`Loss`: collect it with
    ``nnx.capture``, and add the sum to the loss. It is taken about the ``means`` from
    before the step, which training then updates. Nothing is sown or updated at
    evaluation.

    Args:
      num_features: number of features ``C``.
      weight: of the loss.
      use_running_average: sow and update nothing (evaluation).
      axis: the feature axis.
      momentum: decay rate of the means: the weight of the old value.

    Raises:
      ValueError: if ``axis`` is out of range.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.Shade(6, weight=1e-3)
      >>> x = jax.random.normal(jax.random.key(0), (32, 6))
      >>> y, losses = nnx.capture(layer, sbn.nnx.Loss)(x)
      >>> bool((y == x).all()), sum(jax.tree.leaves(losses)).shape
      (True, ())

    Source: Blot et al., "SHADE: Information-Based Regularization for Deep Learning",
    arXiv 1804.10988. The formulation is ours.
    """

    def __init__(
        self,
        num_features: int,
        weight: float,
        *,
        use_running_average: bool = False,
        axis: int = -1,
        momentum: float = 0.8,
    ) -> None:
        self.means = nnx.BatchStat(shade_init((num_features,)))
        self.weight, self.axis, self.momentum = weight, axis, momentum
        self.use_running_average = use_running_average

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Returns ``x``; called as :class:`BatchNorm`. In training sows the loss."""
        evaluate = evaluates(self, use_running_average)
        if not evaluate:
            loss = shade(x, self.means[...], axis=self.axis, mask=mask)
            sow_loss(self, "shade", self.weight * loss)
            self.means[...] = shade_update(
                self.means[...], x, momentum=self.momentum, axis=self.axis, mask=mask
            )
        return x
