"""What the folded linen layers share: a linear layer and a norm that folds into it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.errors import ScopeParamNotFoundError

from flax_sbn.activation import add_and_activate
from flax_sbn.convolution import masked_kernel
from flax_sbn.folding import fold_like
from flax_sbn.statistics import Statistics


def has_bias(layer: nn.Module, name: str) -> bool:
    """Whether the submodule has a bias: its norm was folded into it for good.

    Raises:
      ValueError: if there is a norm as well.
    """
    variables = layer.variables
    if "bias" not in variables.get("params", {}).get(name, {}):
        return False
    if any("norm" in variables.get(of, {}) for of in ("params", "batch_stats")):
        raise ValueError(
            f"Expected a norm and {name} without a bias, or variables of "
            f"fold_variables, got {name}/bias and norm. Subtract the bias from "
            "norm/mean and leave it out."
        )
    return True


@contextlib.contextmanager
def _hint_at_conversion() -> Iterator[None]:
    """Says what to do about variables of plain layers."""
    try:
        yield
    except ScopeParamNotFoundError as error:
        error.add_note(
            "Variables of nn.Conv or nn.Dense and of nn.BatchNorm become those of "
            "ConvNorm or DenseNorm by flax_sbn.linen.to_folded_layers."
        )
        raise


@_hint_at_conversion()
def linear_norm(
    layer: Any,
    linear: nn.Conv | nn.Dense,
    kernel_shape: tuple[int, ...],
    x: jax.Array,
    residual: jax.Array | None,
    use_running_average: bool | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Applies a linear layer, its norm, the residual and the activation.

    Args:
      layer: :class:`ConvNorm` or :class:`DenseNorm`, in its ``__call__``.
      linear: its linear layer.
      kernel_shape: shape of the kernel of ``linear``.
      x: input.
      residual: see there, as for the rest.
      use_running_average: see there.
      mask: see there.
    """
    evaluate = nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )
    if linear.use_bias:
        if not evaluate:
            raise ValueError(
                "Expected use_running_average=True, got False with variables whose "
                "norm is folded for good. Train with those given to fold_variables."
            )
        return add_and_activate(linear(x), residual, layer.activation)

    own = (
        {} if layer.running_weight is None else {"running_weight": layer.running_weight}
    )
    norm = layer.norm_cls(
        use_running_average=evaluate,
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        use_bias=layer.norm_bias,
        use_scale=layer.norm_scale,
        bias_init=layer.bias_init,
        scale_init=layer.scale_init,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
        use_fast_variance=layer.use_fast_variance,
        force_float32_reductions=layer.force_float32_reductions,
        sampler=layer.sampler,
        rng_collection=layer.rng_collection,
        name="norm",
        **own,
    )
    if layer.is_initializing() or not (evaluate or norm._folds()):
        y = norm(linear(x), mask=mask)
        return add_and_activate(y, residual, layer.activation)

    assert linear.scope is not None
    kernel = linear.scope.param(
        "kernel", linear.kernel_init, kernel_shape, linear.param_dtype
    )
    kernel = masked_kernel(kernel, getattr(linear, "mask", None))

    def folded(scale: Any, bias: Any, **options: Any) -> tuple[jax.Array, Statistics]:
        return fold_like(linear)(
            x,
            kernel,
            scale,
            bias,
            residual=residual,
            activation=layer.activation,
            **options,
        )

    features = kernel_shape[-1:]
    if not evaluate:
        return norm._measured(folded, features, mask)
    y, _ = folded(
        *norm._affine(features),
        statistics=norm._running(features),
        epsilon=layer.epsilon,
        dtype=layer.dtype,
    )
    return y
