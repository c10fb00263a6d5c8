"""Every sampler and layer lowers for GPUs and TPUs, forward and gradient."""

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests import cases
from tests.samples import KEY

pytestmark = pytest.mark.optimized

SHAPE = cases.SHAPES[4]
SAMPLERS = {"all": None, **cases.SAMPLERS}


def function(sampler, dtype):
    """Output and statistics of the pure function."""

    def train(x, key):
        return sbn.batch_norm(x, jnp.ones(3), sampler=sampler, key=key, dtype=dtype)

    return train


def linen(sampler, dtype):
    """Output and updated statistics of the linen layer."""
    layer = sbn.linen.BatchNorm(use_running_average=False, sampler=sampler, dtype=dtype)

    def train(x, key):
        variables = layer.init(key, x)
        return layer.apply(
            variables, x, mutable=["batch_stats"], rngs={"sampling": key}
        )

    return train


def nnx_layer(sampler, dtype):
    """Output and updated statistics of the nnx layer."""

    def train(x, key):
        rngs = nnx.Rngs(params=0, sampling=key)
        layer = sbn.nnx.BatchNorm(3, sampler=sampler, dtype=dtype, rngs=rngs)
        return layer(x), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return train


def linen_conv(sampler, dtype):
    """Output and updated statistics of a folded convolution, with a residual."""
    layer = sbn.linen.ConvNorm(
        3,
        (3, 3),
        use_running_average=False,
        sampler=sampler,
        dtype=dtype,
        activation=sbn.relu,
    )

    def train(x, key):
        variables = layer.init(key, x)
        return layer.apply(
            variables, x, x, mutable=["batch_stats"], rngs={"sampling": key}
        )

    return train


def nnx_dense(sampler, dtype):
    """Output and updated statistics of a folded dense layer."""

    def train(x, key):
        rngs = nnx.Rngs(params=0, sampling=key)
        layer = sbn.nnx.DenseNorm(3, 3, sampler=sampler, dtype=dtype, rngs=rngs)
        return layer(x), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return train


@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        name=list(SAMPLERS),
        train=[function, linen, nnx_layer, linen_conv, nnx_dense],
        dtype=["float32", "bfloat16"],
    ),
    ids=lambda case: "-".join(getattr(v, "__name__", str(v)) for v in case.values()),
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_training_lowers(case, platform):
    train = case["train"](SAMPLERS[case["name"]], case["dtype"])

    def loss(x, key):
        y, statistics = train(x, key)
        return (y.astype(jnp.float32) ** 2).sum(), statistics

    def step(x, key_data):
        key = jax.random.wrap_key_data(key_data)
        return train(x, key), jax.value_and_grad(loss, has_aux=True)(x, key)

    x = jax.ShapeDtypeStruct(SHAPE, case["dtype"])
    exported = jax.export.export(jax.jit(step), platforms=[platform])(
        x, jax.random.key_data(KEY)
    )
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == SHAPE
    program = exported.mlir_module()
    assert "stablehlo.scatter" not in program
    # Fixed positions are slices.
    if case["name"] == "lattice":
        assert "stablehlo.gather" not in program
