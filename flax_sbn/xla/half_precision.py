"""What the fold needs in half precision: rounding that stays, and its correction."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def round_to(kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns a kernel in a dtype, rounded even where XLA would leave that out."""
    wide, narrow = jnp.finfo(kernel.dtype), jnp.finfo(dtype)
    if narrow.bits < wide.bits:
        rounded = lax.reduce_precision(kernel, narrow.nexp, narrow.nmant)
        if narrow.nexp < wide.nexp:
            # It makes zeros of what is below the normal numbers: float16 has more.
            step = float(narrow.smallest_subnormal)
            small = jnp.round(kernel / step) * step
            small = kernel + lax.stop_gradient(small - kernel)
            rounded = jnp.where(abs(kernel) < float(narrow.tiny), small, rounded)
        kernel = rounded
    return kernel.astype(dtype)


def offset(mean: jax.Array, applied: jax.Array, measured: jax.Array) -> jax.Array:
    """Returns about how far the outputs of two kernels are apart on average.

    The statistics are those of the rounded kernel, and what is applied is the rounded
    folded one. Where inputs have a mean, ``(groups * I,)``, the difference is an
    offset, which no norm removes any more.
    """
    groups = mean.size // measured.shape[-2]
    # A group of output features sees its own group of input features.
    per_group = measured.shape[-1] // groups
    seen = jnp.repeat(mean.reshape(groups, -1).T, per_group, axis=1)

    def output(kernel: jax.Array) -> jax.Array:
        product = kernel * jnp.broadcast_to(seen, kernel.shape)
        return product.sum(range(kernel.ndim - 1))

    return lax.stop_gradient(output(applied) - output(measured))


def add_shift(y: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``y + shift``, added in float32, in the dtype of ``y``."""
    # cuDNN adds a bias of the convolution's own type, and does so in float32.
    return lax.platform_dependent(
        y, shift, cuda=_add_narrow, rocm=_add_narrow, default=_add_wide
    )


def _add_narrow(y: jax.Array, shift: jax.Array) -> jax.Array:
    # Broadcast first: then the gradient of the shift is summed in float32.
    return y + jnp.broadcast_to(shift, y.shape).astype(y.dtype)


def _add_wide(y: jax.Array, shift: jax.Array) -> jax.Array:
    return (y + jnp.expand_dims(shift, range(y.ndim - 1))).astype(y.dtype)
