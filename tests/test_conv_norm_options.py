"""Every option of flax's layers is offered by the folded ones, and reaches them."""

import dataclasses
import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases


def fields(cls):
    return {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}


def arguments(cls):
    return {*inspect.signature(cls.__init__).parameters} - {"self"}


RENAMED = {"norm_bias": "use_bias", "norm_scale": "use_scale"}  # of the norm


@pytest.mark.parametrize(
    ("ours", "linear"),
    [(sbn.linen.ConvNorm, nn.Conv), (sbn.linen.DenseNorm, nn.Dense)],
)
def test_every_option_of_flax_linen_is_offered(ours, linear):
    # Features are last, all arrays promote alike, and whose the bias is is said.
    left_out = {"axis", "promote_dtype", "use_bias", "use_scale"}
    own = {"sampler", "running_weight", "rng_collection", "norm_cls", "activation"}
    own |= RENAMED.keys()
    assert fields(ours) == (fields(linear) | fields(nn.BatchNorm) | own) - left_out
    defaults = {
        field.name: field.default
        for cls in (linear, nn.BatchNorm)
        for field in dataclasses.fields(cls)
    }
    for field in dataclasses.fields(ours):
        theirs = RENAMED.get(field.name, field.name)
        if theirs in defaults:
            assert field.default == defaults[theirs], field.name


# Another value than the default for every option of the two layers.
OPTIONS = {
    **{"strides": 2, "padding": "VALID", "input_dilation": 1, "kernel_dilation": 2},
    **{"feature_group_count": 2, "mask": jnp.ones((3, 2, 3, 4))},
    **{"dtype": jnp.bfloat16, "param_dtype": jnp.float16, "precision": "highest"},
    **{"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones},
    **{"scale_init": nn.initializers.zeros, "norm_bias": True, "norm_scale": True},
    **{"conv_general_dilated": lambda *args, **kwargs: None},
    **{"dot_general": lambda *args, **kwargs: None, "preferred_element_type": "f4"},
    **{"kernel_metadata": {"a": 1}, "bias_metadata": {"b": 2}},
    **{"scale_metadata": {"c": 3}, "use_running_average": True, "momentum": 0.5},
    **{"epsilon": 0.1, "axis_name": "device", "axis_index_groups": ((0,),)},
    **{"use_fast_variance": False, "force_float32_reductions": False},
    **{"conv_general_dilated_cls": None, "dot_general_cls": None},
    "sampler": sbn.NaiveSampling(2),
    "running_weight": 0.5,
    "rng_collection": "places",
}
SIZES = {
    "conv": {"features": 4, "kernel_size": (3, 2)},
    "dense": {"features": 4},
}


def assert_given(names, layer, norm):
    """Asserts that a linear layer and its norm got the options."""
    assert names <= OPTIONS.keys()
    for name in names:
        theirs = RENAMED.get(name, name)
        for part in (layer, norm):
            of_norm = part is layer and theirs in ("use_bias", "bias_init")
            if hasattr(part, theirs) and not of_norm:
                given, expected = getattr(part, theirs), OPTIONS[name]
                assert given is expected or given == expected, name


@pytest.mark.parametrize("kind", SIZES)
def test_every_option_reaches_the_linen_layers(kind):
    ours = {"conv": sbn.linen.ConvNorm, "dense": sbn.linen.DenseNorm}[kind]
    names = fields(ours) - {"activation", "norm_cls", *SIZES[kind]}
    options = {name: OPTIONS[name] for name in names}
    layer = ours(**SIZES[kind], norm_cls=sbn.linen.BatchRenorm, **options)
    found = {}

    def note(call, args, kwargs, context):
        found[context.module.name] = context.module
        if context.module.name is None:
            return call(*args, **kwargs)
        return jnp.ones((2, 4))

    with nn.intercept_methods(note):
        layer.init(jax.random.key(0), jnp.ones((2, 9, 8, 6)))
    assert_given(names, found[kind], found["norm"])
    assert isinstance(found["norm"], sbn.linen.BatchRenorm)


@pytest.mark.parametrize("kind", SIZES)
def test_every_option_reaches_the_nnx_layers(kind):
    ours = {"conv": sbn.nnx.ConvNorm, "dense": sbn.nnx.DenseNorm}[kind]
    linear = {"conv": nnx.Conv, "dense": nnx.Linear}[kind]
    names = arguments(linear) | arguments(nnx.BatchNorm) | RENAMED.keys()
    names |= {"sampler", "running_weight", "rng_collection"}
    names -= {"in_features", "out_features", "num_features", "kernel_size"}
    names -= {"axis", "promote_dtype", "use_bias", "use_scale", "rngs"}
    window = [(3, 2)] if kind == "conv" else []
    options = {name: OPTIONS[name] for name in names}
    layer = ours(6, 4, *window, **options, rngs=nnx.Rngs(0))
    assert_given(names - {"kernel_init"}, getattr(layer, kind), layer.norm)
    assert getattr(layer, kind).bias is None
    kernel, scale, bias = getattr(layer, kind).kernel, layer.norm.scale, layer.norm.bias
    assert (kernel.a, bias.b, scale.c) == (1, 2, 3)
    for array, value in [(kernel, 1), (scale, 0), (bias, 1)]:
        chex.assert_trees_all_equal(array[...], jnp.full(array.shape, value, "f2"))


MAKE = {
    "linen-conv": functools.partial(sbn.linen.ConvNorm, 4, (3, 2)),
    "linen-dense": functools.partial(sbn.linen.DenseNorm, 4),
    "linen-remat": functools.partial(nn.remat(sbn.linen.ConvNorm), 4, (3, 2)),
    "nnx-conv": functools.partial(sbn.nnx.ConvNorm, 6, 4, (3, 2), rngs=nnx.Rngs(0)),
    "nnx-dense": functools.partial(sbn.nnx.DenseNorm, 6, 4, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", ["use_bias", "use_scale"])
@pytest.mark.parametrize("make", MAKE)
def test_options_that_may_be_meant_for_either_layer_are_refused(make, name, value):
    own = name.replace("use", "norm")
    message = rf"Expected {own} .* got {name}={value}\. .*{own}={value} is for"
    with pytest.raises(TypeError, match=message):
        MAKE[make](**{name: value})


@pytest.mark.parametrize("name", ["bias", "scale"])
@pytest.mark.parametrize("make", MAKE)
def test_the_norm_goes_without(make, name):
    layer = MAKE[make](use_running_average=True, **{f"norm_{name}": False})
    if isinstance(layer, nnx.Module):
        norm = nnx.to_pure_dict(nnx.state(layer, nnx.Param))["norm"]
    else:
        x = jnp.ones((2, 9, 8, 6))
        norm = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["norm"]
    assert norm.keys() == {"bias", "scale"} - {name}


@pytest.mark.parametrize("sampler", [None, sbn.NaiveSampling(4)], ids=str)
@pytest.mark.parametrize("make", ["linen", "nnx"])
def test_a_wide_residual_is_cast_to_the_dtype_of_the_layer(make, sampler):
    x = cases.inputs((8, 4, 4, 3))
    residual = cases.inputs((8, 4, 4, 3), seed=1)
    options = {"dtype": jnp.bfloat16, "sampler": sampler}
    if make == "linen":
        layer = sbn.linen.ConvNorm(3, (1, 1), use_running_average=True, **options)
        call = functools.partial(layer.apply, layer.init(jax.random.key(0), x))
    else:
        call = sbn.nnx.ConvNorm(3, 3, (1, 1), rngs=nnx.Rngs(0), **options)
        call.eval()
    y = call(x, residual)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, call(x) + residual.astype(jnp.bfloat16))
