"""Models of flax's layers, switched to sampled and folded norms without an edit."""

import copy
import functools
import gc
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from flax_sbn.modules import switching
from tests import cases
from tests.unfolded import quick_jit

LINEAR = {
    "bias": functools.partial(nn.Conv, 4, (3, 3)),
    "strided": functools.partial(nn.Conv, 4, (3, 3), 2, padding=1, use_bias=False),
    "groups": functools.partial(nn.Conv, 4, (3, 3), feature_group_count=2),
    "dilated": functools.partial(nn.Conv, 4, (3, 3), kernel_dilation=2),
    "circular": functools.partial(nn.Conv, 4, (2, 3), padding="CIRCULAR"),
    "masked": functools.partial(nn.Conv, 4, (1, 1), mask=jnp.eye(4)[None, None]),
    "dense": functools.partial(nn.Dense, 4),
}
SAMPLERS = {
    "lattice": sbn.LatticeSampling(2, min_values=8),
    "BS": sbn.BatchSampling(4),
    "mixed": sbn.MixedSampling(sbn.LatticeSampling(2), sbn.VirtualSampling(2)),
}


class Block(nn.Module):
    """A linear layer, a norm and an activation."""

    linear: Any = LINEAR["bias"]
    norm: Any = nn.BatchNorm
    act: Any = jnp.tanh

    @nn.compact
    def __call__(self, x, train=True):
        return self.act(self.norm(use_running_average=not train)(self.linear()(x)))


class Chain(nn.Module):
    """What a norm can follow: a layer, another norm, a sum, a pool, a cast."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, not train)
        y = norm(name="after_conv")(nn.Conv(4, (3, 3), name="conv")(x))
        y = norm(name="after_norm")(y)
        y = norm(name="after_sum")(nn.Conv(4, (1, 1))(y) + x)
        y = norm(name="after_transpose")(nn.ConvTranspose(4, (3, 3))(y))
        y = norm(name="features_first", axis=1)(nn.Conv(4, (1, 1))(y))
        made = nn.Dense(3, dot_general_cls=lambda: jax.lax.dot_general)
        y = norm(name="made")(made(y))
        return norm(name="dense")(nn.Dense(3)(y.mean((1, 2))))


class NNXBlock(nnx.Module):
    """The same block for nnx."""

    def __init__(self, dtype=jnp.float32, rngs=None, **options):
        rngs = rngs or nnx.Rngs(0)
        options = {"kernel_size": (3, 3)} | options
        self.conv = nnx.Conv(4, 4, param_dtype=dtype, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(4, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.conv(x)))


def inputs(dtype="float32"):
    return cases.inputs((8, 9, 9, 4), dtype)


def trained(variables, dtype="float32"):
    """Variables that are not their initial values."""
    leaves, tree = jax.tree.flatten(variables)
    moved = [
        jnp.asarray(a, dtype) + 0.1 * abs(cases.inputs(a.shape, dtype, seed=i))
        for i, a in enumerate(leaves)
    ]
    return tree.unflatten(moved)


def assert_equal(actual, expected):
    """To 1e-12, where the bias before a norm has no gradient but rounding errors.

    Statistics of nnx are float32 whatever else is.
    """
    pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    for a, e in pairs:
        assert a.dtype == e.dtype
        atol = {"float64": 1e-12, "float32": 1e-7}[str(a.dtype)]
        np.testing.assert_allclose(a, e, rtol=0, atol=atol * max(1, abs(e).max()))


def step(model, rngs=None):
    """Value, gradients and statistics of a linen model in training."""

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, updates = model.apply(variables, x, mutable=["batch_stats"], rngs=rngs)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, updates)

    return jax.value_and_grad(loss, (0, 2), has_aux=True)


# Each layer with a lattice, and the other samplers with a few.
FOLDED = [(linear, "lattice") for linear in LINEAR] + [
    *[("bias", "mixed"), ("groups", "mixed"), ("dense", "mixed")],
    *[("strided", "BS"), ("circular", "BS"), ("dense", "BS")],
]


@pytest.mark.parametrize(("linear", "sampler"), FOLDED)
def test_folded_equals_unfolded(linear, sampler, x64):
    x = inputs("float64")
    block, chosen = Block(LINEAR[linear]), SAMPLERS[sampler]
    models = [
        sbn.linen.sample_norms(block, chosen, fold=fold) for fold in (True, False)
    ]
    rngs = {"sampling": jax.random.key(3)}
    [norm] = sbn.linen.switch_report(models[0], x, rngs=jax.random.key(0)).norms
    assert norm.treatment == "folded"
    variables = trained(block.init(jax.random.key(0), x), "float64")
    arguments = variables["params"], variables["batch_stats"], x
    folded, unfolded = (quick_jit(step(m, rngs))(*arguments) for m in models)
    assert_equal(folded, unfolded)
    plain = quick_jit(lambda v: block.apply(v, x, mutable=["batch_stats"])[0])
    difference = folded[0][1][0] - plain(variables)
    assert abs(difference).max() > 1e-3  # a sample is measured


@pytest.mark.parametrize("options", [{}, {"feature_group_count": 2, "strides": 2}])
def test_nnx_folded_equals_unfolded(options, x64):
    x = inputs("float64")

    @nnx.jit
    def run(model, x):
        def loss(model, x):
            y = model(x)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x)

    results = []
    for fold in (True, False):
        model = NNXBlock(jnp.float64, **options)
        model.conv.bias[...] = cases.inputs((4,), "float64", seed=1)
        assert sbn.nnx.sample_norms(model, SAMPLERS["lattice"], fold=fold) is model
        if fold:
            [norm] = sbn.nnx.switch_report(model, x).norms
            assert norm == ("norm", "folded", "conv", "")
        results.append((run(model, x), nnx.state(model)))
    assert_equal(*results)


def test_dtypes_are_those_of_the_unfolded_norm():
    x = inputs()
    for conv_dtype in (None, jnp.bfloat16):
        for norm_dtype in (None, jnp.bfloat16, jnp.float32):
            block = Block(
                functools.partial(nn.Conv, 4, (3, 3), dtype=conv_dtype),
                functools.partial(nn.BatchNorm, dtype=norm_dtype),
            )
            variables = block.init(jax.random.key(0), x)
            model = sbn.linen.sample_norms(block)
            of = [
                jax.eval_shape(lambda v, m=m: m.apply(v, x, mutable=True), variables)
                for m in (block, model)
            ]
            assert of[0] == of[1], (conv_dtype, norm_dtype)


def test_the_report_says_what_became_of_each_norm_and_why():
    x = inputs()
    model = sbn.linen.sample_norms(Chain(), SAMPLERS["lattice"])
    report = sbn.linen.switch_report(model, x)
    became = {norm.norm: norm for norm in report.norms}
    assert became["after_conv"].layer == "conv"
    treatments = {name: norm.treatment for name, norm in became.items()}
    assert treatments == {
        "after_conv": "folded",
        "after_norm": "sampled",
        "after_sum": "sampled",
        "after_transpose": "sampled",
        "features_first": "sampled",
        "made": "sampled",
        "dense": "sampled",
    }
    assert became["after_sum"].reason.startswith("not directly after")
    assert became["features_first"].reason == "its features are not last"
    assert became["made"].reason == "a class (..._cls) computes its layer"
    assert became["dense"].reason == "so small that the sampler measures all of it"
    text = str(report)
    assert all(name in text for name in became)
    assert "7 norms: 1 folded, 6 sampled, 0 plain." in text
    assert text.endswith("Folded only in calls that jax.jit compiles.")

    # A norm whose input has nothing to sample from stays as it is.
    model = sbn.linen.sample_norms(Chain(), sbn.FeatureSampling(1 / 4))
    last = sbn.linen.switch_report(model, x).norms[-1]
    assert last == ("dense", "plain", "", "no spatial axes to sample from")


def test_convolutions_of_any_rank_and_several_batch_axes():
    for shape, window, treatment in (
        ((8, 9, 4), 3, "folded"),
        ((8, 9, 4), (3,), "folded"),
        ((8, 5, 5, 5, 4), (3, 3, 3), "folded"),
        ((2, 4, 9, 9, 4), (3, 3), "sampled"),
    ):
        model = sbn.linen.sample_norms(
            Block(functools.partial(nn.Conv, 4, window)), SAMPLERS["lattice"]
        )
        [norm] = sbn.linen.switch_report(model, jnp.ones(shape)).norms
        assert norm.treatment == treatment, (shape, window)


def test_fields_with_a_relu_are_reported():
    model = sbn.linen.sample_norms(Block(act=nn.relu))
    assert sbn.linen.switch_report(model, inputs()).relus == ("Block.act",)


def test_a_report_is_as_wide_as_the_terminal_and_cuts_nothing(monkeypatch):
    name = "a_very_long_name_of_a_norm_" * 4
    report = switching.SwitchReport(
        (switching.SwitchedNorm(name, "folded", "conv", ""),)
    )
    for columns in (60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= columns
        cells = "".join(line.split("│")[1].strip() for line in lines if "│" in line)
        assert cells == name
        assert "1 norm: 1 folded, 0 sampled, 0 plain." in lines


def test_reports_take_the_keys_of_a_training_step():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))
            return nn.Dropout(0.5, deterministic=not train)(y)

    model = sbn.linen.sample_norms(Net())
    x = jax.ShapeDtypeStruct((8, 9, 9, 4), jnp.float32)
    for rngs in (None, jax.random.key(1), {"dropout": jax.random.key(1)}):
        report = sbn.linen.switch_report(model, x, rngs=rngs, train=True)
        assert report.count("folded") == 1
    with pytest.raises(ValueError, match=r"in training, .* such as train=True"):
        sbn.linen.switch_report(model, x, train=False)
    with pytest.raises(ValueError, match=r"got Net .* switch_report\(sample_norms"):
        sbn.linen.switch_report(Net(), x, train=True)


def test_nnx_reports_say_how_a_relu_stays_fused():
    model = sbn.nnx.sample_norms(nnx.Sequential(NNXBlock(), nnx.relu))
    text = " ".join(str(sbn.nnx.switch_report(model, inputs())).split())
    assert "put `with flax_sbn.fused_relu():` around the call, or flax_sbn.relu in" in (
        text
    )
    assert text.endswith("layers/1.")
    model.eval()
    with pytest.raises(ValueError, match=r"in training, .* Call model.train\(\) first"):
        sbn.nnx.switch_report(model, inputs())
    with pytest.raises(ValueError, match=r"got NNXBlock without a switched norm"):
        sbn.nnx.switch_report(NNXBlock(), inputs())


@pytest.mark.parametrize(
    ("switch", "make", "message"),
    [
        (
            sbn.linen.sample_norms,
            lambda: NNXBlock,
            r"got the class NNXBlock. Call it: NNXBl",
        ),
        (sbn.linen.sample_norms, NNXBlock, r"of Linen, .* flax_sbn.nnx.sample_norms"),
        (sbn.nnx.sample_norms, Chain, r"of NNX, .* flax_sbn.linen.sample_norms"),
    ],
)
def test_what_is_no_module_of_the_api_is_refused(switch, make, message):
    with pytest.raises(TypeError, match=message):
        switch(make())


def test_with_a_weight_of_one_the_running_statistics_normalize():
    x = inputs() / 3  # within the limits of the correction
    variables = trained(Block().init(jax.random.key(0), x))
    model = sbn.linen.sample_norms(Block(), running_weight=1.0)
    y, updates = model.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, Block().apply(variables, x, train=False), atol=1e-5)
    old, new = variables["batch_stats"], updates["batch_stats"]
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), old, new))

    net = sbn.nnx.sample_norms(NNXBlock(), running_weight=1.0)
    expected = nnx.view(net, use_running_average=True)(x)
    np.testing.assert_allclose(net(x), expected, atol=1e-5)
    assert (net.norm.mean[...] != 0).all()


def test_evaluation_and_init_are_the_plain_models():
    x = inputs()
    plain = Chain()
    model = sbn.linen.sample_norms(plain)
    variables = plain.init(jax.random.key(0), x)
    jax.tree.map(
        np.testing.assert_array_equal, model.init(jax.random.key(0), x), variables
    )
    variables = trained(variables)
    evaluate = [
        quick_jit(lambda v, m=m: m.apply(v, x, train=False)) for m in (plain, model)
    ]
    np.testing.assert_array_equal(*(f(variables) for f in evaluate))

    net, other = NNXBlock(), sbn.nnx.sample_norms(NNXBlock())
    net.eval(), other.eval()
    np.testing.assert_array_equal(net(x), other(x))


class Halved(nn.Dense):
    """A layer of somebody's that changes its kernel before it uses it."""

    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return value / 2 if name == "kernel" else value


@pytest.mark.parametrize(
    "linear",
    [
        functools.partial(sbn.linen.WSConv, 4, (3, 3)),
        functools.partial(sbn.linen.WSDense, 4),
        functools.partial(sbn.linen.CenteredConv, 4, (3, 3)),
        functools.partial(Halved, 4),
        functools.partial(nn.ConvLocal, 4, (3, 3)),  # whose kernel is of each position
    ],
    ids=lambda linear: linear.func.__name__,
)
def test_layers_that_compute_their_kernel_are_not_folded(linear):
    x = inputs()
    block = Block(linear)
    variables = trained(block.init(jax.random.key(0), x))
    arguments = variables["params"], variables["batch_stats"], x
    sampled, unfolded = (
        quick_jit(step(sbn.linen.sample_norms(block, fold=fold)))(*arguments)
        for fold in (True, False)
    )
    assert_equal(sampled, unfolded)
    [norm] = sbn.linen.switch_report(sbn.linen.sample_norms(block), x).norms
    assert norm.treatment == "sampled"


def test_outside_jit_nothing_is_computed_twice():
    x = inputs()
    calls = []

    def convolve(*args, **kwargs):
        calls.append(args)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    block = Block(functools.partial(nn.Conv, 4, (3, 3), conv_general_dilated=convolve))
    variables = block.init(jax.random.key(0), x)
    model = sbn.linen.sample_norms(block)
    calls.clear()
    y, _ = model.apply(variables, x, mutable=["batch_stats"])
    jax.grad(lambda x: model.apply(variables, x, mutable=True)[0].sum())(x)
    assert len(calls) == 2  # each time once
    compiled = quick_jit(lambda v: model.apply(v, x, mutable=["batch_stats"]))
    # The same to rounding, though here the norm is not folded.
    np.testing.assert_allclose(y, compiled(variables)[0], atol=1e-5)


def lifted(transform):
    """A network whose blocks are transformed."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            return transform(Block)()(x)

    return Net()


class Scanned(nn.Module):
    """Blocks with stacked parameters."""

    @nn.compact
    def __call__(self, x, train=True):
        layers = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(Block(), x, None)[0]


class Setup(nn.Module):
    """Layers made in setup, called by methods of other names."""

    def setup(self):
        self.conv, self.norm = (
            nn.Conv(4, (3, 3)),
            nn.BatchNorm(use_running_average=False),
        )

    def encode(self, x):
        return self.norm(self.conv(x))

    def __call__(self, x):
        return self.encode(x)


MODELS = {
    "remat": lifted(nn.remat),
    "jit": lifted(nn.jit),
    "scan": Scanned(),
    "setup": Setup(),
    "sequential": nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(False)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_style_are_folded(name):
    x = inputs()
    model = sbn.linen.sample_norms(MODELS[name])
    gc.freeze()  # what is there need not be searched for leaks
    with jax.checking_leaks():
        norms = sbn.linen.switch_report(model, x).norms
    assert norms
    assert {norm.treatment for norm in norms} == {"folded"}


def test_a_block_under_jit_that_was_traced_before_is_traced_anew():
    @jax.jit
    def run(variables, x):
        return MODELS["jit"].apply(variables, x, mutable=["batch_stats"])

    x = inputs()
    variables = MODELS["jit"].init(jax.random.key(0), x)
    plain = run(variables, x)[0]
    model = sbn.linen.sample_norms(MODELS["jit"])
    sampled = jax.jit(lambda v: model.apply(v, x, mutable=["batch_stats"]))(variables)
    assert abs(plain - sampled[0]).max() > 1e-3


@pytest.mark.parametrize(
    "method", ["encode", Setup.encode, lambda net, x: net.norm(net.conv(x))]
)
def test_methods_of_any_name_are_switched(method):
    x = inputs()
    model = sbn.linen.sample_norms(Setup())
    variables = model.init(jax.random.key(0), x)
    run = functools.partial(model.apply, variables, mutable=["batch_stats"])
    expected = quick_jit(lambda x: run(x))(x)[0]
    actual = quick_jit(lambda x: run(x, method=method))(x)[0]
    np.testing.assert_array_equal(actual, expected)


def test_devices_pool_their_samples():
    block = Block(norm=functools.partial(nn.BatchNorm, axis_name="devices"))
    models = [sbn.linen.sample_norms(block, fold=fold) for fold in (True, False)]
    x = inputs().reshape(2, 4, 9, 9, 4)
    variables = block.init(jax.random.key(0), x[0])
    results = [
        quick_jit(
            jax.vmap(
                lambda x, m=m: m.apply(variables, x, mutable=["batch_stats"]),
                axis_name="devices",
            )
        )(x)
        for m in models
    ]
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("axis", [AxisType.Explicit, AxisType.Auto])
def test_arrays_on_several_devices_are_folded_as_on_one(axis):
    x, model = inputs(), sbn.linen.sample_norms(Block())
    variables = trained(model.init(jax.random.key(0), x))
    given = variables["params"], variables["batch_stats"]
    expected = quick_jit(step(model))(*given, x)
    mesh = jax.make_mesh((4,), ("data",), (axis,))
    given = jax.device_put(given, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh), switching.reporting() as norms:
        actual = quick_jit(step(model))(
            *given, jax.device_put(x, NamedSharding(mesh, P("data")))
        )
    assert {norm.treatment for norm in norms} == {"folded"}
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * max(1, abs(e).max()))


def test_a_call_is_captured_and_tabulated_once():
    x = inputs()
    model = sbn.linen.sample_norms(Block())
    variables = model.init(jax.random.key(0), x)

    seen = jax.eval_shape(
        lambda v: model.apply(
            v, x, capture_intermediates=True, mutable=["intermediates", "batch_stats"]
        )[1]["intermediates"],
        variables,
    )
    calls = [
        seen["__call__"],
        seen["Conv_0"]["__call__"],
        seen["BatchNorm_0"]["__call__"],
    ]
    assert [*map(len, calls)] == [1, 1, 1]
    tables = [nn.tabulate(m, jax.random.key(0))(x) for m in (Block(), model)]
    assert tables[0] == tables[1]


def test_a_switched_model_equals_itself_and_is_pickled():
    model = sbn.linen.sample_norms(Chain())
    assert model == sbn.linen.sample_norms(Chain())
    assert hash(model) == hash(sbn.linen.sample_norms(Chain()))
    assert model != Chain()
    assert type(model).__name__ == "Chain"
    assert pickle.loads(pickle.dumps(model)) == model
    assert copy.deepcopy(model) == model
    assert model.clone(name="other").name == "other"


def test_nnx_models_are_copied_pickled_and_made_plain_again():
    x = inputs()
    model = NNXBlock()
    graph = nnx.graphdef(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    sbn.nnx.sample_norms(model)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nnx.clone(model),
    ):
        assert sbn.nnx.switch_report(other, x).count("folded") == 1

    @nnx.jit
    def train(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).sum())(model))

    before = model.conv.kernel[...]
    train(model, optimizer, x)
    assert abs(model.conv.kernel[...] - before).max() > 0
    assert sbn.nnx.plain_norms(model) is model
    assert type(model.norm) is nnx.BatchNorm
    assert nnx.graphdef(model) == graph


def test_nnx_layers_stacked_for_a_scan_are_folded():
    x = inputs()

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return NNXBlock(rngs=rngs)

    model = sbn.nnx.sample_norms(make(nnx.Rngs(0)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)

    with switching.reporting() as norms:
        y = nnx.jit(lambda model, x: run(model, x))(model, x)
    assert y.shape == x.shape
    assert {norm.treatment for norm in norms} == {"folded"}
    assert model.norm.mean.shape == (2, 4)


def test_only_some_norms_are_switched():
    x = inputs()
    model = sbn.linen.sample_norms(Chain(), only=lambda path, _: path[-1] != "dense")
    names = [norm.norm for norm in sbn.linen.switch_report(model, x).norms]
    assert "after_conv" in names
    assert "dense" not in names
    net = NNXBlock()
    sbn.nnx.sample_norms(net, only=lambda path, norm: norm.num_features == 4)
    with pytest.raises(ValueError, match=r"Expected a model with flax\.nnx\.BatchNorm"):
        sbn.nnx.sample_norms(NNXBlock(), only=lambda path, _: False)


class Inherits(nn.BatchNorm):
    """A class derived from flax's, without a call of its own."""

    momentum: float = 0.9


class Copy(nn.Module):
    """A copy that a model brings along, with fewer fields."""

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, use_running_average=None):
        fields = {name: getattr(self, name) for name in ("momentum", "epsilon")}
        norm = nn.BatchNorm(self.use_running_average, **fields, parent=self.scope)
        return norm(x, use_running_average)


class Other(nn.Module):
    """No batch norm."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x):
        return x


def test_classes_of_the_models_own():
    x = inputs()

    def report(norm, **options):
        model = sbn.linen.sample_norms(Block(norm=norm), **options)
        return sbn.linen.switch_report(model, x)

    assert report(Inherits).count("folded") == 1
    assert report(Copy, norm_types=(Copy,)).count("folded") == 1
    with pytest.raises(TypeError, match="without momentum, epsilon"):
        report(Other, norm_types=(Other,))


class NNXOverrides(nnx.BatchNorm):
    """A class derived from flax's, with a call of its own."""

    def __call__(self, x, **kwargs):
        return 2 * super().__call__(x / 2, **kwargs)


class NNXCopy(nnx.Module):
    """A copy that a model brings along, with fewer attributes."""

    def __init__(self, num_features, *, rngs):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.momentum, self.epsilon = 0.9, 1e-3
        self.use_running_average = False

    def __call__(self, x):
        return 3 * x


def test_what_a_class_of_the_models_own_says_is_not_overridden():
    class Half(NNXCopy):
        dtype = jnp.bfloat16

    model = nnx.Sequential(Half(4, rngs=nnx.Rngs(0)))
    sbn.nnx.sample_norms(model, norm_types=(Half,))
    assert model(inputs()).dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", [NNXOverrides, NNXCopy])
def test_nnx_classes_of_the_models_own(norm):
    x, rngs = inputs(), nnx.Rngs(0)
    conv = nnx.Conv(x.shape[-1], 4, (3, 3), rngs=rngs)
    expected = sbn.nnx.sample_norms(
        nnx.Sequential(conv, nnx.BatchNorm(4, epsilon=1e-3, momentum=0.9, rngs=rngs))
    )
    model = nnx.Sequential(nnx.clone(conv), norm(4, rngs=rngs))
    model.layers[1].set_attributes(epsilon=1e-3, momentum=0.9, raise_if_not_found=False)
    model.layers[1].use_running_average = True
    before = model(x)
    model.layers[1].use_running_average = False
    with pytest.raises(ValueError, match="Expected a model with"):
        sbn.nnx.sample_norms(model)
    sbn.nnx.sample_norms(model, norm_types=(norm,))
    assert sbn.nnx.switch_report(model, x).count("folded") == 1
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        y = nnx.jit(lambda m: m(x))(other)
        np.testing.assert_array_equal(y, nnx.jit(lambda m: m(x))(nnx.clone(expected)))
    model.layers[1].use_running_average = True
    model.layers[1].mean[...] = jnp.zeros(4)
    model.layers[1].var[...] = jnp.ones(4)
    np.testing.assert_array_equal(model(x), before)
    assert type(sbn.nnx.plain_norms(model).layers[1]) is norm


def test_what_does_not_match_raises():
    x = inputs()
    with pytest.raises(
        ValueError, match=r"Expected a model with flax\.linen\.BatchNorm"
    ):
        sbn.linen.sample_norms(nn.Dense(2)).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="Expected a sampler"):
        sbn.linen.sample_norms(Chain(), 8)
    with pytest.raises(ValueError, match="Expected a model of its own"):
        sbn.linen.sample_norms(Chain().bind({}))
    with pytest.raises(TypeError, match="Conv without momentum"):
        sbn.nnx.sample_norms(NNXBlock(), norm_types=(nnx.Conv,))
    with pytest.raises(ValueError, match="Expected rngs for BatchSampling"):
        sbn.nnx.sample_norms(NNXBlock(), sbn.BatchSampling(4))


def test_relu_stays_fused_by_every_name():
    def barriers(f):
        return str(jax.make_jaxpr(jax.grad(f))(jnp.ones(3))).count(
            "optimization_barrier"
        )

    loss = lambda x: nn.relu(x).sum()  # noqa: E731
    assert barriers(loss) == 0

    def fused(x):
        with sbn.fused_relu():
            return loss(x)

    assert barriers(fused) == 1
    assert barriers(loss) == 0
    x = inputs()
    model = sbn.linen.sample_norms(Block(act=nn.relu))
    other = sbn.linen.sample_norms(Block(act=nn.relu), fuse_relu=False)
    variables = model.init(jax.random.key(0), x)

    def program(model):
        run = lambda x: model.apply(variables, x, mutable=True)[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(run))(x))

    assert "optimization_barrier" in program(model)
    assert "optimization_barrier" not in program(other)


def test_running_statistics_are_estimated_as_those_of_the_plain_model():
    batches = [inputs(), 2 + inputs()]
    variables = Block().init(jax.random.key(0), batches[0])
    plain, switched = (
        sbn.linen.estimate_statistics(model, variables, batches)
        for model in (Block(), sbn.linen.sample_norms(Block()))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, switched)
    net, other = NNXBlock(), sbn.nnx.sample_norms(NNXBlock())
    for model in (net, other):
        sbn.nnx.estimate_statistics(model, batches)
    np.testing.assert_array_equal(net.norm.mean[...], other.norm.mean[...])
    np.testing.assert_array_equal(net.norm.var[...], other.norm.var[...])
