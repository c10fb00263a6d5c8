"""Moving-average batch norm and the centered convolution before it, in NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_sbn.alternatives.moving_average import (
    MovingAverageHooks,
    MovingAverages,
    center_kernel,
    moving_averages,
)
from flax_sbn.nnx.variables import Normalizer, evaluates, scale_and_bias, with_kernel

# Not captured or tabulated a second time; see BatchNorm.
_conv_call = nnx.Conv.__call__


class OverwriteWithGradient(nnx.Variable[Any]):
    """A variable whose gradient is its next value; Linen has a collection of that name.

    It is not a :class:`flax.nnx.Param`, so optimizers leave it alone. Differentiate
    with respect to both, and write the gradient back.

    Example:
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> issubclass(sbn.nnx.OverwriteWithGradient, nnx.Param)
      False
    """


class MovingAverageBatchNorm(MovingAverageHooks, Normalizer):
    r"""Batch norm for micro-batches: averages over the last steps, in both directions.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot r \frac{x}{\sqrt{\chi + \epsilon}} + \mathit{bias} \\
      \chi &= \mathrm{average}_t(\mathrm{mean}(x_t^2))
      \end{aligned}

    See :func:`flax_sbn.alternatives.moving_average_batch_norm` for ``r`` and the
    backward pass, and put the layer after a :class:`CenteredConv` without a bias: it
    subtracts no mean. The running state is ``chi``, ``(window, C)``, ``var``, ``(C,)``
    and ``step``, as :class:`flax.nnx.BatchStat`.

    The averages of the backward pass are ``psi``, ``(window, C)``, an
    :class:`OverwriteWithGradient`, whose gradient is its next value: differentiate with
    respect to it, too, and write the gradient back after each step, as below. Keep
    ``psi`` away from clipping, loss scaling and gradient accumulation.

    Args:
      num_features: number of features ``C``.
      use_running_average: normalize with ``var`` (evaluation).
      momentum: decay rate of ``var``.
      epsilon: added to the mean squares.
      axis_name: devices that pool their averages.
      window: number of steps that are averaged over. Times the images per step, it is
        the batch size that is simulated.
      warmup: steps before averages over the window are used.
      renorm_warmup: steps before :math:`r` is used.
      r_max: limit of :math:`r`, at least 1.
      rngs: keys for the parameters.
      **options: ``axis``, ``dtype``, ``param_dtype``, ``use_bias``, ``use_scale``,
        ``bias_init`` and ``scale_init``, as in :class:`flax.nnx.BatchNorm`.

    Raises:
      ValueError: if ``axis`` is out of range, the input has another number of features,
        or ``window`` or ``r_max`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.MovingAverageBatchNorm(6, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
      >>> wrt = nnx.Any(nnx.Param, sbn.nnx.OverwriteWithGradient)
      >>> grads = nnx.grad(lambda layer: jnp.sin(layer(x)).mean(),
      ...                  argnums=nnx.DiffState(0, wrt))(layer)
      >>> _ = optimizer.update(layer, grads)  # the parameters
      >>> nnx.update(layer, nnx.state(grads, sbn.nnx.OverwriteWithGradient))
      >>> bool((layer.psi[-1] != 0).all()), int(layer.step[...])
      (True, 1)

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.98,
        epsilon: float = 1e-5,
        axis_name: str | tuple[str, ...] | None = None,
        window: int = 16,
        warmup: int = 100,
        renorm_warmup: int = 1000,
        r_max: float = 5.0,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.use_running_average, self.epsilon = use_running_average, epsilon
        self.axis_name, self.momentum, self.warmup = axis_name, momentum, warmup
        self.renorm_warmup, self.r_max = renorm_warmup, r_max
        initial = moving_averages((num_features,), window)
        self.step, self.chi, self.var = map(nnx.BatchStat, initial)
        self.psi = OverwriteWithGradient(jnp.zeros_like(initial.chi))

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None
    ) -> jax.Array:
        """Normalizes ``x``; called as :class:`BatchNorm`, without a mask."""
        evaluate = evaluates(self, use_running_average)
        affine = scale_and_bias(self)
        running = MovingAverages(self.step[...], self.chi[...], self.var[...])
        psi = None if evaluate else self.psi[...]
        y, updated = self._normalize(x, running, psi, affine, evaluate=evaluate)
        if not evaluate:
            self.step[...], self.chi[...], self.var[...] = updated
        return y


class CenteredConv(nnx.Conv):
    r"""Convolution whose weights have mean zero for each output feature.

    .. math::
      y = \mathrm{conv}(x,\ W - \mathrm{mean}(W)) + \mathit{bias}

    See :func:`flax_sbn.alternatives.center_kernel`. Arguments and parameters are those
    of :class:`flax.nnx.Conv`; the weights are centered before they are cast to
    ``dtype``. Set ``use_bias=False`` before :class:`MovingAverageBatchNorm`.

    Raises:
      ValueError: if only one weight leads to each output.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> layer = sbn.nnx.CenteredConv(
      ...     3, 6, (3, 3), use_bias=False, padding="VALID", rngs=nnx.Rngs(0)
      ... )
      >>> bool(jnp.allclose(layer(jnp.ones((4, 8, 8, 3))), 0, atol=1e-5))
      True

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838.
    """

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Applies the layer to ``(N, *spatial, I)``, as :class:`flax.nnx.Conv`."""
        kernel = center_kernel(self.kernel[...], mask=self.mask)
        layer = with_kernel(self, kernel)
        return _conv_call(layer, inputs, *args, **options)
