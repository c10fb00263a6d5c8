"""The models of the examples: as published, and the same for every normalization."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_sbn as sbn
from harness.methods import Method, parse_method
from models import IMAGE_SHAPES, NNX, linen_model, nnx_model

# Published: He et al. in the paper's tables, the ImageNet models in torchvision.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet56": 853_018,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "densenet121": 7_978_856,
}
KINDS = ("resnet8", "resnet18", "resnet50", "densenet121", "mlp", "unet")
SAMPLED = parse_method("bs:2")
FOLDED = dataclasses.replace(SAMPLED, folded=True)
METHODS = {
    **{name: parse_method(name) for name in ("flax", "bn", "gn", "none")},
    "sampled": SAMPLED,
    "folded": FOLDED,
}


def linen_shapes(name, method, x_shape, num_classes=10, width=None):
    """Returns the shapes of logits and variables, without computing anything."""
    model = linen_model(name, method, num_classes=num_classes, train=True, width=width)
    x = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def nnx_shapes(name, method, width=None):
    return nnx.eval_shape(
        lambda: nnx_model(
            name,
            method,
            in_shape=IMAGE_SHAPES[name],
            num_classes=10,
            width=width,
            rngs=nnx.Rngs(0),
        )
    )


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def paths(tree) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the leaves."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_output_shapes_are_the_published_ones(name) -> None:
    num_classes = 10 if name in NNX else 1000
    x_shape = (2, *IMAGE_SHAPES[name])
    logits, variables = linen_shapes(name, METHODS["flax"], x_shape, num_classes)
    assert size(variables["params"]) == PARAMETERS[name]
    assert (logits.shape, logits.dtype) == ((2, num_classes), jnp.float32)


@pytest.mark.parametrize("name", NNX)
def test_both_apis_have_the_same_parameters(name) -> None:
    _, variables = linen_shapes(name, METHODS["flax"], (2, *IMAGE_SHAPES[name]))
    params = nnx.state(nnx_shapes(name, METHODS["flax"]), nnx.Param)
    assert size(params) == size(variables["params"])


@pytest.mark.parametrize("name", KINDS)
def test_batch_norm_models_have_interchangeable_variables(name) -> None:
    trees = [
        paths(linen_shapes(name, METHODS[label], (2, 32, 32, 3))[1])
        for label in ("flax", "bn", "sampled", "folded")
    ]
    assert any("'norm'" in path for path in trees[0])
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("name", ["resnet8", "mlp"])
def test_batch_norm_nnx_models_have_interchangeable_variables(name) -> None:
    trees = [
        paths(nnx.state(nnx_shapes(name, METHODS[label]), kinds))
        for label in ("flax", "bn", "sampled", "folded")
        for kinds in [(nnx.Param, nnx.BatchStat)]
    ]
    assert any("'norm'" in path for path in trees[0])
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("name", KINDS)
def test_models_without_norm_have_biases_instead(name) -> None:
    _, variables = linen_shapes(name, METHODS["none"], (2, 32, 32, 3))
    assert variables.keys() == {"params"}
    leaves = [path.rsplit("[")[-1] for path in paths(variables["params"])]
    assert set(leaves) == {"'kernel']", "'bias']"}
    assert leaves.count("'kernel']") == leaves.count("'bias']")


@pytest.mark.parametrize("width", [1, 6, 16, 100, 272])
def test_group_norm_divides_every_width(width) -> None:
    for name in ("resnet8", "mlp"):
        linen_shapes(name, METHODS["gn"], (2, 32, 32, 3), width=width)


def test_width_is_that_of_the_first_stage() -> None:
    for name in ("resnet8", "resnet50", "mlp"):
        _, variables = linen_shapes(name, METHODS["flax"], (2, 32, 32, 3), width=12)
        unit = "DenseNorm_0" if name == "mlp" else "ConvNorm_0"
        assert variables["params"][unit]["norm"]["scale"].shape == (12,)


def test_a_unet_has_logits_for_each_pixel() -> None:
    logits, _ = linen_shapes("unet", METHODS["folded"], (2, 16, 32, 3), width=4)
    assert logits.shape == (2, 16, 32, 10)


@pytest.mark.parametrize("name", ["resnet8", "resnet8-stride2"])
def test_sequences_have_windows_of_one_axis_in_both_apis(name) -> None:
    method, shape = METHODS["folded"], (2, 24, 3)
    logits, variables = linen_shapes(name, method, shape, width=4)
    assert logits.shape == (2, 10)
    params = variables["params"]
    assert params["ConvNorm_0"]["conv"]["kernel"].shape == (3, 3, 4)
    options = {"in_shape": shape[1:], "num_classes": 10, "width": 4}

    def run(x):
        model = nnx_model(name, method, **options, rngs=nnx.Rngs(0))
        return model(x), nnx.state(model, nnx.Param)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    of_nnx, nnx_params = jax.eval_shape(run, x)
    assert of_nnx.shape == logits.shape
    assert size(nnx_params) == size(params)


def random_variables(model, x):
    """Returns variables that are less even than those of ``init``, and cheaper."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) > 1:
            fan_in = math.prod(leaf.shape[:-1])
            return rng.normal(0, fan_in**-0.5, leaf.shape).astype(x.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(x.dtype)

    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(draw, variables)
    return variables["params"], variables.get("batch_stats", {})


def linen_results(name, method, x, width):
    """Returns loss and new statistics, gradients, and the logits of an evaluation."""
    trained, evaluated = (
        linen_model(
            name, method, num_classes=3, train=train, dtype=x.dtype, width=width
        )
        for train in (True, False)
    )

    @jax.jit
    def run(params, stats, x, key):
        def loss(params):
            logits, updates = trained.apply(
                {"params": params, "batch_stats": stats},
                x,
                mutable=["batch_stats"],
                rngs={"sampling": key},
            )
            return (logits**2).mean(), updates.get("batch_stats", {})

        results = jax.value_and_grad(loss, has_aux=True)(params)
        variables = {"params": params, "batch_stats": stats}
        return *results, evaluated.apply(variables, x)

    return run(*random_variables(trained, x), x, jax.random.key(1))


def nnx_results(name, method, x, width):
    """Returns the gradients, and the logits of an evaluation."""

    @jax.jit
    def run(key, x):
        model = nnx_model(
            name,
            method,
            in_shape=x.shape[1:],
            num_classes=3,
            width=width,
            rngs=nnx.Rngs(key),
        )
        grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
        model.eval()
        return grads, model(x)

    return run(jax.random.key(1), x)


@pytest.mark.parametrize(
    ("name", "label"),
    [("resnet8", label) for label in ("flax", "gn", "none")]
    + [("mlp", label) for label in METHODS],
)
def test_every_method_trains_and_evaluates_in_linen(name, label) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    (loss, stats), grads, logits = linen_results(name, METHODS[label], x, width=16)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
    assert all(np.isfinite(s).all() and s.any() for s in jax.tree.leaves(stats))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "label"), [("resnet8", "folded"), ("mlp", "none"), ("mlp", "folded")]
)
def test_every_method_trains_and_evaluates_in_nnx(name, label) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    grads, logits = nnx_results(name, METHODS[label], x, width=16)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "sampler",
    [sbn.BatchSampling(4), sbn.FeatureSampling(1 / 4), sbn.LatticeSampling(4, 16)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_folding_changes_neither_loss_nor_gradients(x64, sampler) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3), jnp.float64)
    ((loss, stats), grads, logits), ((folded_loss, folded_stats), *folded) = (
        linen_results("resnet8", method, x, width=4)
        for method in (
            Method("sampled", sampler=sampler),
            Method("sampled", sampler=sampler, folded=True),
        )
    )
    assert_close = chex.assert_trees_all_close
    assert_close(folded_loss, loss, rtol=1e-6)  # logits are float32
    assert_close(folded[0], grads, rtol=1e-9, atol=1e-12)
    assert_close(folded_stats, stats, rtol=1e-9)
    assert_close(folded[1], logits, rtol=1e-6)


def test_shortcuts_of_the_small_networks_are_strided_identities() -> None:
    from models.cifar_resnet import _shortcut

    x = jnp.arange(2 * 5 * 4 * 3.0).reshape(2, 5, 4, 3)
    y = _shortcut(6, 2)(x)
    np.testing.assert_array_equal(y[..., :3], x[:, ::2, ::2])
    assert not y[..., 3:].any()


def test_what_a_model_cannot_do_is_told() -> None:
    with pytest.raises(ValueError, match="at least 32 x 32"):
        linen_shapes("densenet121", METHODS["flax"], (2, 8, 8, 1))
    with pytest.raises(ValueError, match="nnx models"):
        nnx_model(
            "resnet50",
            METHODS["flax"],
            in_shape=(32, 32, 3),
            num_classes=10,
            rngs=nnx.Rngs(0),
        )
