"""Every way to normalize, each as one small layer, for the figures of reliability."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

import flax_sbn as sbn
from harness import methods

FEATURES = 4


class Options(NamedTuple):
    """What differs between the cases of a method.

    Attributes:
      dtype: of the computation.
      gain: what the convolution multiplies by.
    """

    dtype: Any = jnp.float32
    gain: float = 1.0


DEFAULT = Options()


class Method(NamedTuple):
    """A way to normalize.

    Attributes:
      norm: makes the norm; called with the dtype of the computation.
      folded: the sampler, if the norm is folded into the convolution.
      virtual: how many examples at the end of the batch are virtual.
    """

    norm: Callable[..., Any]
    folded: sbn.Sampler | None = None
    virtual: int = 0


class Results(NamedTuple):
    """What a training step computes.

    Attributes:
      y: output.
      state: running statistics, and what else is kept for the next step.
      params: gradients of the parameters.
      x: gradient of the input.
    """

    y: jax.Array
    state: Any
    params: Any
    x: jax.Array


class Layer(nn.Module):
    """A convolution that multiplies by a number, and the norm of its output.

    So all methods normalize the same values, those that are folded into a convolution
    or have one of their own among them. Inputs without spatial axes pass a dense layer.
    """

    method: Method
    options: Options = DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Applies both in training; ``mask`` is left out where the norm takes none."""
        norm, sampler, _ = self.method
        dtype, gain = self.options

        def diagonal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return gain * jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

        window = (1,) * (x.ndim - 2)
        given: dict[str, Any] = {"dtype": dtype, "kernel_init": diagonal}
        if sampler is not None:
            folded = {"sampler": sampler, "norm_cls": norm, **given}
            both: Any = (
                sbn.linen.ConvNorm(FEATURES, window, **folded)
                if window
                else sbn.linen.DenseNorm(FEATURES, **folded)
            )
            return both(x, None, False, mask=mask)
        given["use_bias"] = False
        linear: Any = (
            nn.Conv(FEATURES, window, **given)
            if window
            else nn.Dense(FEATURES, **given)
        )
        if norm is sbn.linen.KalmanNorm:
            zeros = jnp.zeros(FEATURES, jnp.float32)
            before = sbn.Statistics(zeros, zeros + 1)
            num_virtual = 1 if window else 64
            inner = sbn.linen.BatchNorm(dtype=dtype)
            layer = norm(linear, inner, num_virtual=num_virtual)
            return layer(x, before, False, mask=mask)[0]
        layer = norm(dtype=dtype)
        training = {"use_running_average": False, "mask": mask}
        takes = inspect.signature(layer.__call__).parameters
        return layer(linear(x), **{k: v for k, v in training.items() if k in takes})


def takes_mask(method: Method) -> bool:
    """Whether a method's norm takes a mask of examples."""
    norm: Any = method.norm
    norm = norm.func if isinstance(norm, functools.partial) else norm
    # A group norm has nothing left where an example is masked.
    return (
        "mask" in inspect.signature(norm.__call__).parameters
        and norm is not nn.GroupNorm
    )


def initial(method: Method, x: jax.Array, options: Options = DEFAULT) -> Any:
    """Returns a method's variables; those that learn their start see ``x``."""
    return Layer(method, options).init(jax.random.key(0), x)


def step(
    method: Method,
    variables: Mapping[str, Any],
    x: jax.Array,
    cotangent: jax.Array,
    mask: jax.Array | None = None,
    options: Options = DEFAULT,
) -> Results:
    """Returns output, state and gradients of one training step.

    Args:
      method: the method.
      variables: those of :func:`initial`.
      x: the input.
      cotangent: of the output: the loss is the sum of their products.
      mask: booleans of shape ``(N, *spatial, 1)``: False is not measured.
      options: further ones of the layer.
    """
    variables = dict(variables)
    stats = variables.pop("batch_stats", {})
    keys = {"sampling": jax.random.key(1), "dropout": jax.random.key(2)}

    def loss(variables: Any, x: jax.Array) -> Any:
        y, updates = Layer(method, options).apply(
            {**variables, "batch_stats": stats},
            x,
            mask,
            mutable=["batch_stats", "losses"],
            rngs=keys,
        )
        updates = dict(updates)
        own: Any = sum(map(jnp.sum, jax.tree.leaves(updates.pop("losses", {}))))
        total = (cotangent * y.astype(cotangent.dtype)).sum() + own
        return total, (y, updates)

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (grads, dx), (y, state) = gradient(variables, x)
    state = {**state, "next": grads.pop(OVERWRITE_WITH_GRADIENT, {})}
    return Results(y, state, grads, dx)


_NAMES = ("lattice", "ns:4", "bs:4", "fs:1/16", "vdn:4", "bs:4+vdn:4", "fs:1/16+vdn:4")


def _sampled() -> dict[str, Method]:
    """Returns batch norm with each sampler, unfolded and folded."""
    found = {name: methods.parse(name) for name in _NAMES}
    found["copies:2"] = methods.parse("CopySampling(2)")
    sampled = {}
    for name, method in found.items():
        virtual = method.virtual.num_virtual if method.virtual else 0
        norm = functools.partial(sbn.linen.BatchNorm, **method.options)
        sampled[name] = Method(norm, virtual=virtual)
        folded = Method(sbn.linen.BatchNorm, method.sampler, virtual)
        sampled[f"{name} folded"] = folded
    return sampled


_TWO_PASSES = functools.partial(sbn.linen.BatchNorm, use_fast_variance=False)
_OTHERS: dict[str, Callable[..., Any]] = {
    "IC without dropout": functools.partial(sbn.linen.IC, rate=0.0),
    "GroupNorm (flax)": functools.partial(nn.GroupNorm, num_groups=2),
    "FilterResponseNorm": sbn.linen.FilterResponseNorm,
}
METHODS: dict[str, Method] = {
    "no sampler": Method(sbn.linen.BatchNorm),
    "no sampler in two passes": Method(_TWO_PASSES),
    **_sampled(),
    "ghost groups of 4": Method(functools.partial(sbn.linen.BatchNorm, ghost_groups=4)),
    "fs:1/16~3/4": Method(
        functools.partial(sbn.linen.BatchNorm, **methods.parse("fs:1/16~3/4").options)
    ),
    **{
        cls.__name__: Method(cls)
        for cls in (
            sbn.linen.BatchRenorm,
            sbn.linen.DiminishingBatchNorm,
            sbn.linen.MovingAverageBatchNorm,
            sbn.linen.KalmanNorm,
            sbn.linen.MixtureNorm,
            sbn.linen.L1BatchNorm,
            sbn.linen.RangeBatchNorm,
            sbn.linen.BNET,
            sbn.linen.BatchlessNorm,
        )
    },
    **{name: Method(norm) for name, norm in _OTHERS.items()},
}
