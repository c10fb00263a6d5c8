"""A linear layer and its batch norm, joined to the layer before by its statistics."""

from collections.abc import Callable

import jax
from flax import nnx

from flax_sbn.activation import Activation, relu
from flax_sbn.alternatives.kalman import KalmanHooks
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.variables import evaluates, fork_stream
from flax_sbn.statistics import Statistics


class KalmanNorm(KalmanHooks, nnx.Module):
    r"""Kalman normalization: a layer that knows the statistics of the one before.

    Statistics of a few images are noisy. Those of the layer before, carried through
    this layer's weights, predict them. Prediction and measurement are mixed. With
    :math:`\mu_i, v_i` the statistics passed on by the layer before, :math:`\mu, v`
    those of the batch and :math:`\xi \sim \mathcal{N}(0, 1)` a synthetic image:

    .. math::
      \mu_p, v_p = \mathrm{moments}\big(\mathrm{linear}(
      \mathrm{relu}(\mu_i + \sqrt{v_i}\, \xi))\big)

      \begin{aligned}
      \mu' &= p \mu_p + (1 - p) \mu \\
      v' &= p v_p + (1 - p) v + p (1 - p) (\mu - \mu_p)^2 \\
      y &= \mathit{scale} \cdot \frac{\mathrm{linear}(x) - \mu'}{\sqrt{v' + \epsilon}} +
      \mathit{bias}
      \end{aligned}

    :math:`\mu', v'` are passed on, and averaged for evaluation. See
    :func:`flax_sbn.alternatives.kalman_update` for where the prediction is left out.

    The two layers are the attributes ``linear`` and ``norm``. The synthetic image is
    drawn from the rng stream of ``norm``, ``'sampling'``, forked from ``rngs`` when the
    layer is made; nothing is drawn at evaluation.

    Args:
      linear: a convolution or dense layer, without a bias.
      norm: :class:`flax_sbn.nnx.BatchNorm`, with all its options; features last. The
        paper's momentum is 0.9.
      prior_weight: share ``p`` of the prediction, in [0, 1]: the paper's is 0.9 for
        micro-batches, 0.05 for large ones.
      num_virtual: number of synthetic images. One is enough for a convolution; a dense
        layer needs many.
      input_activation: what lies between the layer before and this one; the synthetic
        images go through it, too. None for nothing. ``x`` has already been through it.
      rngs: keys of that stream (or a default stream).

    Raises:
      TypeError: as :class:`flax_sbn.nnx.BatchNorm`.
      ValueError: as there, and if the statistics have another number of features than
        ``x``, ``prior_weight`` is out of range, there are too few synthetic images,
        ``norm`` has ghost groups, or the rng stream is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> rngs = nnx.Rngs(0)
      >>> def layer(inputs):
      ...     conv = nnx.Conv(inputs, 6, (3, 3), use_bias=False, rngs=rngs)
      ...     norm = sbn.nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
      ...     return sbn.nnx.KalmanNorm(conv, norm, rngs=rngs)
      >>> stem, first, second = layer(3), layer(6), layer(6)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> x, statistics = stem(x, None)  # plain batch norm
      >>> y, update = first(nnx.relu(x), statistics)
      >>> y, update = second(nnx.relu(y), update)
      >>> x = x + y
      >>> statistics = sbn.alternatives.add_statistics(statistics, update)
      >>> x.shape, statistics.mean.shape, bool((second.norm.var[...] != 1).all())
      ((2, 8, 8, 6), (6,), True)

    Source: Wang et al., "Batch Kalman Normalization", arXiv 1802.03133.
    """

    def __init__(
        self,
        linear: Callable[[jax.Array], jax.Array],
        norm: BatchNorm,
        *,
        prior_weight: float = 0.9,
        num_virtual: int = 1,
        input_activation: Activation | None = relu,
        rngs: nnx.Rngs,
    ) -> None:
        self.linear, self.norm = linear, norm
        self.prior_weight, self.num_virtual = prior_weight, num_virtual
        self.input_activation = input_activation
        self.rngs = fork_stream(rngs, norm.rng_collection, "synthetic images")

    def __call__(
        self,
        x: jax.Array,
        statistics: Statistics | None,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Statistics]:
        """Applies both layers; in training also updates the running statistics.

        Args:
          x: ``(N, *spatial, I)``.
          statistics: those that the layer before passed on, ``(I,)``; None for the
            first layer, which is ordinary batch norm.
          use_running_average: normalize with the running statistics (evaluation); wins
            over the constructor's.
          mask: booleans that broadcast to the output: False is not measured.

        Returns:
          The output, ``(N, *spatial, C)``, and the statistics to pass on, ``(C,)``.
        """
        norm = self.norm
        evaluate = evaluates(norm, use_running_average)
        y = self.linear(x)
        if evaluate:
            y = norm(y, use_running_average, mask=mask)
            return y, norm._running()

        return self._train(x, y, statistics, *norm._values(), mask)

    def _key(self) -> jax.Array:
        return self.rngs()
