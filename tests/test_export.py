"""Folding for good: the same outputs, and no norm left in state or program."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_close, assert_trees_close

KEY = jax.random.key(3)
X = cases.inputs((8, 6, 5, 3))
ROW = X[:1]
SAMPLER = sbn.BatchSampling(4)


class Block(nn.Module):
    """Layers that fold, one without a norm, and one whose norm is its own."""

    options: dict

    @nn.compact
    def __call__(self, x, train):
        fold = functools.partial(
            sbn.linen.ConvNorm,
            use_running_average=not train,
            sampler=SAMPLER,
            **self.options,
        )
        x = fold(6, (3, 3), strides=2, activation=nn.relu, name="first")(x)
        y = fold(6, (3, 1), feature_group_count=3, padding="CIRCULAR")(x)
        x = fold(6, (1, 1), activation=jnp.tanh, norm_scale=False)(y, x)
        x = sbn.linen.DenseNorm(5, use_running_average=not train, norm_bias=False)(x)
        return nn.Dense(2)(x.mean((1, 2)))


class Net(nn.Module):
    """Blocks in a model."""

    options: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        return Block(self.options or {}, name="block")(x, train)


class NnxNet(nnx.Module):
    """The same layers in an nnx model."""

    def __init__(self, rngs, **options):
        fold = functools.partial(
            sbn.nnx.ConvNorm, sampler=SAMPLER, rngs=rngs, **options
        )
        self.first = fold(3, 6, (3, 3), strides=2, activation=nnx.relu)
        self.layers = nnx.List(
            [
                fold(6, 6, (3, 1), feature_group_count=3, padding="CIRCULAR"),
                fold(6, 6, (1, 1), activation=jnp.tanh, norm_scale=False),
            ]
        )
        self.dense = sbn.nnx.DenseNorm(6, 5, norm_bias=False, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = self.dense(self.layers[1](self.layers[0](x), x))
        return self.head(x.mean((1, 2)))


def trained(**options):
    """A linen model after a step, its variables anything but those of ``init``."""
    model = Net(options)
    variables = model.init(KEY, ROW)
    variables["params"] = jax.tree.map(
        lambda v: v + cases.inputs(v.shape, seed=1).astype(v.dtype) / 4,
        variables["params"],
    )
    _, updated = model.apply(
        variables, X, True, mutable=["batch_stats"], rngs={"sampling": KEY}
    )
    return model, {**variables, **updated}


def trained_nnx(**options):
    """An nnx model likewise, at evaluation."""
    model = NnxNet(nnx.Rngs(0, sampling=1), **options)
    params = jax.tree.map(
        lambda v: v + cases.inputs(v.shape, seed=1).astype(v.dtype) / 4,
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, params)
    model(X)
    model.eval()
    return model


def program(function, *args):
    """The text of an exported program."""
    return jax.export.export(jax.jit(function), platforms=["cpu"])(*args).mlir_module()


def assert_no_norm_is_left(before, after):
    for operation in ("stablehlo.rsqrt", "stablehlo.multiply"):
        assert operation in before
        assert operation not in after


DTYPES = [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}]


@pytest.mark.parametrize("options", DTYPES, ids=str)
def test_linen_outputs_stay_and_no_norm_is_left(options):
    model, variables = trained(**options)
    before = jax.tree.map(jnp.array, variables)
    exported = sbn.linen.fold_variables(model, variables, ROW)
    chex.assert_trees_all_equal(variables, before)
    assert exported.keys() == {"params"}
    assert "norm" not in str(jax.tree_util.tree_leaves_with_path(exported))
    actual, expected = (model.apply(v, X) for v in (exported, variables))
    assert_close(actual, expected, "bfloat16" if options else "float32", num=54)
    assert_no_norm_is_left(
        program(model.apply, variables, ROW), program(model.apply, exported, ROW)
    )


@pytest.mark.parametrize("options", DTYPES, ids=str)
def test_nnx_outputs_stay_and_no_norm_is_left(options):
    model = trained_nnx(**options)
    before = jax.tree.map(jnp.array, nnx.state(model, (nnx.Param, nnx.BatchStat)))
    exported = sbn.nnx.fold_model(model)
    chex.assert_trees_all_equal(nnx.state(model, (nnx.Param, nnx.BatchStat)), before)
    assert not jax.tree.leaves(nnx.state(exported, nnx.Not(nnx.Param)))
    assert_close(exported(X), model(X), "bfloat16" if options else "float32", num=54)
    programs = []
    for each in (model, exported):
        graph, state = nnx.split(each)
        programs.append(
            program(lambda x, g=graph, s=state: nnx.merge(g, s, copy=True)(x), ROW)
        )
    assert_no_norm_is_left(*programs)


def test_the_program_takes_any_number_of_rows():
    model, variables = trained()
    exported = sbn.linen.fold_variables(model, variables, ROW)
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, *ROW.shape[1:]), "float32")
    call = jax.export.export(jax.jit(lambda x: model.apply(exported, x)))(x).call
    assert_close(call(X), model.apply(variables, X), num=54)


@pytest.mark.parametrize("images", [8, 24])
def test_a_training_step_on_a_lattice_takes_any_number_of_rows(images):
    # With no less than `min_values` it measures where it does with a known number.
    sampler = sbn.LatticeSampling(4, min_values=32)
    kernel = cases.inputs((3, 3, 3, 4), seed=1)

    @jax.jit
    def step(kernel, x):
        def loss(kernel):
            y, statistics = sbn.conv_norm(
                x, kernel, sampler=sampler, activation=nn.relu
            )
            square = kernel[0, 0].T @ kernel[1, 1]
            y, more = sbn.dense_norm(y, square, sampler=sampler)
            y, last = sbn.batch_norm(jnp.sin(y), sampler=sampler)
            return (y**3).mean(), (statistics, more, last)

        return jax.value_and_grad(loss, has_aux=True)(kernel)

    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 9, 8, 3), "float32")
    call = jax.export.export(step)(kernel, x).call
    x = cases.inputs((images, 9, 8, 3), seed=2)
    assert_trees_close(call(kernel, x), step(kernel, x), num=x.size)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_a_training_step_with_any_sampler_takes_any_number_of_rows(name):
    sampler, kernel = cases.SAMPLERS[name], cases.inputs((3, 3, 3, 4), seed=1)
    # As many values as make `min_values` say nothing, which an export leaves aside.
    x = cases.inputs((16, 12, 8, 3), seed=2)

    @jax.jit
    def step(key, kernel, x):
        def loss(kernel):
            y, statistics = sbn.conv_norm(x, kernel, sampler=sampler, key=key)
            return (y**3).mean(), statistics

        return jax.value_and_grad(loss, has_aux=True)(kernel)

    (rows,) = jax.export.symbolic_shape("4*b", constraints=["b >= 2"])
    given = (KEY, kernel, jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype))
    call = jax.export.export(step)(*given).call
    assert_trees_close(call(KEY, kernel, x), step(KEY, kernel, x), num=x.size)


NOT_KNOWN = {
    "too few": ("b, 8, 8, 3", sbn.BatchSampling(4), "known to hold .* constraints"),
    "all virtual": (
        "b, 8, 8, 3",
        sbn.MixedSampling(sbn.BatchSampling(1), sbn.VirtualSampling(1)),
        "known to hold .* constraints",
    ),
    "strata": ("8*b + 1, 8, 8, 3", sbn.BatchSampling(4, strata=2), "divide both"),
    "copies": ("b, 8, 8, 3", sbn.CopySampling(2), "divisible by num_copies"),
    "groups": (
        "b, 8, 8, 3",
        sbn.FeatureSampling(1 / 4, groups=4),
        r"known to be divisible by groups=4, got batch size b\. .*'4\*b'",
    ),
    "patch": ("8, b, 8, 3", sbn.FeatureSampling(1 / 4), "known extent .*one image"),
    "lattice": ("8, 8, b, 3", sbn.LatticeSampling(), "known extent .*one image size"),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_an_export_leaves_open_and_a_sampler_has_to_know_is_named(name):
    shape, sampler, message = NOT_KNOWN[name]
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), "float32")
    norm = functools.partial(sbn.batch_norm, sampler=sampler, key=KEY)
    with pytest.raises(ValueError, match=message):
        jax.export.export(jax.jit(norm))(x)


SIZES = [
    {"strides": 2},
    {"strides": (2, 3), "padding": "SAME_LOWER"},
    {"strides": 2, "padding": "VALID"},
    {"padding": "REFLECT"},
    {"padding": ((2, 1), (0, 3)), "input_dilation": 2},
    {"kernel_dilation": 2, "strides": 2},
]


@pytest.mark.parametrize("options", SIZES, ids=str)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_evaluation_takes_images_of_any_size(api, options):
    if api == "linen":
        layer = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True, **options)
        apply = functools.partial(layer.apply, layer.init(KEY, X))
    else:
        apply = sbn.nnx.ConvNorm(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)
        apply.eval()
    shape = jax.export.symbolic_shape("b, h, w", constraints=["h >= 4", "w >= 4"])
    x = jax.ShapeDtypeStruct((*shape, 3), "float32")
    call = jax.export.export(jax.jit(lambda x: apply(x)))(x).call
    for size in (X.shape, (2, 9, 12, 3)):
        x = cases.inputs(size, seed=3)
        assert_close(call(x), apply(x), num=27)


@pytest.mark.parametrize("padding", ["SAME", "REFLECT"])
def test_training_on_whole_images_takes_them_at_any_size(padding):
    kernel = cases.inputs((3, 3, 3, 4), seed=1)
    norm = functools.partial(sbn.conv_norm, sampler=SAMPLER, strides=2, padding=padding)
    step = jax.jit(lambda x: norm(x, kernel, key=KEY))
    shape = jax.export.symbolic_shape("b, h, w", constraints=["b >= 4", "h >= 4"])
    x = jax.ShapeDtypeStruct((*shape, 3), "float32")
    assert_trees_close(jax.export.export(step)(x).call(X), step(X), num=27)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_plain_layers_of_these_names_give_the_same(kind):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "conv":
                return nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
            return nn.relu(nn.Dense(4, name="dense")(x))

    make = {
        "conv": functools.partial(sbn.linen.ConvNorm, 4, (3, 3), strides=2),
        "dense": functools.partial(sbn.linen.DenseNorm, 4),
    }[kind]
    model = make(use_running_average=True, activation=nn.relu, epsilon=0.1)
    variables = jax.tree.map(lambda v: v + 0.5, model.init(KEY, X))
    exported = sbn.linen.fold_variables(model, variables, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(exported, Plain().init(KEY, X))
    assert_close(Plain().apply(exported, X), model.apply(variables, X), num=27)


def test_a_masked_kernel_stays_masked():
    mask = jnp.asarray(cases.inputs((3, 3, 3, 4)) > 0, jnp.float32)
    model = sbn.linen.ConvNorm(4, (3, 3), mask=mask, use_running_average=True)
    variables = jax.tree.map(lambda v: v + 0.5, model.init(KEY, X))
    exported = sbn.linen.fold_variables(model, variables, X)
    assert_close(model.apply(exported, X), model.apply(variables, X), num=27)


def test_a_model_that_is_folded_for_good_does_not_train():
    model, variables = trained()
    exported = sbn.linen.fold_variables(model, variables, ROW)
    message = r"Expected use_running_average=True, got False .* folded for good. Train"
    with pytest.raises(ValueError, match=message):
        model.apply(exported, X, True, mutable=["batch_stats"], rngs={"sampling": KEY})


def test_variables_with_both_a_bias_and_a_norm_are_refused():
    model = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True)
    variables = model.init(KEY, X)
    variables["params"]["conv"]["bias"] = jnp.ones(4)
    message = r"Expected a norm and conv without a bias, .* got conv/bias and norm\."
    with pytest.raises(ValueError, match=message):
        model.apply(variables, X)


def test_a_model_without_folded_layers_is_named():
    norm = sbn.linen.BatchNorm(use_running_average=True)
    message = r"Expected a model with ConvNorm or DenseNorm layers, got .*BatchNorm"
    with pytest.raises(ValueError, match=message):
        sbn.linen.fold_variables(norm, norm.init(KEY, X), X)
    with pytest.raises(ValueError, match=message):
        sbn.nnx.fold_model(sbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_folding_twice_changes_nothing():
    model = trained_nnx()
    once = sbn.nnx.fold_model(model)
    chex.assert_trees_all_equal(nnx.state(sbn.nnx.fold_model(once)), nnx.state(once))
    linen, variables = trained()
    once = sbn.linen.fold_variables(linen, variables, ROW)
    chex.assert_trees_all_equal(sbn.linen.fold_variables(linen, once, ROW), once)


def test_a_bias_beside_a_norm_is_refused():
    layer = sbn.linen.ConvNorm(4, (3, 3))
    x = jnp.ones((1, 8, 8, 3))
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    variables["params"]["conv"]["bias"] = jnp.zeros(4)
    with pytest.raises(ValueError, match="got conv/bias and norm"):
        layer.apply(variables, x, use_running_average=True)
