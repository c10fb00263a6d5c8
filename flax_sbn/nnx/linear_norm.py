"""What the folded nnx layers share: a linear layer and a norm that folds into it."""

import inspect
from typing import Any

import jax
from flax import nnx

from flax_sbn.activation import Activation, add_and_activate
from flax_sbn.convolution import masked_kernel
from flax_sbn.folding import check_input_features, fold_like, refuse_options
from flax_sbn.nnx.batch_norm import BatchNorm

# Features are last, so `axis` is no option; `promote_dtype` has another form in each.
_SAME_NAME = (
    set(inspect.signature(nnx.BatchNorm.__init__).parameters)
    | {"running_weight", "rng_collection"}
) - {
    "self",
    "num_features",
    "axis",
    "promote_dtype",
    "rngs",
    "use_bias",
    "use_scale",
}
# By the folded layer's name, the norm's.
_NORM_OPTIONS = {name: name for name in _SAME_NAME} | {
    "norm_bias": "use_bias",
    "norm_scale": "use_scale",
}


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of the linear layer and those of the norm."""
    refuse_options(use_bias=options.get("use_bias"), use_scale=options.get("use_scale"))
    for name in ("axis", "promote_dtype"):
        if name in options:
            raise TypeError(
                f"Expected options of a layer that folds, got {name}. Features are "
                "last, and the fold decides where it rounds; take Conv and BatchNorm."
            )
    norm = {
        _NORM_OPTIONS[name]: value
        for name, value in options.items()
        if name in _NORM_OPTIONS
    }
    shared = ("dtype", "param_dtype")
    linear = {
        name: value
        for name, value in options.items()
        if name in shared or name not in _NORM_OPTIONS
    }
    return {**linear, "use_bias": False}, norm


def linear_norm(
    linear: nnx.Conv | nnx.Linear,
    norm: BatchNorm | None,
    x: jax.Array,
    residual: jax.Array | None,
    activation: Activation | None,
    use_running_average: bool | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Applies a linear layer, its norm, the residual and the activation.

    Args:
      linear: :class:`flax.nnx.Conv` or :class:`flax.nnx.Linear`.
      norm: what follows it; None where it is folded into ``linear`` for good.
      x: input.
      residual: see :class:`ConvNorm`, as for the rest.
      activation: see there.
      use_running_average: see there.
      mask: see there.
    """
    check_input_features(x, linear.in_features)
    if norm is None:
        return add_and_activate(linear(x), residual, activation)
    evaluate = use_running_average
    if evaluate is None:
        evaluate = norm.use_running_average
    if evaluate is None:
        raise ValueError(
            "Expected use_running_average in the constructor or the call, got None in "
            "both. Use model.train() and model.eval(), or pass it."
        )
    if not (evaluate or norm._folds()):
        y = norm(linear(x), use_running_average, mask=mask)
        return add_and_activate(y, residual, activation)

    options = norm._evaluation(norm._running()) if evaluate else norm._training(mask)
    y, statistics = fold_like(linear)(
        x,
        masked_kernel(linear.kernel[...], getattr(linear, "mask", None)),
        *norm._affine(),
        residual=residual,
        activation=activation,
        **options,
    )
    if not evaluate:
        norm._learn(options["running"], statistics)
    return y
