"""Variables of plain layers as those of folded ones: the same model, and back again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.errors import ScopeParamNotFoundError

import flax_sbn as sbn
from tests import cases
from tests.unfolded import quick_jit

LATTICE = sbn.LatticeSampling(2, min_values=8)
ANY_MAP = sbn.BatchSampling(2)


class Plain(nn.Module):
    """Layers with and without a bias, names of all kinds, and what stays as it is."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, not train)
        x = jnp.tanh(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = norm(use_scale=False)(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = jnp.tanh(y + norm(name="bn")(nn.Conv(4, (1, 1), name="proj")(x)))
        x = jnp.tanh(norm(name="alone")(x)).mean((1, 2))
        x = norm(name="last")(nn.Dense(3)(x))
        return nn.Dense(2)(x)


class Folded(nn.Module):
    """The same, written with folded layers."""

    sampler: sbn.Sampler | None = None

    @nn.compact
    def __call__(self, x, train=True):
        options = {"use_running_average": not train, "sampler": self.sampler}
        conv = functools.partial(sbn.linen.ConvNorm, **options)
        x = conv(4, (3, 3), activation=jnp.tanh)(x)
        y = conv(4, (3, 3), feature_group_count=2, norm_scale=False)(x)
        x = conv(4, (1, 1), activation=jnp.tanh, name="proj")(x, y)
        x = jnp.tanh(sbn.linen.BatchNorm(**options, name="alone")(x)).mean((1, 2))
        x = sbn.linen.DenseNorm(3, **options)(x)
        return nn.Dense(2, name="Dense_1")(x)


class Stacked(nn.Module):
    """Blocks with stacked parameters; dense kernels of a convolution's rank."""

    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, train=True):
        layers = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(self.block(name="block"), x, None)[0]


class PlainBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train)(nn.Conv(4, (3,))(x))
        return nn.BatchNorm(not train)(nn.Dense(4)(x))


class FoldedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = sbn.linen.ConvNorm(4, (3,), use_running_average=not train)(x)
        return sbn.linen.DenseNorm(4, use_running_average=not train)(x)


X = cases.inputs((8, 9, 9, 4))
MODELS = {
    "net": (Plain(), Folded(), X),
    "scan": (Stacked(PlainBlock), Stacked(FoldedBlock), X[:, 0]),
}


def report_of(model, x, sampler=ANY_MAP):
    return sbn.linen.switch_report(sbn.linen.sample_norms(model, sampler), x)


def trained(model, x, dtype="float64"):
    """Variables that are not their initial values."""
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(variables)
    values = [
        0.5 + 0.1 * abs(cases.inputs(leaf.shape, dtype, seed=i))
        for i, leaf in enumerate(leaves)
    ]
    return tree.unflatten(values)


def step(model, variables, x):
    """Gradients and running statistics of a training step."""

    def loss(params):
        given = {**variables, "params": params}
        y, updates = model.apply(given, x, mutable=["batch_stats"])
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), updates

    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_equal(actual, expected, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=0, atol=atol * max(1, abs(e).max()))


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_evaluates_as_the_plain_one(name, x64):
    plain, folded, x = MODELS[name]
    x = x.astype("float64")
    variables = trained(plain, x)
    converted = sbn.linen.to_folded_layers(variables, report_of(plain, x))
    assert_equal(
        quick_jit(lambda v: folded.apply(v, x, train=False))(converted),
        quick_jit(lambda v: plain.apply(v, x, train=False))(variables),
        1e-12,
    )


@pytest.mark.parametrize("sampler", [None, LATTICE], ids=["bn", "lattice"])
def test_a_step_of_the_converted_model_is_one_of_the_plain_model(sampler, x64):
    plain = sbn.linen.sample_norms(Plain(), sampler) if sampler else Plain()
    optimizer = optax.chain(optax.clip_by_global_norm(1e3), optax.adam(0.1))
    x = X.astype("float64")
    variables = trained(Plain(), x)
    state = optimizer.init(variables["params"])
    convert = functools.partial(
        sbn.linen.to_folded_layers, report=report_of(Plain(), x)
    )

    @functools.partial(quick_jit, static_argnums=0)
    def train(model, variables, state):
        gradients, stats = step(model, variables, x)
        updates, state = optimizer.update(gradients, state, variables["params"])
        return {
            "params": variables["params"],  # those that a running mean was shifted by
            "updates": updates,
            "gradients": gradients,
            "state": state,
            **stats,
        }

    # Moments that are not zero, in the first step.
    state = train(plain, variables, state)["state"]
    expected = convert(train(plain, variables, state))
    given = convert({**variables, "state": state})
    actual = train(Folded(sampler), given, given.pop("state"))
    assert_equal(actual, expected, 1e-12)
    assert abs(actual["gradients"]["ConvNorm_1"]["norm"]["bias"]).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_nothing_but_biases(name):
    plain, folded, x = MODELS[name]
    report = report_of(plain, x)
    variables = trained(plain, x, "float32")
    optimizer = optax.multi_transform(
        {"some": optax.adam(0.1), "others": optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(
            lambda p: "some" if p.ndim > 2 else "others", params
        ),
    )
    given = {
        **variables,
        "state": optimizer.init(variables["params"]),
        "step": np.int32(3),
    }
    converted = sbn.linen.to_folded_layers(given, report)
    shapes = jax.eval_shape(folded.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, converted["params"]) == jax.tree.map(
        jnp.shape, shapes["params"]
    )
    assert jax.tree.structure(converted["state"]) == jax.tree.structure(
        jax.eval_shape(optimizer.init, shapes["params"])
    )
    assert converted["step"] == 3

    back = sbn.linen.to_plain_layers(converted, report, use_bias=True)
    assert_equal(sbn.linen.to_folded_layers(back, report), converted)
    without = sbn.linen.to_plain_layers(converted, report)
    assert_equal(sbn.linen.to_folded_layers(without, report), converted)
    if name == "scan":  # all layers had a bias
        assert jax.tree.structure(back) == jax.tree.structure(given)
        assert abs(back["params"]["block"]["Conv_0"]["bias"]).max() == 0


def test_without_biases_the_way_back_is_the_inverse():
    report = report_of(Plain(), X)
    variables = trained(Plain(), X, "float32")
    for layer in ("Conv_1", "proj", "Dense_0"):
        del variables["params"][layer]["bias"]
    converted = sbn.linen.to_folded_layers(freeze(variables), report)
    assert_equal(sbn.linen.to_plain_layers(converted, report), variables)


def test_names_are_those_of_a_function():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(False)])
    report = report_of(model, X)
    convert = functools.partial(
        sbn.linen.to_folded_layers, model.init(jax.random.key(0), X), report
    )
    shapes = jax.eval_shape(
        sbn.linen.ConvNorm(4, (3, 3), use_running_average=False).init,
        jax.random.key(0),
        X,
    )
    assert convert()["params"].keys() == {"layers_0"}
    alone = convert(names=lambda layer, norm: "")
    assert jax.tree.structure(alone) == jax.tree.structure(shapes)
    below = convert(names=lambda layer, norm: f"stem/{layer}-{norm}")
    assert below["params"]["stem"].keys() == {"layers_0-layers_1"}


def test_sharding_metadata_is_kept():
    vector = nn.with_partitioning(nn.initializers.ones, ("features",))
    kernel = nn.with_partitioning(nn.initializers.ones, (None, None, None, "features"))
    norm = {"scale_init": vector, "bias_init": vector}
    plain = nn.Sequential(
        [
            nn.Conv(4, (3, 3), kernel_init=kernel, bias_init=vector),
            nn.BatchNorm(False, **norm),
        ]
    )
    folded = sbn.linen.ConvNorm(
        4, (3, 3), kernel_init=kernel, use_running_average=False, **norm
    )
    report = report_of(plain, X)
    given = plain.init(jax.random.key(0), X)
    convert = functools.partial(
        sbn.linen.to_folded_layers, report=report, names=lambda layer, norm: ""
    )
    converted = convert(given)
    expected = jax.eval_shape(folded.init, jax.random.key(0), X)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    back = sbn.linen.to_plain_layers(
        converted, report, names=lambda layer, norm: "", use_bias=True
    )
    assert jax.tree.structure(back) == jax.tree.structure(given)

    boxed = jax.tree.map(
        lambda mean: nn.Partitioned(mean, ("features",)), given["batch_stats"]
    )
    mean = convert({**given, "batch_stats": boxed})["batch_stats"]["norm"]["mean"]
    assert mean.names == ("features",)
    np.testing.assert_array_equal(mean.value, -np.ones(4))


class Shared(nn.Module):
    """Modules that are called twice, those named in ``again`` with others."""

    again: str

    @nn.compact
    def __call__(self, x):
        conv, norm = nn.Conv(4, (3, 3)), nn.BatchNorm(False)
        x = norm(conv(x))
        other_conv, other_norm = nn.Conv(4, (1, 1)), nn.BatchNorm(False)
        if self.again == "layer":
            return other_norm(conv(x))
        if self.again == "norm":
            return norm(other_conv(x))
        if self.again == "norm, elsewhere":
            return norm(x + 1)
        return norm(conv(x))


def test_a_pair_that_is_called_twice_is_converted_once():
    model = Shared("both")
    variables = model.init(jax.random.key(0), X)
    converted = sbn.linen.to_folded_layers(variables, report_of(model, X))
    assert converted["params"].keys() == {"ConvNorm_0"}


@pytest.mark.parametrize("again", ["layer", "norm", "norm, elsewhere"])
def test_modules_in_several_pairs_are_refused(again):
    model = Shared(again)
    variables = model.init(jax.random.key(0), X)
    what = again.removesuffix(", elsewhere")
    with pytest.raises(ValueError, match=rf"Expected each {what} in one pair .*_0' in"):
        sbn.linen.to_folded_layers(variables, report_of(model, X))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("Dense_1", "'Dense_1', 'Dense_1'"),
        ("alone", "'alone', 'alone'"),
        ("", "'', 'BatchNorm_1', 'Conv_1', 'Dense_0', 'Dense_1', 'alone'"),
    ],
)
def test_names_of_other_modules_are_refused(name, inside):
    variables = trained(Plain(), X, "float32")
    [first, *_] = report_of(Plain(), X).norms
    with pytest.raises(ValueError, match=f"one module at '{name}', got {inside}"):
        sbn.linen.to_folded_layers(
            variables, sbn.SwitchReport((first,)), names=lambda layer, norm: name
        )


@pytest.mark.parametrize(
    "convert", [sbn.linen.to_folded_layers, sbn.linen.to_plain_layers]
)
def test_names_of_several_pairs_are_refused(convert):
    variables = trained(Plain(), X, "float32")
    with pytest.raises(ValueError, match=r"each name in one pair .* got 'same' in"):
        convert(variables, report_of(Plain(), X), names=lambda layer, norm: "same")


@pytest.mark.parametrize("collection", ["params", "batch_stats"])
@pytest.mark.parametrize("there", [True, False])
def test_missing_variables_are_named(collection, there):
    report = report_of(Plain(), X)
    variables = trained(Plain(), X, "float32")
    convert = sbn.linen.to_folded_layers if there else sbn.linen.to_plain_layers
    if not there:
        variables = sbn.linen.to_folded_layers(variables, report)
    del variables[collection]
    with pytest.raises(ValueError, match=r"got none of '\w*_0/.* Pass what the init"):
        convert(variables, report)


def test_reports_of_another_model_are_refused():
    report = report_of(Plain(), X)
    variables = trained(Plain(), X, "float32")
    variables["batch_stats"]["BatchNorm_0"]["mean"] = jnp.ones(5)
    with pytest.raises(ValueError, match=r"Conv_0/kernel of shape \(3, 3, 4, 4\) and"):
        sbn.linen.to_folded_layers(variables, report)
    alone = nn.Sequential([jnp.tanh, nn.BatchNorm(False)])
    with pytest.raises(ValueError, match="Expected a report with folded norms"):
        sbn.linen.to_folded_layers(variables, report_of(alone, X))


def test_a_bias_needs_the_form_of_another():
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), nn.BatchNorm(False, use_bias=False, use_scale=False)]
    )
    report = report_of(model, X)
    variables = model.init(jax.random.key(0), X)
    converted = sbn.linen.to_folded_layers(variables, report)
    assert converted["params"] == {
        "layers_0": {"conv": {"kernel": variables["params"]["layers_0"]["kernel"]}}
    }
    with pytest.raises(ValueError, match="Expected a norm with a bias or a scale"):
        sbn.linen.to_plain_layers(converted, report, use_bias=True)


@pytest.mark.parametrize("sampler", [None, LATTICE], ids=["bn", "lattice"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        {"Conv_0": {"kernel": jnp.ones((3, 3, 4, 4))}},
        {"ConvNorm_0": {"kernel": jnp.ones((3, 3, 4, 4))}},
        {"ConvNorm_0": {"conv": {"kernel": jnp.ones((3, 3, 4, 4))}}},
    ],
    ids=["names", "kernel", "scale"],
)
def test_variables_that_are_not_converted_are_hinted_at(params, train, sampler):
    with pytest.raises(ScopeParamNotFoundError) as caught:
        Folded(sampler).apply({"params": params}, X, train, mutable=["batch_stats"])
    hints = [note for note in caught.value.__notes__ if "to_folded_layers" in note]
    assert len(hints) == 1  # jax adds notes of its own
