"""Every error of the folded layers: its type, the given value and the fix."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_sbn as sbn
from tests.teaching import message_while_tracing

KEY = jax.random.key(0)
BS, NS, FS = sbn.BatchSampling(2), sbn.NaiveSampling(2), sbn.FeatureSampling(0.5)
FLAT, MAPS = (8, 3), (8, 5, 4, 3)
RESIDUAL = jnp.ones((8, 3, 2, 6))
MOMENTS = sbn.Statistics(jnp.ones(3), jnp.ones(6))


class Every:
    """Positions that are neither windows nor a lattice, and their sampler."""

    needs_key = False

    def parts(self, shape, key):
        return (sbn.Part(1.0, (self,)),)

    def sampled_shape(self, shape):
        return shape

    def take(self, x, axes):
        return x


def conv(window=(3, 3), features=6, **options):
    kernel = jnp.ones((*window, 3, features))
    options = {"sampler": NS, **options}
    return lambda x: sbn.conv_norm(x, kernel, **options)


def dense(shape=(3, 6), **options):
    options = {"sampler": NS, **options}
    return lambda x: sbn.dense_norm(x, jnp.ones(shape), **options)


def linen(*args, train=True, **options):
    options = {"sampler": NS, **options}
    layer = sbn.linen.ConvNorm(6, (3, 3), use_running_average=not train, **options)
    return lambda x: layer.apply(
        layer.init(KEY, x), x, *args, mutable=["batch_stats"], rngs={"sampling": KEY}
    )


def linen_dense(**options):
    layer = sbn.linen.DenseNorm(6, use_running_average=False, **options)
    return lambda x: layer.apply(
        layer.init(KEY, x), x, mutable=["batch_stats"], rngs={"sampling": KEY}
    )


def nnx_conv(*args, **options):
    options = {"sampler": NS, **options}
    return lambda x: sbn.nnx.ConvNorm(3, 6, (3, 3), rngs=nnx.Rngs(0), **options)(
        x, *args
    )


def fold(num_mean=6, num_var=6, **options):
    statistics = sbn.Statistics(jnp.ones(num_mean), jnp.ones(num_var))
    return lambda x: sbn.fold(jnp.ones((3, 3, 3, 6)), statistics, **options)


# Input shape, call, type, what is given, and the fix.
ERRORS = {
    # samplers
    "sampler": (MAPS, conv(sampler=4), TypeError, "sampler=4", "BatchSampling(8)"),
    "positions": (
        *(MAPS, conv(sampler=Every()), TypeError),
        *("of type Every", "Use Conv and BatchNorm"),
    ),
    "dense-sampler": (
        FLAT,
        dense(sampler=sbn.NaiveSampling),
        TypeError,
        "NaiveSampling'>",
        "sampler=None",
    ),
    "linen-sampler": (MAPS, linen(sampler=4), TypeError, "sampler=4", "sampler=None"),
    "linen-evaluation": (
        MAPS,
        linen(sampler=4, train=False),
        TypeError,
        "sampler=4",
        "sampler=None",
    ),
    "nnx-sampler": (MAPS, nnx_conv(sampler=4), TypeError, "sampler=4", "sampler=None"),
    "images": (
        MAPS,
        conv(sampler=sbn.NaiveSampling(9)),
        ValueError,
        "num_samples=9 and batch size 8",
        "sampler=None",
    ),
    "strata": (
        MAPS,
        conv(sampler=sbn.VirtualSampling(3, 3)),
        ValueError,
        "strata=3",
        "divide both",
    ),
    "one-value": (
        FLAT,
        dense(sampler=sbn.NaiveSampling(1)),
        ValueError,
        "got 1 from",
        "more images",
    ),
    "no-output": (
        (8, 2, 2, 3),
        conv(padding="VALID"),
        ValueError,
        "shape=(8, 0, 0)",
        "no empty axis",
    ),
    "patch-of-images": (
        FLAT,
        dense(sampler=FS, key=KEY),
        ValueError,
        "shape=(8,)",
        "BatchSampling",
    ),
    "linen-patch-of-images": (
        FLAT,
        linen_dense(sampler=FS),
        ValueError,
        "shape=(8,)",
        "BatchSampling",
    ),
    **{
        f"key-{name}": (shape, make(sampler=BS), ValueError, "key=None", "each step")
        for name, shape, make in [("conv", MAPS, conv), ("dense", FLAT, dense)]
    },
    # residuals, masks, parameters
    **{
        f"residual-{name}": (
            MAPS,
            call,
            ValueError,
            "output's shape (8, 5, 4, 6), got residual of shape (8, 3, 2, 6)",
            "Project or subsample",
        )
        for name, call in {
            "conv": conv(residual=RESIDUAL),
            "all": conv(residual=RESIDUAL, sampler=None),
            "linen": linen(RESIDUAL),
            "linen-all": linen(RESIDUAL, sampler=None),
            "linen-evaluation": linen(RESIDUAL, train=False),
            "nnx": nnx_conv(RESIDUAL),
            "nnx-all": nnx_conv(RESIDUAL, sampler=None),
        }.items()
    },
    "residual-image": (
        MAPS,
        conv(residual=jnp.ones((1, 5, 4, 6))),
        ValueError,
        "residual of shape (1, 5, 4, 6)",
        "Project",
    ),
    "mask": (
        MAPS,
        conv(mask=jnp.ones(MAPS, bool)),
        ValueError,
        "mask of shape (8, 5, 4, 3) and input of shape=(8, 5, 4, 6)",
        "size 1",
    ),
    **{
        f"parameter-{name}": (MAPS, call, ValueError, given, "output features?")
        for name, call, given in [
            ("scale", conv(scale=jnp.ones(3)), "(6,), got scale of shape (3,)"),
            ("bias", conv(bias=jnp.ones((6, 1))), "(6,), got bias of shape (6, 1)"),
            ("mean", conv(statistics=MOMENTS), "(6,), got mean of shape (3,)"),
            ("fold-scale", fold(scale=jnp.ones(())), "(6,), got scale of shape ()"),
            ("fold-bias", fold(bias=jnp.ones(3)), "(6,), got bias of shape (3,)"),
            ("fold-mean", fold(num_mean=3), "(6,), got mean of shape (3,)"),
            ("fold-var", fold(num_var=3), "(6,), got var of shape (3,)"),
        ]
    },
    "dense-bias": (FLAT, dense(bias=jnp.ones(3)), ValueError, "(3,)", "last axis"),
    # ranks and geometry
    **{
        f"rank-{name}": (shape, call, ValueError, given, "dense_norm")
        for name, shape, call, given in [
            ("kernel", MAPS, conv(window=()), "kernel of shape (3, 6)"),
            ("input", FLAT, conv(), "input of shape (8, 3)"),
            ("rowless", (5, 4, 3), conv(window=(3, 3, 3)), "(3, 3, 3, 3, 6)"),
        ]
    },
    "rank-dense": (FLAT, dense((3, 3, 6)), ValueError, "(3, 3, 6)", "kernel (I, C)"),
    "rank-dense-input": ((3,), dense(), ValueError, "input of shape (3,)", "(I, C)"),
    "causal": (
        MAPS,
        conv(padding="CAUSAL"),
        ValueError,
        "padding='CAUSAL', got 2",
        "explicit pairs",
    ),
    **{
        f"padding-{padding}": (
            MAPS,
            conv(padding=padding, input_dilation=(1, 2)),
            ValueError,
            f"input_dilation=(1, 2), got padding={padding!r}",
            "a pair for each spatial axis",
        )
        for padding in ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT")
    },
    **{
        f"axes-{name}-{value}": (
            MAPS,
            conv(**{name: value}),
            ValueError,
            f"{name}={value}",
            f"{name} to be an int or 2 of them",
        )
        for name in ("strides", "input_dilation", "kernel_dilation")
        for value in [(2,), (1, 2, 1)]
    },
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_tell_what_was_given_and_what_to_do_while_tracing(name):
    assert message_while_tracing(*ERRORS[name]).startswith("Expected")


def test_an_option_of_neither_layer_is_flax_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_features'"):
        nnx_conv(num_features=3)(jnp.ones(MAPS))


@pytest.mark.parametrize("padding", [((1, 1),), (1, 1, 1)], ids=str)
def test_padding_of_another_rank_is_flax_error(padding):
    with pytest.raises(ValueError, match="Invalid padding format"):
        conv(padding=padding)(jnp.ones(MAPS))


@pytest.mark.parametrize("option", ["axis", "promote_dtype"])
def test_options_of_nnx_that_do_not_fold_are_refused(option):
    with pytest.raises(TypeError, match=option):
        nnx_conv(**{option: 1})(jnp.ones(MAPS))


def test_a_kernel_mask_of_another_shape_is_flax_error():
    mask = jnp.ones((3, 3, 3, 1))
    for make in (linen, nnx_conv):
        with pytest.raises(ValueError, match="Mask needs to have the same shape"):
            make(mask=mask)(jnp.ones(MAPS))
