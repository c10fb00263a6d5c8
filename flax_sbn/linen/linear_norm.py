"""What the folded Linen layers share: a linear layer and a norm that folds into it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import InitVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamNotFoundError
from flax.linen.linear import default_kernel_init
from jax.typing import DTypeLike

from flax_sbn.activation import Activation, add_and_activate, fused
from flax_sbn.folding import fold_like, refuse_options
from flax_sbn.linear_layers import masked_kernel
from flax_sbn.linen.batch_norm import BatchNorm, shared_options
from flax_sbn.linen.variables import evaluates
from flax_sbn.sampling import Sampler


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


class LinearNorm(nn.Module, kw_only=True):
    """A linear layer and a norm that folds into it, see :class:`ConvNorm`.

    The attributes are documented there.
    """

    linear_name: ClassVar[str]
    linear_cls: ClassVar[type[nn.Conv | nn.Dense]]

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    norm_bias: bool = True
    norm_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = default_kernel_init
    sampler: Sampler | None = None
    running_weight: float | None = None
    rng_collection: str = "sampling"
    norm_cls: Callable[..., BatchNorm] = BatchNorm
    activation: Activation | None = None
    use_bias: InitVar[None] = None
    use_scale: InitVar[None] = None

    def __post_init__(self, use_bias: None = None, use_scale: None = None) -> None:
        refuse_options(use_bias=use_bias, use_scale=use_scale)
        self.activation = fused(self.activation)
        super().__post_init__()

    @nn.nowrap
    def _has_bias(self) -> bool:
        """Whether the linear layer has a bias: its norm was folded into it for good."""
        variables, name = self.variables, self.linear_name
        if "bias" not in variables.get("params", {}).get(name, {}):
            return False
        if any("norm" in variables.get(of, {}) for of in ("params", "batch_stats")):
            raise ValueError(
                f"Expected a norm and {name} without a bias, or variables of "
                f"fold_variables, got {name}/bias and norm. Subtract the bias from "
                "norm/mean and leave it out."
            )
        return True

    @nn.compact
    @_hint_at_conversion()
    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer; in training also updates the running statistics.

        Args:
          x: ``(N, *spatial, I)``.
          residual: added before the activation, of the output's shape; cast to its
            dtype.
          use_running_average: normalize with the running statistics (evaluation).
          mask: booleans that broadcast to the output: False is not measured.

        Returns:
          ``(N, *spatial, features)``.
        """
        has_bias = self._has_bias()
        options = shared_options(self, self.linear_cls) | {"use_bias": has_bias}
        linear = self.linear_cls(**options, name=self.linear_name)
        evaluate = evaluates(self.use_running_average, use_running_average)
        if has_bias:
            if not evaluate:
                raise ValueError(
                    "Expected use_running_average=True, got False with variables whose "
                    "norm is folded for good. Train with those given to fold_variables."
                )
            return add_and_activate(linear(x), residual, self.activation)

        options = shared_options(self, BatchNorm) | {
            "use_running_average": evaluate,
            "use_bias": self.norm_bias,
            "use_scale": self.norm_scale,
        }
        if self.running_weight is None:
            del options["running_weight"]
        norm = self.norm_cls(**options, name="norm")
        fold = fold_like(linear) if evaluate or norm._folds() else None
        if fold is None or self.is_initializing():
            y = norm(linear(x), mask=mask)
            return add_and_activate(y, residual, self.activation)

        assert linear.scope is not None
        window = getattr(linear, "kernel_size", ())
        window = (window,) if isinstance(window, int) else window
        in_features = x.shape[-1] // getattr(linear, "feature_group_count", 1)
        shape = (*window, in_features, linear.features)
        kernel = linear.scope.param(
            "kernel", linear.kernel_init, shape, linear.param_dtype
        )
        kernel = masked_kernel(kernel, getattr(linear, "mask", None))
        fold = functools.partial(
            fold, x, kernel, residual=residual, activation=self.activation
        )
        y, _ = norm._step(fold, *norm._values(shape[-1:]), mask, evaluate=evaluate)
        return y
