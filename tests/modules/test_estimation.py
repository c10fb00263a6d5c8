"""Statistics after training, against those of all data in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from harness.methods import parse_method
from models import linen_model, nnx_model
from tests import cases, reference
from tests.closeness import assert_close, tolerance
from tests.samples import KEY

FEATURES = 3
SIZES = (32, 16, 8)
SHIFTS = (0.0, 3.0, -5.0)
BATCHES = [
    np.asarray(shift + cases.inputs((size, 4, 4, FEATURES), seed=size))
    for size, shift in zip(SIZES, SHIFTS, strict=True)
]
KERNEL = cases.inputs((FEATURES, FEATURES), seed=1)
NUM = sum(SIZES) * 16
BS = sbn.BatchSampling(4)


def moments(x, where=True):
    return reference.moments(x, np.broadcast_to(where, x.shape))


def normalized(x):
    return reference.normalize(x, *moments(x), np.ones(FEATURES), np.zeros(FEATURES))


def assert_measured(statistics, x, num=NUM, where=True):
    for actual, expected in zip(statistics, moments(x, where), strict=True):
        assert_close(actual, expected, num=num)


RNGS = {"params": KEY, "sampling": KEY, "dropout": KEY}


def linen_estimate(model, batches=BATCHES, variables=None, **options):
    """Returns the statistics of all norms."""
    variables = variables or model.init(RNGS, batches[0])
    new = sbn.linen.estimate_statistics(model, variables, batches, rngs=RNGS, **options)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    stats = flatten_dict(new["batch_stats"])
    return [
        (stats[*path[:-1], "mean"], var)
        for path, var in stats.items()
        if path[-1] == "var"
    ]


def nnx_estimate(model, batches=BATCHES, **options):
    sbn.nnx.estimate_statistics(model, batches, **options)
    return [
        (norm.mean[...], norm.var[...])
        for _, norm in nnx.iter_modules(model)
        if isinstance(norm, nnx.BatchNorm)
    ]


OPTIONS = {
    "all": {},
    "BS": {"sampler": BS},
    "lattice": {"sampler": sbn.LatticeSampling(2, min_values=1)},
    "moved": {"sampler": BS, "running_weight": 0.75},
    "ghost": {"ghost_groups": 2},
}
OTHERS = ["BatchRenorm", "DiminishingBatchNorm", "IC", "BNET"]


def linen_norms():
    yield "flax", nn.BatchNorm(use_running_average=False)
    for name, options in OPTIONS.items():
        yield name, sbn.linen.BatchNorm(use_running_average=False, **options)
    for name in OTHERS:
        yield name, getattr(sbn.linen, name)(use_running_average=False, sampler=BS)
    for transform in (nn.remat, nn.jit):
        for cls in (nn.BatchNorm, sbn.linen.BatchRenorm):
            name = f"{transform.__name__}-{cls.__name__}"
            yield name, transform(cls)(use_running_average=False)


def nnx_norms():
    yield "flax", nnx.BatchNorm
    for name, options in OPTIONS.items():
        yield name, functools.partial(sbn.nnx.BatchNorm, **options)
    for name in OTHERS:
        yield name, functools.partial(getattr(sbn.nnx, name), sampler=BS)


NORMS = [
    *(pytest.param(linen_estimate, m, id=f"linen-{n}") for n, m in linen_norms()),
    *(
        pytest.param(nnx_estimate, functools.partial(make, FEATURES), id=f"nnx-{name}")
        for name, make in nnx_norms()
    ),
]


def made(model):
    """Returns a model; nnx ones anew, because they are changed in place."""
    return model if isinstance(model, nn.Module) else model(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("estimate", "model"), NORMS)
def test_statistics_are_those_of_all_data(estimate, model):
    (statistics,) = estimate(made(model))
    assert_measured(statistics, np.concatenate(BATCHES))


def folded_layers():
    norms = [("BatchNorm", name) for name in ("all", "BS", "lattice")]
    for norm, sampler in [*norms, ("BatchRenorm", "BS")]:
        for layer, window in (("ConvNorm", [(1, 1)]), ("DenseNorm", [])):
            options = {
                "kernel_init": lambda _, shape, dtype: KERNEL.reshape(shape),
                **OPTIONS[sampler],
            }
            name = f"{layer}-{norm}-{sampler}"
            linen = getattr(sbn.linen, layer)(
                FEATURES,
                *window,
                use_running_average=False,
                norm_cls=getattr(sbn.linen, norm),
                **options,
            )
            yield pytest.param(linen_estimate, linen, id=f"linen-{name}")
            make = functools.partial(
                getattr(sbn.nnx, layer),
                FEATURES,
                FEATURES,
                *window,
                norm_cls=getattr(sbn.nnx, norm),
                **options,
            )
            yield pytest.param(nnx_estimate, make, id=f"nnx-{name}")


@pytest.mark.parametrize(("estimate", "model"), [*folded_layers()])
def test_folded_layers_are_measured_behind_the_linear_layer(estimate, model):
    (statistics,) = estimate(made(model))
    y = reference.wide(np.concatenate(BATCHES)) @ reference.wide(KERNEL)
    assert_measured(statistics, y, num=NUM * FEATURES)


class Two(nn.Module):
    """Two norms: the second sees what the first makes of each batch."""

    evaluate_first: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=self.evaluate_first or not train)(x)
        return sbn.linen.BatchNorm(use_running_average=not train, sampler=BS)(x**2)


class NNXTwo(nnx.Module):
    def __init__(self, rngs, evaluate_first=False):
        self.first = nnx.BatchNorm(
            FEATURES, use_running_average=evaluate_first, rngs=rngs
        )
        self.second = sbn.nnx.BatchNorm(FEATURES, sampler=BS, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x) ** 2)


TWO = pytest.mark.parametrize(
    ("estimate", "model"),
    [(linen_estimate, Two), (nnx_estimate, functools.partial(NNXTwo, nnx.Rngs(0)))],
)


@TWO
def test_each_layer_sees_what_it_sees_in_training(estimate, model):
    first, second = estimate(model())
    assert_measured(first, np.concatenate(BATCHES))
    assert_measured(second, np.concatenate([normalized(x) ** 2 for x in BATCHES]))


@TWO
def test_frozen_norms_stay_and_normalize_as_they_do(estimate, model):
    first, second = estimate(model(evaluate_first=True))
    np.testing.assert_array_equal(first, [[0.0] * FEATURES, [1.0] * FEATURES])
    x = np.concatenate(BATCHES) / np.sqrt(1 + 1e-5)
    assert_measured(second, reference.wide(x) ** 2)


IMAGES = cases.inputs((8, 32, 32, 3), seed=3)
SMALL = {"num_classes": 4, "width": 4}
METHODS = pytest.mark.parametrize("name", ["flax", "bn"])


@METHODS
def test_linen_networks_evaluate_a_batch_as_they_train_on_it(name):
    method = parse_method(name)
    training, evaluating = (
        linen_model("resnet8", method, train=train, **SMALL) for train in (True, False)
    )
    variables = evaluating.init(KEY, IMAGES)
    expected, _ = training.apply(variables, IMAGES, mutable=["batch_stats"])
    new = sbn.linen.estimate_statistics(training, variables, [IMAGES])
    assert_close(evaluating.apply(new, IMAGES), np.asarray(expected), num=1000)


@METHODS
def test_nnx_networks_evaluate_a_batch_as_they_train_on_it(name):
    model = nnx_model(
        "resnet8",
        parse_method(name),
        in_shape=IMAGES.shape[1:],
        rngs=nnx.Rngs(0),
        **SMALL,
    )
    model.train()
    expected = nnx.clone(model)(IMAGES)
    sbn.nnx.estimate_statistics(model, [IMAGES])
    model.eval()
    assert_close(model(IMAGES), np.asarray(expected), num=1000)


class Others(nn.Module):
    """Layers with state, of which one is to be measured."""

    @nn.compact
    def __call__(self, x, train=True):
        options = {"use_running_average": not train}
        x = sbn.linen.MixtureNorm(**options)(x)
        x = sbn.linen.MovingAverageBatchNorm(**options)(x)
        x, _ = sbn.linen.KalmanNorm(
            nn.Conv(FEATURES, (1, 1), use_bias=False), sbn.linen.BatchNorm(not train)
        )(x, None)
        return sbn.linen.BatchRenorm(**options, name="measured")(x)


class NNXOthers(nnx.Module):
    def __init__(self, rngs):
        conv = nnx.Conv(FEATURES, FEATURES, (1, 1), use_bias=False, rngs=rngs)
        norm = sbn.nnx.BatchNorm(FEATURES, rngs=rngs)
        self.mixture = sbn.nnx.MixtureNorm(FEATURES, rngs=rngs)
        self.moving = sbn.nnx.MovingAverageBatchNorm(FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.kalman = sbn.nnx.KalmanNorm(conv, norm, rngs=rngs)
        self.measured = sbn.nnx.BatchRenorm(FEATURES, sampler=BS, rngs=rngs)

    def __call__(self, x):
        x, _ = self.kalman(self.dropout(self.moving(self.mixture(x))), None)
        return self.measured(x)


def assert_only_measured_changed(before, after):
    changed = {
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before),
            jax.tree.leaves(after),
            strict=True,
        )
        if not (old == new).all()
    }
    assert len(changed) == 2
    assert all("measured" in name for name in changed)
    assert all("mean" in name or "var" in name for name in changed)


def test_linen_leaves_all_else_as_it_is():
    variables = Others().init(KEY, BATCHES[0])
    kept = jax.tree.map(jnp.copy, variables)
    new = sbn.linen.estimate_statistics(Others(), variables, BATCHES)
    assert_only_measured_changed(variables, new)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


def test_nnx_leaves_all_else_as_it_is():
    model = NNXOthers(nnx.Rngs(0))
    graph, before = nnx.split(model)
    before = jax.tree.map(jnp.copy, before)
    sbn.nnx.estimate_statistics(model, BATCHES)
    assert nnx.graphdef(model) == graph
    assert_only_measured_changed(before, nnx.state(model))


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(self.make_rng("dropout"), (1, FEATURES))
        return nn.BatchNorm(use_running_average=False)(jnp.tile(noise, (len(x), 1)))


class NNXNoise(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        noise = jax.random.normal(self.rngs.dropout(), (1, FEATURES))
        return self.norm(jnp.tile(noise, (len(x), 1)))


@pytest.mark.parametrize(
    ("estimate", "model"),
    [(linen_estimate, Noise()), (nnx_estimate, NNXNoise(nnx.Rngs(0)))],
)
def test_every_batch_draws_anew(estimate, model):
    # Within a batch the values are the same: only between batches they vary.
    ((_, var),) = estimate(model, [np.ones((4, FEATURES))] * 8)
    assert (var > 0.05).all()


class Twice(nn.Module):
    def setup(self):
        self.norm = sbn.linen.BatchNorm(use_running_average=False, sampler=BS)

    def __call__(self, x):
        return self.norm(x) + self.norm(2 * x)


class NNXTwice(nnx.Module):
    def __init__(self, rngs):
        self.norm = sbn.nnx.BatchNorm(FEATURES, sampler=BS, rngs=rngs)

    def __call__(self, x):
        return self.norm(x) + self.norm(2 * x)


@pytest.mark.parametrize(
    ("estimate", "model"),
    [(linen_estimate, Twice()), (nnx_estimate, NNXTwice(nnx.Rngs(0)))],
)
def test_a_layer_called_twice_has_the_statistics_of_both_inputs(estimate, model):
    (statistics,) = estimate(model)
    x = np.concatenate(BATCHES)
    assert_measured(statistics, np.concatenate([x, 2 * x]), num=2 * NUM)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        options = {"use_running_average": False, "sampler": BS}
        layer = sbn.linen.ConvNorm(
            FEATURES,
            (1, 1),
            kernel_init=lambda _, shape, dtype: KERNEL.reshape(shape),
            **options,
        )
        return x + layer(x), None


class NNXScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return sbn.nnx.ConvNorm(
                FEATURES,
                FEATURES,
                (1, 1),
                kernel_init=lambda _, shape, dtype: KERNEL.reshape(shape),
                norm_scale=False,
                norm_bias=False,
                rngs=rngs,
            )

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def each(layer, x):
            return x + layer(x)

        return each(self.layers, x)


def scanned_inputs():
    """Returns the inputs of the norms of two scanned layers."""
    kernel = reference.wide(KERNEL)
    first = [reference.wide(x) @ kernel for x in BATCHES]
    second = [(x + normalized(y)) @ kernel for x, y in zip(BATCHES, first, strict=True)]
    return np.concatenate(first), np.concatenate(second)


def test_scanned_layers_have_statistics_each():
    inputs = scanned_inputs()
    model = NNXScanned(nnx.Rngs(0))
    ((mean, var),) = nnx_estimate(model)
    for i in range(2):
        assert_measured((mean[i], var[i]), inputs[i], num=NUM * FEATURES)

    axes = {"params": 0, "batch_stats": 0}
    split = {"params": True, "sampling": True}
    scanned = nn.scan(Body, variable_axes=axes, split_rngs=split, length=2)()
    estimate = functools.partial(sbn.linen.estimate_statistics, scanned)
    variables = scanned.init(KEY, BATCHES[0], None)
    stats = estimate(variables, BATCHES, None, rngs={"sampling": KEY})["batch_stats"]
    mean, var = stats["ConvNorm_0"]["norm"]["mean"], stats["ConvNorm_0"]["norm"]["var"]
    assert mean.shape == (2, FEATURES)
    # The second layer sees what a sample made: only the first is known.
    assert_measured((mean[0], var[0]), inputs[0], num=NUM * FEATURES)
    assert (mean[1] != 0).all()


def test_a_layer_scanned_over_steps_has_the_statistics_of_all():
    options = {
        "variable_broadcast": "params",
        "variable_carry": "batch_stats",
        "split_rngs": {"params": False},
        "length": 2,
    }

    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            nn.BatchNorm(use_running_average=False)(x)
            return 2 * x, None

    ((mean, var),) = linen_estimate(
        nn.scan(Doubled, **options)(),
        variables=Doubled().init(KEY, BATCHES[0], None),
        method=lambda model, x: model(x, None),
    )
    x = np.concatenate(BATCHES)
    assert_measured((mean, var), np.concatenate([x, 2 * x]), num=2 * NUM)


@pytest.mark.parametrize("cls", [nn.BatchNorm, sbn.linen.BatchRenorm])
def test_mapped_norms_have_statistics_each(cls):
    axes = {"params": None, "batch_stats": 0}
    mapped = nn.vmap(cls, variable_axes=axes, split_rngs={"params": False})
    batches = [np.stack([x, 2 * x]) for x in BATCHES]
    ((mean, var),) = linen_estimate(mapped(use_running_average=False), batches)
    for i in range(2):
        assert_measured((mean[i], var[i]), (1 + i) * np.concatenate(BATCHES))


@pytest.mark.parametrize("cls", [nn.BatchNorm, sbn.linen.BatchRenorm])
def test_mapped_norms_with_a_name_pool_what_they_measure(cls):
    axes = {"params": None, "batch_stats": None}
    mapped = nn.vmap(
        cls, variable_axes=axes, split_rngs={"params": False}, axis_name="parts"
    )
    batches = [np.stack([x[: len(x) // 2], 3 + x[len(x) // 2 :]]) for x in BATCHES]
    model = mapped(use_running_average=False, axis_name="parts")
    (statistics,) = linen_estimate(model, batches)
    x = np.concatenate([batch.reshape(-1, *batch.shape[2:]) for batch in batches])
    assert_measured(statistics, x)


def test_a_batch_on_several_devices_is_measured_as_a_whole():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in BATCHES]
        model = sbn.linen.BatchNorm(use_running_average=False, sampler=BS)
        variables = model.init(KEY, BATCHES[0])
        (statistics,) = linen_estimate(model, batches, variables)
    assert_measured(statistics, np.concatenate(BATCHES))


def derived(api, base):
    """Returns a norm that is called otherwise, and doubles its input."""
    compact = nn.compact if api is nn else lambda f: f

    class Derived(base):
        @compact
        def __call__(self, x, doubled):
            return super().__call__(2 * x if doubled else x)

    return Derived


@pytest.mark.parametrize(
    ("estimate", "model"),
    [
        *(
            (linen_estimate, derived(nn, base)(use_running_average=False))
            for base in (nn.BatchNorm, sbn.linen.BatchNorm, sbn.linen.BatchRenorm)
        ),
        *(
            (nnx_estimate, derived(nnx, base)(FEATURES, rngs=nnx.Rngs(0)))
            for base in (nnx.BatchNorm, sbn.nnx.BatchNorm, sbn.nnx.BatchRenorm)
        ),
    ],
)
def test_derived_norms_are_measured_where_they_call_ours(estimate, model):
    variables = {}
    if isinstance(model, nn.Module):
        variables["variables"] = model.init(KEY, BATCHES[0], True)
    (statistics,) = estimate(model, method=lambda norm, x: norm(x, True), **variables)
    assert_measured(statistics, 2 * np.concatenate(BATCHES))


def masked(x):
    return (
        jnp.arange(4)[None, None, :, None]
        < 1 + jnp.arange(len(x))[:, None, None, None] % 4
    )


@pytest.mark.parametrize(
    ("estimate", "model"),
    [
        (linen_estimate, sbn.linen.BatchNorm(use_running_average=False)),
        (nnx_estimate, nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))),
    ],
)
def test_what_is_masked_is_not_measured(estimate, model):
    (statistics,) = estimate(model, method=lambda norm, x: norm(x, mask=masked(x)))
    where = np.concatenate([np.broadcast_to(masked(x), x.shape) for x in BATCHES])
    assert_measured(statistics, np.concatenate(BATCHES), where=where)


def test_a_feature_of_which_nothing_was_measured_keeps_its_statistics():
    model = sbn.linen.BatchNorm(use_running_average=False, sampler=BS)
    variables = model.init(KEY, BATCHES[0])
    variables["batch_stats"] = {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 9.0)}
    ((mean, var),) = linen_estimate(
        model,
        variables=variables,
        method=lambda norm, x: norm(x, mask=jnp.arange(3) > 0),
    )
    assert (mean[0], var[0]) == (7, 9)
    x = np.concatenate(BATCHES)
    assert_measured((mean[1:], var[1:]), x[..., 1:])


@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_many_batches_are_as_exact_as_one(mean):
    sizes = 16 + np.arange(300) % 2
    x = np.float32(mean + cases.inputs((sizes.sum(), FEATURES)))
    batches = np.split(x, sizes.cumsum()[:-1])
    spacing = np.spacing(x.max())
    exact_mean, exact_var = moments(x)
    ((mean, var),) = linen_estimate(nn.BatchNorm(use_running_average=False), batches)
    np.testing.assert_allclose(mean, exact_mean, rtol=0, atol=spacing)
    atol = spacing + tolerance(exact_var, num=len(batches))
    np.testing.assert_allclose(var, exact_var, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "float64"])
def test_every_dtype_is_measured_in_float32_or_wider(dtype, x64):
    batches = [cases.inputs((n, 4, 2), dtype, seed=n) for n in SIZES]
    ((mean, var),) = linen_estimate(nn.BatchNorm(use_running_average=False), batches)
    assert mean.dtype == ("complex64" if dtype == "complex64" else "float32")
    assert var.dtype == "float32"
    # The running statistics are those of flax: float32 also where x is wider.
    assert_measured((mean, var), np.concatenate(batches), num=4 * sum(SIZES))


def test_features_may_be_first():
    model = sbn.linen.BatchNorm(use_running_average=False, axis=1)
    (statistics,) = linen_estimate(model, [np.moveaxis(x, -1, 1) for x in BATCHES])
    assert_measured(statistics, np.concatenate(BATCHES))


@pytest.mark.parametrize("name", ["L1BatchNorm", "RangeBatchNorm"])
def test_other_measures_of_spread_are_pooled_as_between_devices(name):
    options = {"use_running_average": False, "momentum": 0.0}
    model = getattr(sbn.linen, name)(**options)
    variables = model.init(KEY, BATCHES[0])
    each = [
        model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
        for x in BATCHES
    ]
    shares = [size / sum(SIZES) for size in SIZES]
    mean, var = reference.mix([(s["mean"], s["var"]) for s in each], shares)
    ((actual_mean, actual_var),) = linen_estimate(model)
    assert_close(actual_mean, mean, num=NUM)
    assert_close(actual_var, var, num=NUM)


def test_metadata_of_linen_variables_stays():
    model = nn.BatchNorm(use_running_average=False)
    variables = model.init(KEY, BATCHES[0])
    variables["batch_stats"]["mean"] = nn.Partitioned(jnp.zeros(FEATURES), ("c",))
    new = sbn.linen.estimate_statistics(model, variables, BATCHES)["batch_stats"]
    assert new["mean"].names == ("c",)
    assert_measured((new["mean"].value, new["var"]), np.concatenate(BATCHES))


def test_one_value_is_measured_and_empty_dicts_of_linen_stay():
    model = nn.BatchNorm(use_running_average=False)
    x = np.full((1, FEATURES), 3.0, np.float32)
    variables = model.init(KEY, x)
    variables["batch_stats"]["others"] = {}
    new = sbn.linen.estimate_statistics(model, variables, [x])["batch_stats"]
    assert new.keys() == variables["batch_stats"].keys()
    np.testing.assert_array_equal(new["mean"], x[0])
    np.testing.assert_array_equal(new["var"], 0)


def linen_call(batches=BATCHES, model=None, variables=None, **options):
    model = model or Two()
    variables = variables or model.init(KEY, BATCHES[0])
    options = {"rngs": {"sampling": KEY}, **options}
    return sbn.linen.estimate_statistics(model, variables, batches, **options)


def nnx_call(batches=BATCHES, model=None):
    sbn.nnx.estimate_statistics(model or NNXTwo(nnx.Rngs(0)), batches)


BOTH = pytest.mark.parametrize("call", [linen_call, nnx_call])


@BOTH
def test_an_array_is_no_iterable_of_batches(call):
    with pytest.raises(TypeError, match=r"got an array of shape.*Pass \[x\]"):
        call(BATCHES[0])


@BOTH
def test_no_batches_are_an_error(call):
    with pytest.raises(ValueError, match=r"at least one batch, got none.*new one"):
        call(iter(()))


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_is_an_error_that_names_the_layer(call, bad):
    batches = [BATCHES[0], BATCHES[1].copy()]
    batches[1][0, 0, 0, 1] = bad
    with pytest.raises(ValueError, match=r"finite.*in 2 of 2: .*(first|BatchNorm_0)"):
        call(batches)


def evaluated():
    model = NNXTwo(nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.parametrize(
    ("call", "num"),
    [
        (lambda: linen_call(method=lambda model, x: model(x, train=False)), 2),
        (lambda: linen_call(model=nn.Dense(2)), 0),
        (lambda: nnx_call(model=evaluated()), 2),
        (lambda: nnx_call(model=nnx.Linear(FEATURES, 2, rngs=nnx.Rngs(0))), 0),
    ],
)
def test_a_model_that_measures_nothing_is_an_error(call, num):
    with pytest.raises(ValueError, match=rf"of {num} with running.*train=True"):
        call()


def test_linen_variables_without_statistics_are_an_error_that_names_the_layer():
    params = Two().init(KEY, BATCHES[0])["params"]
    with pytest.raises(ValueError, match=r"got none in layer BatchNorm_0\. Pass all"):
        linen_call(variables={"params": params})


def test_an_error_leaves_the_nnx_model_as_it_was():
    model = NNXTwo(nnx.Rngs(0))
    graph, before = nnx.split(model)
    before = jax.tree.map(jnp.copy, before)
    with pytest.raises(ValueError, match="finite"):
        nnx_call([np.full_like(BATCHES[0], np.nan)], model)
    assert nnx.graphdef(model) == graph
    jax.tree.map(
        lambda old, new: (
            np.testing.assert_array_equal(*map(np.asarray, (old, new)))
            if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
            else None
        ),
        before,
        nnx.state(model),
    )
