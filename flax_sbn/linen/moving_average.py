"""Moving-average batch norm and the centered convolution before it, in Linen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from flax_sbn.alternatives.moving_average import (
    MovingAverageHooks,
    center_kernel,
    moving_averages,
)
from flax_sbn.linen.variables import (
    evaluates,
    keep_state,
    running_state,
    scale_and_bias,
)
from flax_sbn.statistics import Axis, feature_shape


class MovingAverageBatchNorm(MovingAverageHooks, nn.Module):
    r"""Batch norm for micro-batches: averages over the last steps, in both directions.

    .. math::
      \begin{aligned}
      y &= \mathit{scale} \cdot r \frac{x}{\sqrt{\chi + \epsilon}} + \mathit{bias} \\
      \chi &= \mathrm{average}_t(\mathrm{mean}(x_t^2))
      \end{aligned}

    See :func:`flax_sbn.alternatives.moving_average_batch_norm` for ``r`` and the
    backward pass, and put the layer after a :class:`CenteredConv` without a bias: it
    subtracts no mean. ``batch_stats`` holds ``chi``, ``(window, C)``, ``var``, ``(C,)``
    and ``step``.

    The averages of the backward pass are ``psi``, ``(window, C)``, in the collection
    ``'_overwrite_with_gradient'``. As with Flax's fp8 layers, its gradient is its next
    value: differentiate with respect to
    ``{"params": ..., "_overwrite_with_gradient": ...}`` and pass the gradients to
    :class:`flax.training.train_state.TrainState`, which overwrites ``psi`` with its
    gradient. Keep ``psi`` away from clipping, loss scaling and gradient accumulation.

    Attributes:
      use_running_average: normalize with ``var`` (evaluation).
      axis: the feature axis or axes.
      momentum: decay rate of ``var``.
      epsilon: added to the mean squares.
      dtype: dtype of the result; by default that of input and parameters promoted.
      param_dtype: dtype of the parameters.
      use_bias: whether a bias is added.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: devices that pool their averages.
      window: number of steps that are averaged over. Times the images per step, it is
        the batch size that is simulated.
      warmup: steps before averages over the window are used.
      renorm_warmup: steps before :math:`r` is used.
      r_max: limit of :math:`r`, at least 1.

    Raises:
      ValueError: if ``psi`` is missing in training, ``axis`` is out of range, or
        ``window`` or ``r_max`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.MovingAverageBatchNorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> stats = variables.pop("batch_stats")
      >>> def loss(variables, stats):
      ...     variables = {**variables, "batch_stats": stats}
      ...     y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      ...     return jnp.sin(y).mean(), updates["batch_stats"]
      >>> grads, stats = jax.grad(loss, has_aux=True)(variables, stats)
      >>> variables["_overwrite_with_gradient"] = grads["_overwrite_with_gradient"]
      >>> jax.tree.map(jnp.shape, grads["_overwrite_with_gradient"]), int(stats["step"])
      ({'psi': (16, 6)}, 1)

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838.
    """

    use_running_average: bool | None = None
    axis: Axis = -1
    momentum: float = 0.98
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | tuple[str, ...] | None = None
    window: int = 16
    warmup: int = 100
    renorm_warmup: int = 1000
    r_max: float = 5.0

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None
    ) -> jax.Array:
        """Normalizes ``x``; called as :class:`BatchNorm`, without a mask."""
        evaluate = evaluates(self.use_running_average, use_running_average)
        features = feature_shape(x.shape, self.axis)
        affine = scale_and_bias(self, features)
        running = running_state(self, moving_averages(features, self.window))
        if self.is_initializing():
            evaluate = True
            self.variable(OVERWRITE_WITH_GRADIENT, "psi", jnp.zeros_like, running.chi)
        psi: Any = self.get_variable(OVERWRITE_WITH_GRADIENT, "psi")
        if psi is None and not evaluate:
            raise ValueError(
                f"Expected a collection '{OVERWRITE_WITH_GRADIENT}' in training, got "
                f"{sorted(self.variables)} in layer "
                f"{'/'.join(self.path) or type(self).__name__}. Pass apply all that "
                "init returned, psi replaced by its gradient after each step."
            )
        y, updated = self._normalize(x, running, psi, affine, evaluate=evaluate)
        if not evaluate:
            keep_state(self, updated)
        return y


class CenteredConv(nn.Conv):
    r"""Convolution whose weights have mean zero for each output feature.

    .. math::
      y = \mathrm{conv}(x,\ W - \mathrm{mean}(W)) + \mathit{bias}

    See :func:`flax_sbn.alternatives.center_kernel`. Fields and parameters are those of
    :class:`flax.linen.Conv`; the weights are centered before they are cast to
    ``dtype``. Set ``use_bias=False`` before :class:`MovingAverageBatchNorm`.

    Raises:
      ValueError: if only one weight leads to each output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.CenteredConv(6, (3, 3), use_bias=False, padding="VALID")
      >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((4, 8, 8, 3)))
      >>> bool(jnp.allclose(y, 0, atol=1e-5))
      True

    Source: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", arXiv 2001.06838.
    """

    @nn.nowrap
    def param(self, name: str, *args: Any, **options: Any) -> Any:
        """Makes or returns a parameter; the kernel centered."""
        value = super().param(name, *args, **options)
        return center_kernel(value, mask=self.mask) if name == "kernel" else value
