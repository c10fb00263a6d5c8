"""How the folded layers behave in models: streams, evaluation, transforms, devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases
from tests.closeness import assert_close

KEY = jax.random.key(3)
X = cases.inputs((16, 6, 5, 3))
SAMPLERS = {"all": None, **cases.SAMPLERS}


def linen(sampler, **options):
    options = {"use_running_average": False, "activation": nn.relu, **options}
    return sbn.linen.ConvNorm(4, (3, 3), sampler=sampler, **options)


def nnx_layer(sampler, **options):
    rngs = nnx.Rngs(0, sampling=1)
    options = {"activation": nnx.relu, **options}
    return sbn.nnx.ConvNorm(3, 4, (3, 3), sampler=sampler, rngs=rngs, **options)


def train(module, variables, *args, key=KEY, **options):
    return module.apply(
        variables, *args, mutable=["batch_stats"], rngs={"sampling": key}, **options
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_init_takes_one_row_and_no_stream_and_leaves_the_statistics(name):
    variables = linen(SAMPLERS[name]).init(KEY, X[:1])
    kernel = variables["params"]["conv"].pop("kernel")
    assert kernel.shape == (3, 3, 3, 4)
    expected = {
        "params": {"conv": {}, "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
        "batch_stats": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
    }
    chex.assert_trees_all_equal(variables, expected)


@pytest.mark.parametrize("name", ["BS", "FS"])
def test_a_missing_stream_is_named_with_the_layer_and_the_fix(name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen(SAMPLERS[name], name="stem")(x)

    model = Model()
    message = r"rng stream 'sampling' for .*layer stem.*rngs=\{'sampling': key\}"
    with pytest.raises(ValueError, match=message):
        model.apply(model.init(KEY, X), X, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"rng stream 'sampling' for .*Rngs\("):
        sbn.nnx.ConvNorm(3, 4, (3, 3), sampler=SAMPLERS[name], rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("name", ["all", "NS", "VDN-strata"])
def test_a_layer_that_draws_nothing_needs_no_stream(name):
    layer = linen(SAMPLERS[name])
    layer.apply(layer.init(KEY, X), X, mutable=["batch_stats"])
    sbn.nnx.ConvNorm(3, 4, 3, sampler=SAMPLERS[name], rngs=nnx.Rngs(params=0))(X[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluation_is_flax_and_needs_no_stream(name):
    layer = linen(SAMPLERS[name], use_running_average=True)
    variables = layer.init(KEY, X)
    variables["batch_stats"]["norm"] = {
        "mean": X[0, 0, :4, 0],
        "var": X[1, 0, :4, 0] ** 2,
    }
    z = nn.Conv(4, (3, 3), use_bias=False).apply(
        {"params": variables["params"]["conv"]}, X[:1]
    )
    norm = {name: tree["norm"] for name, tree in variables.items()}
    expected = nn.relu(nn.BatchNorm(use_running_average=True).apply(norm, z))
    assert_close(layer.apply(variables, X[:1]), expected, num=27)


def test_training_evaluation_and_views_switch_the_mode():
    layer = nnx_layer(sbn.BatchSampling(4))
    evaluated = nnx.view(layer, use_running_average=True)
    before = layer.norm.mean[...]
    evaluated(X)
    layer.eval()
    layer(X)
    layer.train()
    layer(X, None, True)
    chex.assert_trees_all_equal(layer.norm.mean[...], before)
    layer(X)
    assert (layer.norm.mean[...] != before).all()


REPLACED = {
    "LoRA": ("dense", nnx.LoRALinear, {"lora_rank": 2, "use_bias": False}),
    "WSConv": ("conv", sbn.nnx.WSConv, {"use_bias": False}),
    "bias": ("conv", nnx.Conv, {"bias_init": nn.initializers.ones}),
}


@pytest.mark.parametrize("sampler", [None, SAMPLERS["lattice"]], ids=str)
@pytest.mark.parametrize("name", REPLACED)
def test_an_nnx_layer_computes_with_what_was_put_in_its_place(name, sampler):
    kind, cls, options = REPLACED[name]
    made = {"conv": sbn.nnx.ConvNorm, "dense": sbn.nnx.DenseNorm}[kind]
    window = [(3, 3)] if kind == "conv" else []
    layer = made(3, 4, *window, sampler=sampler, rngs=nnx.Rngs(0))
    other = cls(3, 4, *window, **options, rngs=nnx.Rngs(0))
    setattr(layer, kind, other)
    if name == "LoRA":
        other.lora.lora_b[...] = jnp.ones((2, 4))
    unfolded = sbn.nnx.BatchNorm(4, sampler=sampler, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(layer(X), unfolded(other(X)))
    layer.eval(), unfolded.eval()
    chex.assert_trees_all_equal(layer(X), unfolded(other(X)))
    with pytest.raises(ValueError, match="Expected Flax's own layer without a bias"):
        sbn.nnx.fold_model(layer)


@pytest.mark.parametrize("batch", [(), (2, 8), (4, 1, 4)], ids=str)
@pytest.mark.parametrize("name", ["all", "FS"])
def test_batch_axes_are_taken_together_as_images(name, batch):
    layer = linen(SAMPLERS[name], activation=None)
    x = X if batch else X[:1]
    variables = layer.init(KEY, x)
    expected, statistics = train(layer, variables, x, jnp.ones((*x.shape[:3], 4)))
    y, same = train(
        layer,
        variables,
        x.reshape(*batch, *x.shape[1:]),
        jnp.ones((*batch, *x.shape[1:3], 4)),
    )
    assert y.shape == (*batch, *x.shape[1:3], 4)
    chex.assert_trees_all_close(
        (y.reshape(expected.shape), same), (expected, statistics), rtol=1e-5, atol=1e-5
    )


def test_each_layer_and_step_draws_another_place():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("first", "second"):
                linen(sbn.BatchSampling(2), momentum=0.0, name=name)(x)

    model = Twice()
    variables = model.init(KEY, X)
    params = variables["params"]
    params["second"] = params["first"]
    drawn = []
    for key in jax.random.split(KEY, 8):
        stats = train(model, variables, X, key=key)[1]["batch_stats"]
        drawn.append([float(each["norm"]["mean"][0]) for each in stats.values()])
    first, second = zip(*drawn, strict=True)
    assert len(set(first)) > 1
    assert first != second


def test_a_shared_layer_draws_anew():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen(sbn.BatchSampling(2))
            return layer(x), layer(x)

    model = Shared()
    variables = model.init(KEY, X)
    assert variables["params"].keys() == {"ConvNorm_0"}
    pairs = [train(model, variables, X, key=key) for key in jax.random.split(KEY, 4)]
    assert any(bool((a != b).any()) for (a, b), _ in pairs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_empty_mask_leaves_the_running_statistics_as_they_are(name):
    layer = linen(SAMPLERS[name])
    variables = layer.init(KEY, X)
    variables["batch_stats"]["norm"] = {
        "mean": X[0, 0, :4, 0],
        "var": X[1, 0, :4, 0] ** 2,
    }
    mask = jnp.zeros((16, 1, 1, 1), bool)
    y, updated = jax.jit(functools.partial(train, layer))(variables, X, mask=mask)
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])
    if name != "all":  # with no sampler the output is flax's, which is NaN
        chex.assert_tree_all_finite(y)


def test_products_with_a_state_are_not_folded():
    op = nn.Fp8DirectDotGeneralOp

    class Unfolded(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            dense = nn.Dense(4, use_bias=False, dot_general_cls=op, name="dense")
            norm = sbn.linen.BatchNorm(
                use_running_average, sampler=SAMPLERS["lattice"], name="norm"
            )
            return norm(dense(x))

    folded = sbn.linen.DenseNorm(4, dot_general_cls=op, sampler=SAMPLERS["lattice"])
    variables = folded.init(KEY, X, use_running_average=False)
    for evaluate in (False, True):

        def loss(variables, layer, evaluate=evaluate):
            y, updates = layer.apply(
                variables, X, use_running_average=evaluate, mutable=["batch_stats"]
            )
            return (y**2).sum(), updates

        def results(layer, loss=loss):
            return jax.value_and_grad(loss, has_aux=True)(variables, layer)

        chex.assert_trees_all_equal(results(folded), results(Unfolded()))


@pytest.mark.parametrize("name", ["NS", "evaluation"])
def test_the_given_products_and_precision_are_used(name):
    sampler = SAMPLERS["NS"]
    evaluate = {"use_running_average": name == "evaluation"}
    calls = []

    def convolve(*args, precision, **kwargs):
        calls.append(precision)
        return jax.lax.conv_general_dilated(*args, precision=precision, **kwargs)

    def dot(*args, precision, **kwargs):
        calls.append(precision)
        return jax.lax.dot_general(*args, precision=precision, **kwargs)

    common = {"sampler": sampler, "precision": "highest"}
    rngs = nnx.Rngs(0)
    for layer in [
        sbn.linen.ConvNorm(4, (3, 3), conv_general_dilated=convolve, **common),
        sbn.linen.ConvNorm(
            4, (3, 3), conv_general_dilated_cls=lambda: convolve, **common
        ),
        sbn.linen.DenseNorm(4, dot_general=dot, **common),
        sbn.linen.DenseNorm(4, dot_general_cls=lambda: dot, **common),
        sbn.nnx.ConvNorm(
            3, 4, (3, 3), conv_general_dilated=convolve, rngs=rngs, **common
        ),
        sbn.nnx.DenseNorm(3, 4, dot_general=dot, rngs=rngs, **common),
    ]:
        if isinstance(layer, nn.Module):
            variables = layer.init(KEY, X, **evaluate)
            calls.clear()
            layer.apply(variables, X, **evaluate, mutable=["batch_stats"])
        else:
            layer(X, **evaluate)
        # The sample and the whole, perhaps once more for their shape; what a class
        # makes is not folded.
        classes = ("conv_general_dilated_cls", "dot_general_cls")
        made = any(getattr(layer, field, None) for field in classes)
        assert len(calls) >= (1 if name == "evaluation" or made else 2)
        assert set(calls) == {"highest"}
        calls.clear()
