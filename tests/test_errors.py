"""Every error of the package: its type, the given value and the fix in its message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_sbn as sbn
from tests.teaching import message_while_tracing

KEY = jax.random.key(0)
BS, NS, FS = sbn.BatchSampling, sbn.NaiveSampling, sbn.FeatureSampling
VDN, Mixed, Lattice = sbn.VirtualSampling, sbn.MixedSampling, sbn.LatticeSampling
FLAT, MAPS = (8, 3), (8, 4, 4, 3)


def measure(sampler, key=KEY, **options):
    return lambda x: sbn.batch_norm(x, sampler=sampler, key=key, **options)


def linen(**options):
    layer = sbn.linen.BatchNorm(use_running_average=False, **options)
    return lambda x: layer.init_with_output(KEY, x)


def linen_step(**options):
    layer = sbn.linen.BatchNorm(use_running_average=False, **options)
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    variables["batch_stats"] = {"mean": jnp.ones(3), "var": jnp.ones(3)}
    return lambda x: layer.apply(
        variables, x, mutable=["batch_stats"], rngs={"sampling": KEY}
    )


def nnx_layer(**options):
    return lambda x: sbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)(x)


def normalize(num_mean=3, num_var=3, **options):
    statistics = sbn.Statistics(jnp.ones(num_mean), jnp.ones(num_var))
    return lambda x: sbn.normalize(x, statistics, **options)


def append(shape, strata=1, dtype="float32"):
    return lambda x: sbn.append_virtual(x, jnp.ones(shape, dtype), strata)


# Input shape, call, type, what is given, and the fix.
ERRORS = {
    # samplers that are none
    "sampler-number": (FLAT, measure(8), TypeError, "sampler=8", "BatchSampling(8)"),
    "sampler-class": (FLAT, measure(BS), TypeError, "BatchSampling'>", "sampler=None"),
    "linen-sampler": (FLAT, linen(sampler=4), TypeError, "sampler=4", "BatchSampling"),
    "nnx-sampler": (FLAT, nnx_layer(sampler=4), TypeError, "sampler=4", "sampler=None"),
    # samples that do not fit the input
    "ns-images": (FLAT, measure(NS(9)), ValueError, "num_samples=9", "smaller"),
    "bs-images": (FLAT, measure(BS(64)), ValueError, "batch size 8", "sampler=None"),
    "vdn-images": (FLAT, measure(VDN(9)), ValueError, "num_virtual=9", "smaller"),
    "bs-strata": (FLAT, measure(BS(6, 3)), ValueError, "strata=3", "divide both"),
    "bs-sample": (FLAT, measure(BS(6, 4)), ValueError, "num_samples=6", "divide both"),
    "vdn-strata": (FLAT, measure(VDN(3, 3)), ValueError, "strata=3", "divide both"),
    "one-value": (FLAT, measure(NS(1)), ValueError, "got 1 from", "more images"),
    "one-image": ((1, 3), measure(BS(1)), ValueError, "shape=(1,)", "more images"),
    "one-pixel": ((1, 1, 1, 3), measure(Lattice()), ValueError, "got 1", "more images"),
    "no-map": (
        (8, 4, 0, 3),
        measure(Lattice()),
        ValueError,
        "shape=(8, 4, 0)",
        "axis`",
    ),
    "fs-images": (FLAT, measure(FS(0.5)), ValueError, "shape=(8,)", "BatchSampling"),
    "no-images": ((3,), measure(BS(2)), ValueError, "shape=()", "feature axis?"),
    "no-pixels": ((8, 0, 3), measure(BS(2)), ValueError, "shape=(8, 0)", "axis`"),
    "no-batch": ((0, 3), measure(BS(2)), ValueError, "shape=(0,)", "empty batches"),
    "linen-no-batch": (
        (0, 3),
        linen_step(sampler=BS(2)),
        ValueError,
        "shape=(0,)",
        "sampler=None",
    ),
    "linen-no-images": (
        (3,),
        linen_step(sampler=NS(2)),
        ValueError,
        "shape=()",
        "feature axis?",
    ),
    "nnx-no-images": (
        (3,),
        nnx_layer(sampler=NS(2)),
        ValueError,
        "shape=()",
        "feature axis?",
    ),
    "groups-no-images": (
        (3,),
        lambda x: sbn.alternatives.ghost_batch_norm(x, num_groups=2),
        ValueError,
        "num_groups=2",
        "feature axis?",
    ),
    "no-real": (
        FLAT,
        measure(Mixed(BS(2), VDN(8))),
        ValueError,
        "num_virtual=8 and batch size 8",
        "append_virtual",
    ),
    "real-images": (
        FLAT,
        measure(Mixed(BS(5), VDN(4))),
        ValueError,
        "num_samples=5 and batch size 4",
        "smaller",
    ),
    # keys
    "bs-key": (FLAT, measure(BS(2), None), ValueError, "key=None", "jax.random.key("),
    "fs-key": (MAPS, measure(FS(0.5), None), ValueError, "key=None", "each step"),
    "mixed-key": (
        FLAT,
        measure(Mixed(BS(2), VDN(2)), None),
        ValueError,
        "key=None",
        "jax.random.key(",
    ),
    # arguments of samplers
    **{
        f"positive-{name}-{value}": (
            FLAT,
            lambda x, make=make, name=name, value=value: make(**{name: value}),
            ValueError,
            f"{name}={value!r}",
            "an int >= 1",
        )
        for make, name, value in [
            (NS, "num_samples", 0),
            (NS, "num_samples", 2.0),
            (BS, "num_samples", -1),
            (BS, "num_samples", True),
            (lambda strata: BS(4, strata), "strata", 0),
            (VDN, "num_virtual", 0),
            (lambda strata: VDN(4, strata), "strata", "2"),
            (lambda min_values: FS(0.5, min_values), "min_values", 0),
            (lambda groups: FS(0.5, groups=groups), "groups", 0),
            (Lattice, "num_positions", 0),
            (Lattice, "num_positions", 8.0),
            (Lattice, "min_values", -1),
            (Lattice, "min_values", True),
        ]
    },
    **{
        f"fraction-{value}": (
            MAPS,
            lambda x, value=value: FS(value),
            ValueError,
            f"fraction={value!r}",
            "1/4 to 1/64",
        )
        for value in (0, -0.5, 1.5, float("nan"))
    },
    **{
        f"weight-{value}": (
            FLAT,
            lambda x, value=value: Mixed(BS(2), VDN(2), value),
            ValueError,
            f"virtual_weight={value!r}",
            "0.5",
        )
        for value in (-0.1, 1.1, float("nan"))
    },
    "fraction-string": (
        MAPS,
        lambda x: FS("1/64"),
        TypeError,
        "fraction='1/64'",
        "0.015625",
    ),
    "weight-string": (
        FLAT,
        lambda x: Mixed(BS(2), VDN(2), "0.5"),
        TypeError,
        "virtual_weight='0.5'",
        "number",
    ),
    **{
        f"{name}-{option}-{sampler}": (
            FLAT,
            make(sampler=sampler, **{option: value}),
            TypeError,
            f"{option}={value!r}",
            "number",
        )
        for name, make in {"linen": linen_step, "nnx": nnx_layer}.items()
        for option, value in {"momentum": None, "epsilon": "1e-5"}.items()
        for sampler in (None, NS(2))
    },
    "function-epsilon": (
        FLAT,
        lambda x: sbn.batch_norm(x, epsilon="1e-5"),
        TypeError,
        "epsilon='1e-5'",
        "number",
    ),
    "folded-epsilon": (
        MAPS,
        lambda x: sbn.conv_norm(x, jnp.ones((1, 1, x.shape[-1], 2)), epsilon="1e-5"),
        TypeError,
        "epsilon='1e-5'",
        "number",
    ),
    "running-weight": (
        FLAT,
        linen_step(sampler=NS(2), running_weight="0.75"),
        TypeError,
        "running_weight='0.75'",
        "number",
    ),
    **{
        f"{name}-in-features-{sampler}": (
            MAPS,
            lambda x, make=make, sampler=sampler: make(sampler)(x),
            ValueError,
            "an input of 5 features",
            "is in_features right?",
        )
        for name, make in {
            "conv": lambda s: sbn.nnx.ConvNorm(
                5, 4, (3, 3), sampler=s, rngs=nnx.Rngs(0)
            ),
            "dense": lambda s: sbn.nnx.DenseNorm(5, 4, sampler=s, rngs=nnx.Rngs(0)),
        }.items()
        for sampler in (None, NS(4))
    },
    "conv-kernel": (
        MAPS,
        lambda x: sbn.conv_norm(x, jnp.ones((3, 3, 5, 4))),
        ValueError,
        "an input of 5 features",
        "Features are last",
    ),
    "mixed-swapped": (
        FLAT,
        lambda x: Mixed(VDN(2), BS(2)),
        TypeError,
        "got BatchSampling(num_samples=2",
        "MixedSampling(real, VirtualSampling(4))",
    ),
    **{
        f"mixed-real-{real}": (
            FLAT,
            lambda x, real=real: Mixed(real, VDN(2)),
            TypeError,
            f"real={real!r}",
            "FeatureSampling or BatchSampling",
        )
        for real in (None, VDN(2), Mixed(BS(2), VDN(2)))
    },
    "mixed-number": (
        FLAT,
        lambda x: Mixed(4, VDN(2)),
        TypeError,
        "sampler=4",
        "BatchSampling",
    ),
    # axes, masks, parameters
    "axis": (
        MAPS,
        measure(None, axis=4),
        ValueError,
        "axis=4",
        "features first axis=1",
    ),
    "axis-back": (MAPS, measure(None, axis=-5), ValueError, "axis=-5", "axis=-1"),
    "axes": (MAPS, measure(None, axis=(1, 9)), ValueError, "(1, 9)", "axis=-1"),
    "linen-axis": (MAPS, linen(axis=7), ValueError, "axis=7", "axis=1"),
    "nnx-axis": (MAPS, nnx_layer(axis=7), ValueError, "axis=7", "axis=1"),
    "normalize-axis": (MAPS, normalize(axis=4), ValueError, "axis=4", "axis=1"),
    "mask": (
        MAPS,
        measure(None, mask=jnp.ones((8, 4), bool)),
        ValueError,
        "mask of shape (8, 4)",
        "size 1",
    ),
    "mask-rank": (
        FLAT,
        measure(BS(2), mask=jnp.ones(MAPS, bool)),
        ValueError,
        "shape=(8, 3)",
        "size 1",
    ),
    "mean": (MAPS, normalize(num_mean=1), ValueError, "mean of shape (1,)", "axis`"),
    "var": (MAPS, normalize(num_var=4), ValueError, "var of shape (4,)", "axis`"),
    "scale": (MAPS, normalize(scale=jnp.ones(4)), ValueError, "(4,)", "axis`"),
    "bias": (MAPS, normalize(bias=jnp.ones((3, 1))), ValueError, "(3, 1)", "axis`"),
    "mixture": (
        FLAT,
        lambda x: sbn.mix_statistics([sbn.Statistics(x[0], x[0])], [0.5, 0.5]),
        ValueError,
        "got 2 weights and 1 statistics",
        "one weight for each",
    ),
    "empty-mixture": (
        FLAT,
        lambda x: sbn.mix_statistics([], []),
        ValueError,
        "0 statistics",
        "one weight for each",
    ),
    # virtual images
    "virtual-shape": (
        MAPS,
        append((2, 4, 3)),
        ValueError,
        "virtual of shape (2, 4, 3)",
        "virtual_samples(key, n, (4, 4, 3))",
    ),
    "virtual-strata": (
        MAPS,
        append((3, 4, 4, 3), 2),
        ValueError,
        "3 virtual",
        "divide",
    ),
    "virtual-zero-strata": (FLAT, append(FLAT, 0), ValueError, "strata=0", "divide"),
    "drop-images": (
        FLAT,
        lambda x: sbn.drop_virtual(x, 9),
        ValueError,
        "num_virtual=9",
        "batch size 8",
    ),
    "drop-strata": (
        FLAT,
        lambda x: sbn.drop_virtual(x, 3, 2),
        ValueError,
        "strata=2",
        "divide both",
    ),
    "virtual-mean": (
        FLAT,
        lambda x: sbn.virtual_samples(KEY, 2, (4, 4, 3), mean=jnp.ones(4)),
        ValueError,
        "image of shape=(4, 4, 3), got mean of shape (4,)",
        "one value per feature",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_tell_what_was_given_and_what_to_do_while_tracing(name):
    message = message_while_tracing(*ERRORS[name])
    if name != "virtual-mean":  # jax's own
        assert message.startswith("Expected")


def test_virtual_floats_are_not_cast_to_a_batch_of_integers():
    with pytest.raises(ValueError, match=r"virtual images of float32\. Scale"):
        sbn.append_virtual(jnp.ones(FLAT, "uint8"), jnp.ones(FLAT))


def test_a_key_that_is_not_needed_is_fine():
    sbn.batch_norm(jnp.ones(FLAT), sampler=NS(2), key=KEY)


def test_one_image_of_many_pixels_is_enough():
    sbn.batch_norm(jnp.ones(MAPS), sampler=NS(1))


def test_one_image_of_two_pixels_is_enough_for_a_lattice():
    sbn.batch_norm(jnp.ones((1, 1, 2, 3)), sampler=Lattice(1, min_values=1))


@pytest.mark.parametrize("int_type", [np.int64, np.int32])
def test_numpy_ints_are_ints(int_type):
    two, four = int_type(2), int_type(4)
    for made, expected in (
        (NS(four), NS(4)),
        (BS(four, two), BS(4, 2)),
        (FS(np.float32(0.25), four, two), FS(0.25, 4, 2)),
        (VDN(four, two), VDN(4, 2)),
        (sbn.CopySampling(two), sbn.CopySampling(2)),
        (Lattice(two, four), Lattice(2, 4)),
    ):
        assert repr(made).replace("np.float32(0.25)", "0.25") == repr(expected)
