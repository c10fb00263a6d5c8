"""The folded layers are the two that each replaces: state, values, gradients."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases, unfolded
from tests.closeness import assert_close

KEY = jax.random.key(3)
FEATURES = 4
LINEAR = {
    "conv": {
        "kernel_size": (3, 2),
        "strides": 2,
        "padding": ((2, 1), (0, 1)),
        "kernel_dilation": (1, 2),
        "feature_group_count": 2,
    },
    "dense": {},
}
SHAPES = {"conv": ((16, 9, 8, 6), (16, 5, 4, 4)), "dense": ((16, 7, 6), (16, 7, 4))}
NORM = {  # options of the norm, and their names there
    **{"norm_scale": "use_scale", "norm_bias": "use_bias"},
    **{name: name for name in ("epsilon", "momentum", "axis_name", "sampler")},
}
NAMES = ("NS", "BS", "FS", "FS+VDN", "lattice")
SAMPLERS = {"all": None} | {name: cases.SAMPLERS[name] for name in NAMES}
DTYPES = [  # of the input and the parameters, and the layer's own
    ("float32", "float32", None),
    ("bfloat16", "float32", "bfloat16"),
    ("bfloat16", "float32", None),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
]
KERNEL_MASK = np.arange(3 * 2 * 3 * 4).reshape(3, 2, 3, 4) % 3 > 0


def split(options):
    """The options of a linear layer and those of the norm behind it."""
    norm = {NORM[name]: value for name, value in options.items() if name in NORM}
    linear = {name: value for name, value in options.items() if name not in NORM}
    shared = {name: options[name] for name in ("dtype", "param_dtype")}
    return linear | {"use_bias": False}, norm | shared


def after(y, residual, activation):
    y = y if residual is None else y + residual.astype(y.dtype)
    return y if activation is None else activation(y)


class LinenPlain(nn.Module):
    """Two modules with the folded layer's names, and what follows."""

    kind: str
    activation: Any
    options: dict

    @nn.compact
    def __call__(self, x, residual=None, use_running_average=None, *, mask=None):
        linear, norm = split(self.options)
        layer = {"conv": nn.Conv, "dense": nn.Dense}[self.kind]
        y = layer(FEATURES, **linear, name=self.kind)(x)
        norm = sbn.linen.BatchNorm(**norm, name="norm")
        return after(norm(y, use_running_average, mask=mask), residual, self.activation)


class NnxPlain(nnx.Module):
    """Likewise."""

    def __init__(self, kind, inputs, activation, options, rngs):
        linear, norm = split(options)
        layer = {"conv": nnx.Conv, "dense": nnx.Linear}[kind]
        self.kind, self.activation = kind, activation
        setattr(self, kind, layer(inputs, FEATURES, **linear, rngs=rngs))
        self.norm = sbn.nnx.BatchNorm(FEATURES, **norm, rngs=rngs)

    def __call__(self, x, residual=None, use_running_average=None, *, mask=None):
        y = self.norm(getattr(self, self.kind)(x), use_running_average, mask=mask)
        return after(y, residual, self.activation)


def linen(kind, folded, x, activation, options):
    """Parameters, statistics, and the call of a linen layer."""
    if folded:
        layer = {"conv": sbn.linen.ConvNorm, "dense": sbn.linen.DenseNorm}[kind]
        layer = layer(FEATURES, activation=activation, **options)
    else:
        layer = LinenPlain(kind, activation, options)
    variables = layer.init(KEY, x, None, False)

    def call(params, stats, *args, **kwargs):
        y, updated = layer.apply(
            {"params": params, "batch_stats": stats},
            *args,
            **kwargs,
            mutable=["batch_stats"],
            rngs={"sampling": KEY},
        )
        return y, updated["batch_stats"]

    return variables["params"], variables["batch_stats"], call


def nnx_layer(kind, folded, x, activation, options):
    """Likewise of an nnx layer."""
    rngs, inputs = nnx.Rngs(0, sampling=1), x.shape[-1]
    if folded:
        layer = {"conv": sbn.nnx.ConvNorm, "dense": sbn.nnx.DenseNorm}[kind]
        layer = layer(inputs, FEATURES, activation=activation, **options, rngs=rngs)
    else:
        layer = NnxPlain(kind, inputs, activation, options, rngs)
    graph, params, stats, rest = nnx.split(layer, nnx.Param, nnx.BatchStat, ...)

    def call(params, stats, *args, **kwargs):
        layer = nnx.merge(graph, params, stats, rest, copy=True)
        y = layer(*args, **kwargs)
        return y, nnx.state(layer, nnx.BatchStat)

    return params, stats, call


def everything(make, folded, case):
    """What a layer creates, gives, updates, sends back and evaluates to."""
    kind, options = case["kind"], dict(LINEAR[case["kind"]])
    for name in ("norm_scale", "norm_bias", "epsilon", "momentum"):
        options[name] = case[name]
    x_dtype, options["param_dtype"], options["dtype"] = case["dtypes"]
    options["sampler"] = SAMPLERS[case["sampler"]]
    if kind == "conv" and case["kernel_mask"]:
        options["mask"] = jnp.asarray(KERNEL_MASK, options["param_dtype"])
    x, shape = cases.inputs(SHAPES[kind][0], x_dtype), SHAPES[kind][1]
    residual = cases.inputs(shape, seed=1) if case["residual"] else None
    mask = np.random.default_rng(2).random(shape) < 0.7 if case["masked"] else None
    g = cases.inputs(shape, seed=3)

    params, stats, call = make(kind, folded, x, case["activation"], options)
    created = params, stats
    params, stats = jax.tree.map(
        lambda v: v + jnp.asarray(cases.inputs(v.shape, seed=4) ** 2, v.dtype), created
    )

    @unfolded.quick_jit
    def run(params, stats, x, residual):
        def loss(params, x, residual):
            y, updated = call(params, stats, x, residual, False, mask=mask)
            return (y.astype(jnp.float32) * g).sum(), (y, updated)

        argnums = (0, 1) if residual is None else (0, 1, 2)
        gradients, (y, updated) = jax.grad(loss, argnums, has_aux=True)(
            params, x, residual
        )
        evaluated, same = call(params, stats, x[:1], None, True)
        return {
            "y": y,
            "updated": updated,
            "gradients": gradients,
            "evaluated": evaluated,
            "same": same,
        }

    return {"created": created, "stats": stats, **run(params, stats, x, residual)}


def name(case):
    return "-".join(getattr(v, "__name__", str(v)) for v in case.values())


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        make=[linen, nnx_layer],
        kind=list(LINEAR),
        sampler=list(SAMPLERS),
        activation=[nn.relu, jnp.tanh, None],
        residual=[True, False],
        masked=[False, True],
        kernel_mask=[False, True],
        norm_scale=[True, False],
        norm_bias=[True, False],
        epsilon=[1e-5, 0.5],
        momentum=[0.99, 0.8],
        dtypes=DTYPES,
    ),
    ids=name,
)
def test_the_layer_is_the_two_layers_it_replaces(case):
    actual, expected = (everything(case["make"], fold, case) for fold in (True, False))
    chex.assert_trees_all_equal(actual["created"], expected["created"], strict=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for result in (actual, expected):
        chex.assert_trees_all_equal(result.pop("same"), result["stats"])
    dtype = "bfloat16" if "bfloat16" in case["dtypes"] else "float32"
    close = functools.partial(assert_close, dtype=dtype, num=64, c=16)
    close(actual.pop("evaluated"), expected.pop("evaluated"))
    if case["sampler"] == "all":
        chex.assert_trees_all_equal(actual, expected, strict=True)
    elif dtype == "bfloat16":  # test_folding_bfloat16 has the gradients
        for result in (actual, expected):
            result.pop("gradients")
    jax.tree.map(close, actual, expected)
