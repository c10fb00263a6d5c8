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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_close, assert_trees_close

KEY = jax.random.key(3)
X = cases.inputs((8, 6, 5, 3))
IMAGE = X[:1]
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
    variables = jax.jit(model.init)(KEY, IMAGE)
    variables["params"] = jax.tree.map(
        lambda v: v + cases.inputs(v.shape, seed=1).astype(v.dtype) / 4,
        variables["params"],
    )
    step = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, updated = jax.jit(step)(variables, X, rngs={"sampling": KEY})
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
    exported = sbn.linen.fold_variables(model, variables, IMAGE)
    chex.assert_trees_all_equal(variables, before)
    assert exported.keys() == {"params"}
    assert "norm" not in str(jax.tree_util.tree_leaves_with_path(exported))
    actual, expected = (jax.jit(model.apply)(v, X) for v in (exported, variables))
    assert_close(actual, expected, "bfloat16" if options else "float32", num=54)
    assert_no_norm_is_left(
        program(model.apply, variables, IMAGE), program(model.apply, exported, IMAGE)
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
            program(lambda x, g=graph, s=state: nnx.merge(g, s, copy=True)(x), IMAGE)
        )
    assert_no_norm_is_left(*programs)


def test_the_program_takes_any_number_of_images():
    model, variables = trained()
    exported = sbn.linen.fold_variables(model, variables, IMAGE)
    (images,) = jax.export.symbolic_shape("images")
    x = jax.ShapeDtypeStruct((images, *IMAGE.shape[1:]), "float32")
    call = jax.export.export(jax.jit(lambda x: model.apply(exported, x)))(x).call
    assert_close(call(X), model.apply(variables, X), num=54)


@pytest.mark.parametrize("images", [8, 24])
def test_a_training_step_on_a_lattice_takes_any_number_of_images(images):
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

    (any_number,) = jax.export.symbolic_shape("images")
    x = jax.ShapeDtypeStruct((any_number, 9, 8, 3), "float32")
    call = jax.export.export(step)(kernel, x).call
    x = cases.inputs((images, 9, 8, 3), seed=2)
    assert_trees_close(call(kernel, x), step(kernel, x), num=x.size)


@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_a_training_step_with_any_sampler_takes_any_number_of_images(name):
    sampler, kernel = cases.SAMPLERS[name], cases.inputs((3, 3, 3, 4), seed=1)
    # As many values as make `min_values` say nothing, which an export leaves aside.
    x = cases.inputs((16, 12, 8, 3), seed=2)

    @jax.jit
    def step(key, kernel, x):
        def loss(kernel):
            y, statistics = sbn.conv_norm(x, kernel, sampler=sampler, key=key)
            return (y**3).mean(), statistics

        return jax.value_and_grad(loss, has_aux=True)(kernel)

    (images,) = jax.export.symbolic_shape("4*b", constraints=["b >= 2"])
    given = (KEY, kernel, jax.ShapeDtypeStruct((images, *x.shape[1:]), x.dtype))
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
    least = ["b >= 4", "h >= 4", "w >= 4"]
    shape = jax.export.symbolic_shape("b, h, w", constraints=least)
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
    exported = sbn.linen.fold_variables(model, variables, IMAGE)
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


@pytest.mark.parametrize("norm", ["BatchRenorm", "DiminishingBatchNorm"])
def test_of_norms_that_count_steps_nothing_is_left(norm):
    model, variables = trained(norm_cls=getattr(sbn.linen, norm))
    assert "step" in variables["batch_stats"]["block"]["first"]["norm"]
    exported = sbn.linen.fold_variables(model, variables, example_inputs=(X,))
    assert exported.keys() == {"params"}


def test_folding_twice_changes_nothing():
    model = trained_nnx()
    once = sbn.nnx.fold_model(model)
    chex.assert_trees_all_equal(nnx.state(sbn.nnx.fold_model(once)), nnx.state(once))
    linen, variables = trained()
    once = sbn.linen.fold_variables(linen, variables, IMAGE)
    chex.assert_trees_all_equal(sbn.linen.fold_variables(linen, once, IMAGE), once)


def test_a_bias_beside_a_norm_is_refused():
    layer = sbn.linen.ConvNorm(4, (3, 3))
    x = jnp.ones((1, 8, 8, 3))
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    variables["params"]["conv"]["bias"] = jnp.zeros(4)
    with pytest.raises(ValueError, match="got conv/bias and norm"):
        layer.apply(variables, x, use_running_average=True)


class Stacked(nn.Module):
    """Layers along leading axes of their variables."""

    kind: str

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(
            sbn.linen.ConvNorm, 3, (3, 3), use_running_average=True
        )
        if self.kind == "vmap":
            each = {"params": 0, "batch_stats": 0}
            ensemble = nn.vmap(
                sbn.linen.ConvNorm,
                variable_axes=each,
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return ensemble(3, (3, 3), use_running_average=True)(x)
        if self.kind == "remat":
            return nn.remat(nn.jit(sbn.linen.ConvNorm))(
                3, (3, 3), use_running_average=True
            )(x)
        if self.kind == "weight":
            return nn.WeightNorm(layer())(x)
        if self.kind == "spectral":
            return nn.SpectralNorm(layer())(x, update_stats=False)
        axes = {
            "scan": {"params": 0, "batch_stats": 0},
            "scan-one-statistics": {"params": 0},
            "scan-behind": {"params": 1, "batch_stats": 1},
        }[self.kind]
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes=axes,
            variable_broadcast=False if "batch_stats" in axes else "batch_stats",
            split_rngs={"params": True},
            length=2,
        )
        return scan(layer(), x, None)[0]


def stacked(kind):
    model = Stacked(kind)
    variables = model.init(KEY, X)
    return model, jax.tree.map(
        lambda v: v + abs(cases.inputs(v.shape, seed=1)) / 8, variables
    )


@pytest.mark.parametrize("kind", ["scan", "scan-one-statistics", "vmap", "remat"])
def test_layers_of_lifted_transformations_are_folded_where_they_are(kind):
    model, variables = stacked(kind)
    exported = sbn.linen.fold_variables(model, variables, example_inputs=(X,))
    assert exported.keys() == {"params"}
    assert_close(model.apply(exported, X), model.apply(variables, X), num=54)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_a_wrapper_that_changes_kernels_is_named(kind):
    model, variables = stacked(kind)
    message = r"see their variables as they are stored, .*params/ConvNorm_0/conv/kernel"
    with pytest.raises(ValueError, match=message):
        sbn.linen.fold_variables(model, variables, X)
    wrapper = {"weight": nnx.WeightNorm, "spectral": nnx.SpectralNorm}[kind]
    rngs = nnx.Rngs(0)
    wrapped = wrapper(sbn.nnx.ConvNorm(3, 3, (3, 3), rngs=rngs), rngs=rngs)
    with pytest.raises(ValueError, match=r"as they are stored, got layers in \w+Norm"):
        sbn.nnx.fold_model(wrapped)


def test_layers_that_are_stacked_along_other_axes_are_refused():
    model, variables = stacked("scan-behind")
    with pytest.raises(
        ValueError, match=r"leading axes, got .* variable_axes to the f"
    ):
        sbn.linen.fold_variables(model, variables, X)


def test_an_nnx_ensemble_is_folded_over_its_leading_axis():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return sbn.nnx.ConvNorm(3, 4, (3, 3), rngs=rngs)

    @nnx.vmap(in_axes=(0, None))
    def call(model, x):
        return model(x)

    models = make(nnx.Rngs(0))
    models.norm.mean[...] = cases.inputs((2, 4))
    models.eval()
    exported = sbn.nnx.fold_model(models)
    assert exported.conv.bias.shape == (2, 4)
    assert_close(call(exported, X), call(models, X), num=27)


def test_nnx_layers_that_share_a_kernel_are_refused():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = (
                sbn.nnx.ConvNorm(3, 3, (3, 3), rngs=rngs) for _ in range(2)
            )
            self.two.conv = self.one.conv

    with pytest.raises(ValueError, match=r"a kernel for each norm, .* share one"):
        sbn.nnx.fold_model(Shared(nnx.Rngs(0)))


def test_outputs_that_are_not_what_they_were_are_noticed_with_example_inputs():
    class Reads(nn.Module):
        """Uses the kernel of its layer once more."""

        @nn.compact
        def __call__(self, x):
            layer = sbn.linen.ConvNorm(3, (1, 1), use_running_average=True)
            kernel = layer.variables.get("params", {}).get("conv", {}).get("kernel", 0)
            return layer(x) + jnp.sum(kernel)

    model = Reads()
    variables = jax.tree.map(lambda v: v + 0.5, model.init(KEY, X))
    sbn.linen.fold_variables(model, variables, X)
    with pytest.raises(
        ValueError, match=r"Expected the outputs of before .* differ by"
    ):
        sbn.linen.fold_variables(model, variables, example_inputs=(X,))

    class NnxReads(nnx.Module):
        def __init__(self, rngs):
            self.layer = sbn.nnx.ConvNorm(3, 3, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.layer(x) + self.layer.conv.kernel.sum()

    reads = NnxReads(nnx.Rngs(0))
    reads.layer.norm.var[...] = jnp.full(3, 4.0)
    reads.eval()
    with pytest.raises(
        ValueError, match=r"Expected the outputs of before .* differ by"
    ):
        sbn.nnx.fold_model(reads, example_inputs=(X,))
    sbn.nnx.fold_model(trained_nnx(), example_inputs=(X,))


@pytest.mark.parametrize(
    "partition", [nn.with_partitioning, nn.with_logical_partitioning]
)
@pytest.mark.parametrize("boxed", ["kernel", "bias", "both"])
def test_how_parameters_are_divided_stays(partition, boxed):
    options = {}
    if boxed != "bias":
        axes = (None, None, "in", "out")
        options["kernel_init"] = partition(nn.initializers.lecun_normal(), axes)
    if boxed != "kernel":
        options["bias_init"] = partition(nn.initializers.zeros, ("mine",))
    layer = sbn.linen.ConvNorm(4, (3, 3), use_running_average=True, **options)
    variables = layer.init(KEY, X)
    exported = sbn.linen.fold_variables(layer, variables, example_inputs=(X,))
    before, after = (
        nn.get_partition_spec(v)["params"]["conv"] for v in (variables, exported)
    )
    assert after["kernel"] == before["kernel"]
    assert after["bias"] == P("out" if boxed == "kernel" else "mine")
    assert jax.tree.map(jnp.shape, nn.unbox(exported))["params"]["conv"]["bias"] == (4,)


@pytest.mark.parametrize("boxed", ["kernel", "bias", "both", "none"])
def test_nnx_metadata_of_kernels_stays(boxed):
    options = {}
    if boxed in ("kernel", "both"):
        axes = (None, None, "in", "out")
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        options["kernel_init"] = init
    if boxed in ("bias", "both"):
        options["bias_init"] = nnx.with_partitioning(nnx.initializers.zeros, ("mine",))
    mesh = jax.make_mesh((1, 2, 4), ("in", "out", "mine"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        layer = sbn.nnx.ConvNorm(3, 4, (3, 3), rngs=nnx.Rngs(0), **options)
        conv = sbn.nnx.fold_model(layer).conv
    kept = layer.conv.kernel.get_metadata("out_sharding", None)
    assert conv.kernel.get_metadata("out_sharding", None) == kept
    expected = {"kernel": ("out",), "none": ()}.get(boxed, ("mine",))
    assert tuple(conv.bias.get_metadata("out_sharding", None) or ()) == expected
    assert conv.bias[...].sharding.is_fully_replicated == (boxed == "none")
