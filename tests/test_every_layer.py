"""What all layers do: copy, tabulate, capture calls, switch modes, keep statistics."""

import contextlib
import copy
import inspect
import pickle

import chex
import cloudpickle
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases

KEY = jax.random.key(0)
X = cases.inputs((4, 3, 2, 3))
SAMPLERS = {"all": None, "BS": sbn.BatchSampling(2), "lattice": sbn.LatticeSampling(1)}
NAMES = [
    name
    for name in sbn.linen.__all__
    if inspect.isclass(cls := getattr(sbn.linen, name)) and issubclass(cls, nn.Module)
]
STATELESS = {
    *("BatchlessNorm", "CenteredConv", "FilterResponseNorm", "NormFreeBlock"),
    *("TLU", "WSConv", "WSDense"),
}
# Positional arguments; in nnx after the number of input features.
ARGUMENTS = {
    **dict.fromkeys(["CenteredConv", "ConvNorm", "WSConv"], (3, (3, 3))),
    **dict.fromkeys(["DenseNorm", "NormFreeBlock", "WSDense"], (3,)),
    "Shade": (1e-3,),
}
RELU = {"activation": nn.relu}
OPTIONS = {"ConvNorm": RELU, "DenseNorm": RELU}
COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "cloudpickle": lambda layer: cloudpickle.loads(cloudpickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
}


def takes_sampler(name):
    return name == "KalmanNorm" or hasattr(getattr(sbn.linen, name), "sampler")


CASES = [
    (name, sampler)
    for name in NAMES
    for sampler in (SAMPLERS if takes_sampler(name) else ["all"])
]


def options_of(name, sampler):
    chosen = (cases.SAMPLERS | SAMPLERS)[sampler]
    sampled = {"sampler": chosen} if takes_sampler(name) else {}
    return OPTIONS.get(name, {}) | sampled


def linen(name, sampler):
    cls, options = getattr(sbn.linen, name), options_of(name, sampler)
    # Flax's own default cannot be pickled.
    init = {"kernel_init": nn.initializers.ones}
    if name == "KalmanNorm":
        conv = nn.Conv(3, (1, 1), use_bias=False, **init)
        return cls(conv, sbn.linen.BatchNorm(**options))
    if hasattr(cls, "kernel_init"):
        options |= init
    return cls(*ARGUMENTS.get(name, ()), **options)


def nnx_layer(name, sampler, **more):
    cls, options = getattr(sbn.nnx, name), options_of(name, sampler) | more
    rngs = nnx.Rngs(0)
    if name == "KalmanNorm":
        conv = nnx.Conv(3, 3, (1, 1), use_bias=False, rngs=rngs)
        return cls(conv, sbn.nnx.BatchNorm(3, rngs=rngs, **options), rngs=rngs)
    if name != "Shade":
        options["rngs"] = rngs
    return cls(3, *ARGUMENTS.get(name, ()), **options)


def inputs(name):
    statistics = sbn.Statistics(jnp.zeros(3), jnp.ones(3))
    return (X, statistics) if name == "KalmanNorm" else (X,)


def mode(name, train):
    """The argument that switches between training and evaluation, if there is one."""
    call = inspect.signature(getattr(sbn.linen, name).__call__)
    known = "use_running_average" in call.parameters
    return {"use_running_average": not train} if known else {}


def apply(layer, name, variables, *, train, **options):
    """Only traced."""
    return jax.eval_shape(
        lambda variables: layer.apply(
            variables,
            *inputs(name),
            **mode(name, train),
            rngs={"sampling": KEY, "dropout": KEY},
            **options,
        ),
        variables,
    )


def init(layer, name):
    return jax.eval_shape(
        lambda: layer.init(KEY, *inputs(name), **mode(name, train=True))
    )


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_copied_linen_layer_is_equal(name, sampler, how):
    layer = linen(name, sampler)
    assert COPIES[how](layer) == layer


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_call_of_a_linen_layer_is_captured_once(name, sampler, train):
    layer, methods = linen(name, sampler), []

    def note(call, args, kwargs, context):
        if not context.module.path:
            methods.append(context.method_name)
        return call(*args, **kwargs)

    variables = init(layer, name)
    with nn.intercept_methods(note):
        _, updates = apply(
            *(layer, name, variables),
            train=train,
            mutable=["batch_stats", "intermediates", "losses"],
            capture_intermediates=True,
        )
    assert methods == ["__call__"]
    assert len(updates["intermediates"]["__call__"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_linen_layer_is_tabulated_once(name):
    table = linen(name, "all").tabulate(
        KEY,
        *inputs(name),
        **mode(name, train=True),
        console_kwargs={"force_terminal": False, "width": 200},
    )
    assert table.count(f" {name} ") == 2  # the title, and one row


@pytest.mark.parametrize(
    ("name", "sampler"), [case for case in CASES if case[0] not in STATELESS]
)
def test_a_linen_layer_evaluates_only_with_statistics(name, sampler):
    layer = linen(name, sampler)
    variables = init(layer, name)
    apply(layer, name, variables, train=False)
    del variables["batch_stats"]
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="batch_stats"):
        apply(layer, name, variables, train=False)


@pytest.mark.parametrize(
    ("name", "sampler"), [case for case in CASES if case[0] not in STATELESS]
)
def test_statistics_of_a_linen_layer_that_are_not_mutable_raise_flax_error(
    name, sampler
):
    layer = linen(name, sampler)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        apply(layer, name, init(layer, name), train=True)


# Those whose mode and dtypes may be given to the constructor.
OWN = [
    (name, sampler)
    for name, sampler in CASES
    if name not in STATELESS and hasattr(getattr(sbn.linen, name), "dtype")
]


@pytest.mark.parametrize(("name", "sampler"), OWN)
def test_the_mode_of_a_layer_is_given_once(name, sampler):
    never = linen(name, sampler)
    variables, rngs = init(never, name), {"sampling": KEY, "dropout": KEY}

    def call(layer, **mode):
        return layer.apply(variables, X, mutable=["batch_stats"], rngs=rngs, **mode)

    with pytest.raises(ValueError, match="use_running_average"):
        jax.eval_shape(lambda: call(never))
    twice = never.clone(use_running_average=False)
    with pytest.raises(ValueError, match="use_running_average"):
        jax.eval_shape(lambda: call(twice, use_running_average=False))
    never = nnx_layer(name, sampler, use_running_average=None)
    if hasattr(never, "norm") or isinstance(never, nnx.BatchNorm):
        with pytest.raises(ValueError, match="use_running_average"):
            jax.eval_shape(lambda: never(X))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *OWN,
        *(("BatchNorm", name) for name in cases.SAMPLERS if name not in SAMPLERS),
    ],
)
def test_running_statistics_are_float32_in_half_precision(name, sampler):
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

    def by_linen(x):
        rngs = dict.fromkeys(["params", "sampling", "dropout"], KEY)
        layer = linen(name, sampler).clone(**half)
        variables = layer.init(rngs, x, **mode(name, train=True))
        return layer.apply(
            variables, x, mutable=["batch_stats"], rngs=rngs, **mode(name, train=True)
        )

    def by_nnx(x):
        layer = nnx_layer(name, sampler, **half)
        return layer(x), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    x = jax.ShapeDtypeStruct((16, *X.shape[1:]), jnp.bfloat16)
    for function in (by_linen, by_nnx):
        y, statistics = jax.eval_shape(function, x)
        assert y.dtype == jnp.bfloat16
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(statistics)}
        # Besides statistics there may be counters.
        assert jnp.dtype("float32") in dtypes
        assert dtypes <= {jnp.dtype("float32"), jnp.dtype("int32")}


def state(layer):
    """The numbers of a layer, keys as numbers as well."""
    return jax.tree.map(
        lambda v: (
            jax.random.key_data(v)
            if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
            else v
        ),
        nnx.to_pure_dict(nnx.state(layer)),
    )


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_copied_nnx_layer_is_equal(name, sampler, how):
    layer = nnx_layer(name, sampler)
    copied = COPIES[how](layer)
    assert nnx.graphdef(copied) == nnx.graphdef(layer)
    chex.assert_trees_all_equal(state(copied), state(layer))


class Model(nnx.Module):
    """A layer beside those of flax that layers derive from."""

    def __init__(self, layer):
        self.layer, rngs = layer, nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.conv = nnx.Conv(3, 3, (1, 1), rngs=rngs)
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, *args):
        return self.layer(*args)


@contextlib.contextmanager
def unchanged_classes(model):
    """Takes away what nnx.tabulate leaves in them, on which nnx.capture recurses."""
    nodes = (node for _, node in nnx.iter_graph(model))
    classes = {type(node) for node in nodes if isinstance(node, nnx.Pytree)}
    before = {cls: {*vars(cls)} for cls in classes}
    yield
    for cls, names in before.items():
        for name in {*vars(cls)} - names:
            delattr(cls, name)


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_an_nnx_layer_is_tabulated_once(name, sampler):
    model, tables = Model(nnx_layer(name, sampler)), []

    def traced(*args):
        options = {"force_terminal": False, "width": 200}
        tables.append(nnx.tabulate(model, *args, console_kwargs=options))

    with unchanged_classes(model):
        jax.eval_shape(traced, *inputs(name))
    rows = [line.split("│") for line in tables[0].splitlines() if "│" in line]
    assert [row[2].strip() for row in rows if row[1].strip() == "layer"] == [name]


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_a_call_of_an_nnx_layer_is_captured_once(name, sampler):
    model, kind = Model(nnx_layer(name, sampler)), nnx.Intermediate
    _, captured = nnx.capture(model, kind, method_outputs=kind)(*inputs(name))
    calls = {
        path[1:]: len(outputs.get_value())
        for path, outputs in nnx.to_flat_state(captured)
        if path[0] == "layer" and len(path) == 2
    }
    # Flax leaves out what a class inherits.
    own = "__call__" in vars(type(model.layer))
    assert calls == ({("__call__",): 1} if own else {})


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", cases.SAMPLERS)
def test_a_copied_sampler_is_equal(name, how):
    assert COPIES[how](cases.SAMPLERS[name]) == cases.SAMPLERS[name]
