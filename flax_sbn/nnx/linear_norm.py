"""What the folded NNX layers share: a linear layer and a norm that folds into it."""

import functools
import inspect
from typing import Any, ClassVar

import jax
from flax import nnx

from flax_sbn.activation import Activation, add_and_activate
from flax_sbn.folding import check_input_features, fold_like, refuse_options
from flax_sbn.linear_layers import masked_kernel
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.variables import evaluates

_SAME_NAME = set(inspect.signature(nnx.BatchNorm.__init__).parameters)
# By the folded layer's name, the norm's.
_NORM_OPTIONS = {
    **{name: name for name in _SAME_NAME - {"self", "num_features", "rngs"}},
    "running_weight": "running_weight",
    "rng_collection": "rng_collection",
    "norm_bias": "use_bias",
    "norm_scale": "use_scale",
}


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of the linear layer and those of the norm."""
    refused = {name: options.pop(name, None) for name in ("use_bias", "use_scale")}
    refuse_options(**refused)
    for name in ("axis", "promote_dtype"):
        if name in options:
            raise TypeError(
                f"Expected options of a layer that folds, got {name}. Features are "
                "last, and the fold decides where it rounds; take Conv and BatchNorm."
            )
    linear: dict[str, Any] = {"use_bias": False}
    norm: dict[str, Any] = {}
    for name, value in options.items():
        if name in _NORM_OPTIONS:
            norm[_NORM_OPTIONS[name]] = value
        if name not in _NORM_OPTIONS or name in ("dtype", "param_dtype"):
            linear[name] = value
    return linear, norm


FLAX_CALLS = (nnx.Conv.__call__, nnx.Linear.__call__)


def computes_as_flax(linear: Any) -> bool:
    """Whether a layer computes what Flax's does, without a bias, of its kernel.

    Another layer may have been put in its place, such as one with LoRA.
    """
    own = getattr(type(linear), "plain", type(linear))  # before `sample_norms`
    return own.__call__ in FLAX_CALLS and linear.bias is None


class LinearNorm(nnx.Module):
    """A linear layer and a norm that folds into it, see :class:`ConvNorm`.

    Attributes:
      norm: what follows the linear layer; None where it is folded into that for good.
      activation: applied last, or None.
    """

    linear_name: ClassVar[str]
    norm: BatchNorm | None
    activation: Activation | None

    @property
    def _linear(self) -> Any:
        return getattr(self, self.linear_name)

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
          use_running_average: normalize with the running statistics (evaluation); wins
            over the constructor's.
          mask: booleans that broadcast to the output: False is not measured.

        Returns:
          ``(N, *spatial, C)``.
        """
        linear, norm, activation = self._linear, self.norm, self.activation
        check_input_features(x, linear.in_features)
        if norm is None:
            return add_and_activate(linear(x), residual, activation)
        evaluate = evaluates(norm, use_running_average)
        folds = computes_as_flax(linear) and (evaluate or norm._folds())
        fold = fold_like(linear) if folds else None
        if fold is None:
            y = norm(linear(x), use_running_average, mask=mask)
            return add_and_activate(y, residual, activation)

        kernel = masked_kernel(linear.kernel[...], getattr(linear, "mask", None))
        fold = functools.partial(
            fold, x, kernel, residual=residual, activation=activation
        )
        y, _ = norm._step(fold, *norm._values(), mask, evaluate=evaluate)
        return y
