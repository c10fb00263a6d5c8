"""The folded layers are the two that each replaces: state, values, options."""

import dataclasses
import functools
import inspect
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
NORM = ["use_scale", "use_bias", "epsilon", "momentum", "axis_name", "sampler"]
SAMPLERS = {"all": None} | {n: cases.SAMPLERS[n] for n in ("NS", "BS", "FS", "FS+VDN")}
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
    norm = {name: options[name] for name in NORM if name in options}
    linear = {name: options[name] for name in options if name not in norm}
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
    for name in ("use_scale", "use_bias", "epsilon", "momentum"):
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
        use_scale=[True, False],
        use_bias=[True, False],
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


def fields(cls):
    return {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}


def arguments(cls):
    return {*inspect.signature(cls.__init__).parameters} - {"self"}


@pytest.mark.parametrize(
    ("ours", "linear"),
    [(sbn.linen.ConvNorm, nn.Conv), (sbn.linen.DenseNorm, nn.Dense)],
)
def test_every_option_of_flax_linen_is_offered(ours, linear):
    # The bias is the norm's, features are last, and all arrays promote alike.
    left_out = {"axis", "promote_dtype"}
    own = {"sampler", "activation"}
    assert fields(ours) == (fields(linear) | fields(nn.BatchNorm) | own) - left_out
    defaults = {
        field.name: field.default
        for cls in (linear, nn.BatchNorm)
        for field in dataclasses.fields(cls)
    }
    for field in dataclasses.fields(ours):
        if field.name in defaults:
            assert field.default == defaults[field.name], field.name


# Another value than the default for every option of the two layers.
OPTIONS = {
    **{"strides": 2, "padding": "VALID", "input_dilation": 1, "kernel_dilation": 2},
    **{"feature_group_count": 2, "mask": jnp.ones((3, 2, 3, 4))},
    **{"dtype": jnp.bfloat16, "param_dtype": jnp.float16, "precision": "highest"},
    **{"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones},
    **{"scale_init": nn.initializers.zeros, "use_bias": True, "use_scale": True},
    **{"conv_general_dilated": lambda *args, **kwargs: None},
    **{"dot_general": lambda *args, **kwargs: None, "preferred_element_type": "f4"},
    **{"kernel_metadata": {"a": 1}, "bias_metadata": {"b": 2}},
    **{"scale_metadata": {"c": 3}, "use_running_average": True, "momentum": 0.5},
    **{"epsilon": 0.1, "axis_name": "device", "axis_index_groups": [[0]]},
    **{"use_fast_variance": False, "force_float32_reductions": False},
    **{"conv_general_dilated_cls": None, "dot_general_cls": None},
    "sampler": sbn.NaiveSampling(2),
}
SIZES = {
    "conv": {"features": 4, "kernel_size": (3, 2)},
    "dense": {"features": 4},
}


def assert_given(layer, kind, norm, names):
    """Asserts that a linear layer and its norm got the options."""
    for name in names:
        for part in (layer, norm):
            if hasattr(part, name) and (part, name) != (layer, "use_bias"):
                assert getattr(part, name) is OPTIONS[name], name


@pytest.mark.parametrize("kind", SIZES)
def test_every_option_reaches_the_linen_layers(kind):
    ours = {"conv": sbn.linen.ConvNorm, "dense": sbn.linen.DenseNorm}[kind]
    names = fields(ours) - {"activation", *SIZES[kind]}
    assert names <= OPTIONS.keys()
    layer = ours(**SIZES[kind], **{name: OPTIONS[name] for name in names})
    found = {}

    def note(call, args, kwargs, context):
        found[context.module.name] = context.module
        if context.module.name is None:
            return call(*args, **kwargs)
        return jnp.ones(SHAPES[kind][1])

    with nn.intercept_methods(note):
        layer.init(KEY, jnp.ones(SHAPES[kind][0]))
    assert_given(found[kind], kind, found["norm"], names)
