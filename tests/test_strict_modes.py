"""JAX's strict modes: nothing leans on implicit promotion of ranks or dtypes.

Ranks are not promoted in any test (see ``conftest.py``); here dtypes are not, either.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases

KEY = jax.random.key(0)
X = cases.inputs((16, 8, 8, 4))
FLAT = cases.inputs((16, 4))
NORMS = [
    "BNET",
    "BatchNorm",
    "BatchRenorm",
    "BatchlessNorm",
    "DiminishingBatchNorm",
    "FilterResponseNorm",
    "IC",
    "L1BatchNorm",
    "MixtureNorm",
    "MovingAverageBatchNorm",
    "RangeBatchNorm",
    "TLU",
]
# The arguments of layers in linen; in nnx the number of input features comes first.
LAYERS = {
    "CenteredConv": (4, (3, 3)),
    "ConvNorm": (4, (3, 3)),
    "DenseNorm": (4,),
    "NormFreeBlock": (4,),
    "WSConv": (4, (3, 3)),
    "WSDense": (4,),
}
SAMPLED = [
    "BatchNorm",
    "BatchRenorm",
    "DiminishingBatchNorm",
    "L1BatchNorm",
    "RangeBatchNorm",
]
CASES = (
    [(name, {}) for name in (*NORMS, *LAYERS)]
    + [(name, {"running_weight": 0.5}) for name in ("BatchNorm", "ConvNorm")]
    + [("BatchNorm", {"ghost_groups": 2})]
    + [
        (name, {"sampler": sampler})
        for name in ("ConvNorm", "DenseNorm", "BatchNorm")
        for sampler in cases.SAMPLERS.values()
    ]
    + [
        (name, {"sampler": cases.SAMPLERS["FS+VDN"], "norm_cls": norm})
        for name in ("ConvNorm", "DenseNorm")
        for norm in SAMPLED[1:]
    ]
)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def masks(layer, name):
    """No mask, and one if the layer takes it."""
    takes = "mask" in type(layer).__call__.__annotations__
    return [{}, {"mask": jnp.ones((16, 1, 1, 1), bool)}] if takes else [{}]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_linen_layers_train_and_evaluate(name, options):
    options = dict(options)
    if "norm_cls" in options:
        options["norm_cls"] = getattr(sbn.linen, options["norm_cls"])
    layer = getattr(sbn.linen, name)(*LAYERS.get(name, ()), **options)
    switch = hasattr(layer, "use_running_average")
    evaluation = {"use_running_average": True} if switch else {}
    training = {"use_running_average": False} if switch else {}
    variables = jax.eval_shape(lambda x: layer.init(KEY, x, **evaluation), X)
    params = variables.pop("params", {})
    rngs = {"sampling": KEY, "dropout": KEY}

    def train(params, x, rest, mask):
        y, state = layer.apply(
            {**rest, "params": params},
            x,
            mutable=True,
            rngs=rngs,
            **training,
            **mask,
        )
        return y.sum(), state

    for mask in masks(layer, name):
        step = jax.value_and_grad(train, (0, 1), has_aux=True)
        (loss, _), _ = jax.eval_shape(step, params, X, variables, mask)
        assert loss.dtype == jnp.float32
    variables["params"] = params
    jax.eval_shape(lambda v, x: layer.apply(v, x, **evaluation), variables, X)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_nnx_layers_train_and_evaluate(name, options):
    options = dict(options)
    if "norm_cls" in options:
        options["norm_cls"] = getattr(sbn.nnx, options["norm_cls"])
    cls, arguments = getattr(sbn.nnx, name), (4, *LAYERS.get(name, ()))
    layer = nnx.eval_shape(lambda: cls(*arguments, rngs=nnx.Rngs(0), **options))

    def train(layer, x, mask):
        return layer(x, **mask).sum()

    for mask in masks(layer, name):
        layer.train()
        nnx.eval_shape(nnx.grad(train, argnums=(0, 1)), layer, X, mask)
    layer.eval()
    nnx.eval_shape(lambda layer, x: layer(x), layer, X)
