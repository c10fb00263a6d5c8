"""SHADE as a Linen layer."""

import jax
from flax import linen as nn

from flax_sbn.alternatives.entropy import shade, shade_init, shade_update
from flax_sbn.linen.variables import evaluates
from flax_sbn.statistics import Axis, feature_shape


class Shade(nn.Module):
    r"""Returns its input, and in training sows a loss that regularizes it.

    Put it between a layer and its nonlinearity. The loss, ``weight`` times
    :func:`flax_sbn.alternatives.shade`, is sown as ``'shade'`` into the collection
    ``'losses'``: make that collection mutable, and add its sum to the loss. It is taken
    about the ``means`` in ``'batch_stats'`` from before the step, which training then
    updates. Nothing is sown or updated at evaluation and in ``init``.

    Attributes:
      weight: of the loss.
      use_running_average: sow and update nothing (evaluation).
      axis: the feature axis or axes.
      momentum: decay rate of the means: the weight of the old value.

    Raises:
      ValueError: if ``axis`` is out of range.

    Example:
      >>> import jax
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.Shade(weight=1e-3, use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (32, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> jax.tree.map(jax.numpy.shape, variables)
      {'batch_stats': {'means': (2, 6)}}
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats", "losses"])
      >>> loss = sum(jax.tree.leaves(updates["losses"]))  # to be added to the task's
      >>> bool((y == x).all()), loss.shape
      (True, ())

    Source: Blot et al., "SHADE: Information-Based Regularization for Deep Learning",
    arXiv 1804.10988. The formulation is ours.
    """

    weight: float
    use_running_average: bool | None = None
    axis: Axis = -1
    momentum: float = 0.8

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Returns ``x``; called as :class:`BatchNorm`. In training sows the loss."""
        evaluate = evaluates(self.use_running_average, use_running_average)
        features = feature_shape(x.shape, self.axis)
        means = self.variable("batch_stats", "means", shade_init, features)
        if not evaluate and not self.is_initializing():
            loss = shade(x, means.value, axis=self.axis, mask=mask)
            self.sow("losses", "shade", self.weight * loss)
            means.value = shade_update(
                means.value, x, momentum=self.momentum, axis=self.axis, mask=mask
            )
        return x
