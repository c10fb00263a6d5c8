"""flax.linen.Conv and Dense with standardized weights."""

from typing import Any

from flax import linen as nn

from flax_sbn.alternatives.weight_standardization import standardize_kernel


class Standardized(nn.Module):
    """Mixed into a linear layer: standardizes its kernel."""

    gain_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.nowrap
    def param(self: Any, name: str, *args: Any, **options: Any) -> Any:
        """Makes or returns a parameter; the kernel standardized."""
        value = super().param(name, *args, **options)
        if name != "kernel":
            return value
        features = value.shape[-1:]
        gain = super().param("gain", self.gain_init, features, self.param_dtype)
        return standardize_kernel(value, gain, mask=getattr(self, "mask", None))


class WSConv(Standardized, nn.Conv):
    r"""Convolution with scaled weight standardization.

    .. math::
      y = \mathrm{conv}\Big(x,\ \mathit{gain} \cdot
      \frac{W - \mu}{\sqrt{\max(n v, 10^{-4})}}\Big) + \mathit{bias}

    with mean and variance of the ``n`` weights of each output feature; see
    :func:`flax_sbn.alternatives.standardize_kernel`. All fields but ``gain_init`` are
    those of :class:`flax.linen.Conv`; keep the bias, since there is no norm to add one.
    Parameters are ``kernel`` and ``bias``, as there, and ``gain``, ``(C,)``. The
    weights are standardized before they are cast to ``dtype``.

    Attributes:
      gain_init: initializer of the gain.

    Raises:
      ValueError: if the fan-in is one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.WSConv(6, (3, 3), strides=2)
      >>> x = jnp.ones((4, 8, 8, 3))
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape, {name: p.shape for name, p in sorted(variables["params"].items())}
      ((4, 4, 4, 6), {'bias': (6,), 'gain': (6,), 'kernel': (3, 3, 3, 6)})

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """


class WSDense(Standardized, nn.Dense):
    r"""Dense layer with scaled weight standardization.

    .. math::
      y = x \Big(\mathit{gain} \cdot \frac{W - \mu}{\sqrt{\max(n v, 10^{-4})}}\Big) +
      \mathit{bias}

    As :class:`WSConv`, for :class:`flax.linen.Dense`.

    Attributes:
      gain_init: initializer of the gain.

    Raises:
      ValueError: if the fan-in is one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> layer = sbn.linen.WSDense(6)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((4, 3)))
      >>> y.shape, {name: p.shape for name, p in sorted(variables["params"].items())}
      ((4, 6), {'bias': (6,), 'gain': (6,), 'kernel': (3, 6)})

    Source: Brock et al., "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv 2101.08692.
    """
