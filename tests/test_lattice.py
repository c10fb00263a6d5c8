"""A lattice: where its positions are, how they are read, and the fold there."""

import functools
import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import flax_sbn as sbn
from flax_sbn import fixed_fold, folding
from flax_sbn.fixed_fold import _with_sample
from flax_sbn.lattice import Lattice, LatticeSampling
from flax_sbn.sampled_layer import Layer
from flax_sbn.windows import Part
from tests import cases, unfolded
from tests.closeness import assert_same_to_rounding

SIDES = [1, 2, 3, 5, 7, 8, 13, 14, 31, 33, 112]
SQUARES = [(n, n) for n in range(1, 65)]
EXTENTS = [
    *((n,) for n in range(1, 129)),
    *SQUARES,
    *itertools.product(SIDES, SIDES),
    *itertools.product([1, 2, 3, 5, 8, 13], repeat=3),
]
MANY = 4096  # images, so that `min_values` has no say


def lattice_of(sampler, extent, images=MANY):
    """The lattice in maps of an extent, None where they are measured whole."""
    (part,) = sampler.parts((images, *extent), None)
    return part.windows[0] if part.windows else None


def lattices(num_positions=8, extents=EXTENTS):
    """The extents of which a part is measured, and the lattices there."""
    sampler = LatticeSampling(num_positions, min_values=1)
    found = [(extent, lattice_of(sampler, extent)) for extent in extents]
    return [(extent, lattice) for extent, lattice in found if lattice is not None]


def counts(lattice, extent, axis):
    """How often each line across an axis is measured."""
    places = [position[axis] for position in lattice.positions]
    return np.bincount(places, minlength=extent[axis])


@pytest.mark.parametrize("num_positions", [1, 3, 8])
def test_each_cell_has_one_position_and_the_cells_fill_the_map(num_positions):
    for extent, lattice in lattices(num_positions):
        sides, positions = np.array(lattice.sides), np.array(lattice.positions)
        order = list(itertools.product(*map(range, lattice.cells)))
        assert ((positions // sides) == order).all()
        assert ((positions >= 0) & (positions < extent)).all()
        filled = np.array(lattice.cells) * sides
        assert ((filled >= extent) & (filled - sides < extent)).all()


@pytest.mark.parametrize("num_positions", [1, 3, 8])
def test_there_are_up_to_four_times_as_many_positions_as_asked_for(num_positions):
    for extent, lattice in lattices(num_positions):
        count, longest = len(lattice.positions), max(extent)
        assert count <= 4 * num_positions
        # Of maps with few lines cells along several axes are rounded to about that.
        least = num_positions if longest >= num_positions else num_positions / 2
        assert count >= least
        if num_positions <= longest <= 4 * num_positions:
            assert count == longest


@pytest.mark.parametrize("num_positions", [2, 3, 8, 13])
def test_a_square_map_is_measured_once_on_each_line_and_column(num_positions):
    extents = [(n, n) for n in range(num_positions, 4 * num_positions + 1)]
    found = lattices(num_positions, extents)
    assert len(found) == len(extents)
    for extent, lattice in found:
        for axis in (0, 1):
            assert (counts(lattice, extent, axis) == 1).all()


@pytest.mark.parametrize("num_positions", [1, 3, 8])
def test_lines_are_measured_equally_often_up_to_one(num_positions):
    # Where one axis alone has several cells; where several have, bands of lines are.
    for extent, lattice in lattices(num_positions):
        for axis in range(len(extent)):
            each = counts(lattice, extent, axis)
            if math.prod(lattice.cells) == max(lattice.cells):
                assert np.ptp(each) <= 1, (extent, axis)
            starts = np.arange(0, extent[axis], lattice.sides[axis])
            assert np.ptp(np.add.reduceat(each, starts)) == 0


def test_corners_of_square_maps_are_not_measured():
    # Smaller ones are measured several times on each line.
    for (lines, _), lattice in lattices(extents=SQUARES[5:32]):
        corners = set(itertools.product((0, lines - 1), repeat=2))
        # Of two multipliers as good as each other 8 and 12 lines take the larger.
        assert len(corners & {*lattice.positions}) == (lines in (8, 12)), lines


def test_positions_are_far_apart():
    for (lines, _), lattice in lattices(extents=SQUARES[7:]):
        places = np.array(lattice.positions)
        squared = np.square(places[:, None] - places).sum(-1)
        nearest = squared[~np.eye(len(places), dtype=bool)].min()
        # A square lattice of as many points has `lines**2` for one.
        assert nearest * len(places) >= 0.4 * lines**2, lines


@pytest.mark.parametrize("extent", [(), (1,), (7,), (2, 3), (2, 2, 2)])
def test_small_maps_are_measured_whole(extent):
    assert lattice_of(LatticeSampling(), extent) is None
    assert sbn.num_measured(LatticeSampling(), (16, *extent)) == 16 * math.prod(extent)


@given(
    extent=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    images=st.integers(1, 200),
    num_positions=st.integers(1, 16),
    min_values=st.integers(1, 300),
)
def test_small_batches_are_measured_at_more_positions(
    extent, images, num_positions, min_values
):
    sampler = LatticeSampling(num_positions, min_values)
    shape = (images, *extent)
    if math.prod(shape) > 1:
        measured = sbn.num_measured(sampler, shape)
        # A line at least is measured, or every second: never less than half of it.
        assert measured >= min(min_values, math.prod(shape)) / 2
        assert measured <= max(4 * num_positions * images, 2 * (min_values + images))


@pytest.mark.parametrize("extent", [(40,), (14, 14), (7, 28), (3, 8, 5)], ids=str)
def test_positions_are_the_same_in_all_images_and_batches(extent):
    sampler = LatticeSampling(8, min_values=128)
    expected = lattice_of(sampler, extent)
    index = jnp.arange(math.prod(extent)).reshape(1, *extent)
    axes = range(1 + len(extent))
    for images in (16, 17, 100):
        assert lattice_of(sampler, extent, images) == expected
        taken = expected.take(jnp.repeat(index, images, axis=0), axes)
        assert taken.shape == expected.sampled_shape((images, *extent))
        rows = np.asarray(taken).reshape(images, -1)
        flat = np.ravel_multi_index(np.transpose(expected.positions), extent)
        np.testing.assert_array_equal(rows, [flat] * images)
    assert not sampler.needs_key


LATTICES = {
    extent: lattice_of(LatticeSampling(n, min_values=1), extent)
    for n, extent in [(2, (13,)), (2, (7, 5)), (8, (3, 11)), (2, (4, 11, 3))]
}


@pytest.mark.parametrize("features", [[-1], [0], [1], [2], [0, -1], []], ids=str)
@pytest.mark.parametrize("extent", LATTICES, ids=str)
def test_values_are_those_of_indexing_and_gradients_go_back_there(extent, features):
    lattice, rank = LATTICES[extent], 1 + len(extent) + len(features)
    features = sorted({axis % rank for axis in features})
    axes = [axis for axis in range(rank) if axis not in features]
    shape = [5] * rank
    for axis, n in zip(axes, (4, *extent), strict=True):
        shape[axis] = n
    x = np.asarray(cases.inputs(shape))
    first = np.moveaxis(x, axes, range(len(axes)))
    where = (slice(None), *np.transpose(lattice.positions))
    values = np.expand_dims(first[where], tuple(range(2, len(axes))))
    g = np.asarray(cases.inputs(values.shape, seed=1))
    back = np.zeros_like(first)
    back[where] = g.reshape(first[where].shape)

    @jax.jit
    def run(x, g):
        taken, pullback = jax.vjp(lambda x: lattice.take(x, axes), x)
        return taken, *pullback(g)

    taken, gradient = run(x, np.moveaxis(g, range(len(axes)), axes))
    np.testing.assert_array_equal(np.moveaxis(taken, axes, range(len(axes))), values)
    np.testing.assert_array_equal(np.moveaxis(gradient, axes, range(len(axes))), back)


def test_gradients_in_half_precision_are_added_before_rounding():
    def same(x, kernel):
        return x * kernel

    layer = Layer(same, (1, 4, 1), 0.0, half=True, masked=False)
    parts = [Part(1.0, (Lattice((2,), (2,), ((0,), (3,))),))]
    kernel, x = (jnp.ones((1, n, 1), jnp.bfloat16) for n in (1, 4))

    def both(x):
        return _with_sample(layer, parts, kernel, x)

    (y, sample), pullback = jax.vjp(both, x)
    assert y.dtype == jnp.bfloat16
    assert sample.dtype == jnp.float32
    [gradient] = pullback([jnp.full_like(y, 256), jnp.full_like(sample, 1.5)])
    assert gradient.dtype == jnp.bfloat16
    # One alone would be rounded to 1.5, and the sum up to 258.
    np.testing.assert_array_equal(np.float32(gradient[0, :, 0]), [258, 256, 256, 258])


@pytest.mark.parametrize("folded", [False, True])
def test_linen_layers_train_without_keys(folded):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"sampler": LatticeSampling(), "use_running_average": False}
            if folded:
                x = sbn.linen.ConvNorm(4, (3, 3), activation=nn.relu, **options)(x)
                return sbn.linen.DenseNorm(2, **options)(x)
            return sbn.linen.BatchNorm(**options)(x)

    x = cases.inputs((16, 14, 14, 3))
    variables = Net().init(jax.random.key(0), x)
    first, second = (
        jax.jit(lambda v: Net().apply(v, x, mutable=["batch_stats"]))(variables)
        for _ in range(2)
    )
    chex.assert_trees_all_equal(first, second)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).all()),
        first[1]["batch_stats"],
        variables["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))


def test_nnx_layers_keep_no_keys():
    options = {"sampler": LatticeSampling(), "rngs": nnx.Rngs(params=0)}
    conv, norm = (
        sbn.nnx.ConvNorm(3, 4, (3, 3), **options),
        sbn.nnx.BatchNorm(4, **options),
    )
    y = norm(conv(cases.inputs((16, 14, 14, 3))))
    assert y.shape == (16, 14, 14, 4)
    for layer in (conv, norm):
        assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))


SAMPLER = cases.LATTICE
CONV = {"strides": (1, 2), "padding": ((2, 1), (1, 0))}
FORMS = {
    "conv": (
        functools.partial(sbn.conv_norm, **CONV),
        functools.partial(unfolded.conv_norm, **CONV),
        (8, 9, 8, 2),
        (3, 2, 2, 4),
    ),
    "dense": (sbn.dense_norm, unfolded.dense_norm, (8, 9, 5, 2), (2, 4)),
}


def problem(form):
    """Both forms, each as a loss of its statistics, too; arguments, a direction."""
    fold, plain, *shapes = FORMS[form]
    shape = jax.eval_shape(plain, *map(jnp.zeros, shapes))[0].shape
    mask = np.random.default_rng(3).random(shape) < 0.7
    weights = cases.inputs(shape, "float64", seed=4)

    def loss(function, arguments, **options):
        y, statistics = function(
            **arguments, sampler=SAMPLER, mask=mask, activation=jnp.tanh, **options
        )
        return (y * weights).sum() + (statistics.mean**2 * statistics.var).sum()

    def draw(seed):
        x, kernel = (
            cases.inputs(s, "float64", seed=seed + i) for i, s in enumerate(shapes)
        )
        scale, bias = cases.inputs((2, shape[-1]), "float64", seed=seed + 2)
        kernel += jnp.sign(kernel)  # small ones are ill-conditioned
        return {"x": x, "kernel": kernel, "scale": scale.at[1].set(0), "bias": bias}

    return (functools.partial(loss, f) for f in (fold, plain)), draw(0), draw(9)


def along(loss, at, direction):
    """The derivative in a direction."""
    return jax.jvp(loss, [at], [direction])[1]


def stacked(a, b):
    return jax.tree.map(lambda a, b: jnp.stack([a, a + b / 9]), a, b)


def two_layers(loss, a, b):
    """The loss in a loop, with the gradient by all that the loop takes."""

    def body(total, each):
        return total + loss(each), None

    return jax.grad(lambda many: jax.lax.scan(body, 0.0, many)[0])(stacked(a, b))


DERIVATIVES = {
    "forward": along,
    "forward over reverse": lambda f, a, b: along(jax.grad(f), a, b),
    "reverse over reverse": lambda f, a, b: jax.grad(
        lambda a: jnp.sin(jax.grad(f)(a)["x"]).sum()
    )(a),
    "reverse over forward": lambda f, a, b: jax.grad(lambda a: along(f, a, b))(a),
    "remat": lambda f, a, b: jax.grad(jax.checkpoint(f))(a),
    "vmap": lambda f, a, b: jax.vmap(jax.grad(f))(stacked(a, b)),
    "scan": two_layers,
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("form", FORMS)
def test_the_fold_has_the_derivatives_of_what_it_replaces(form, name, x64):
    losses, a, b = problem(form)
    actual, expected = (
        unfolded.quick_jit(functools.partial(DERIVATIVES[name], loss))(a, b)
        for loss in losses
    )
    # Second derivatives are sums that cancel more.
    assert_same_to_rounding(actual, expected, 1e-11 if "over" in name else 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_by_few_arguments_is_that_among_all(form, x64):
    (fold, _), a, _ = problem(form)
    expected = unfolded.quick_jit(jax.grad(fold))(a)
    for names in (["x"], ["kernel", "bias"]):

        @unfolded.quick_jit
        def gradient(some, names=names):
            return jax.grad(lambda some: fold({**a, **some}))(some)

        actual = gradient({name: a[name] for name in names})
        assert_same_to_rounding(actual, {name: expected[name] for name in names})


NORMS = ["BatchNorm", "BatchRenorm", "L1BatchNorm", "RangeBatchNorm"]


@pytest.mark.parametrize("norm_cls", NORMS)
def test_every_norm_folds(norm_cls, x64):
    options = {
        "sampler": SAMPLER,
        "use_running_average": False,
        "param_dtype": jnp.float64,
        **({"running_weight": 0.5} if norm_cls == "BatchNorm" else {}),
    }
    cls = getattr(sbn.linen, norm_cls)
    fold = sbn.linen.ConvNorm(4, (3, 3), norm_cls=cls, **options)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = nn.Conv(4, (3, 3), use_bias=False, param_dtype=jnp.float64)
            return cls(**options, name="norm")(conv.copy(name="conv")(x))

    x = cases.inputs((8, 9, 8, 3), "float64")
    variables = fold.init(jax.random.key(0), x)
    variables = jax.tree.map(
        lambda v: (
            v + cases.inputs(v.shape, "float64", seed=1) ** 2 / 9
            if jnp.issubdtype(v.dtype, jnp.floating)
            else v
        ),
        variables,
    )
    rest = {name: v for name, v in variables.items() if name != "params"}

    def run(layer):
        def loss(params, x):
            y, updated = layer.apply({"params": params, **rest}, x, mutable=list(rest))
            return jnp.tanh(y).sum(), updated

        both = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return unfolded.quick_jit(both)(variables["params"], x)

    assert_same_to_rounding(run(fold), run(Plain()))


@pytest.mark.parametrize("sampler", [SAMPLER, sbn.NaiveSampling(2)])
def test_the_gradient_of_a_sample_needs_no_convolution_of_its_own(sampler):
    x, kernel = jnp.ones((8, 9, 8, 4)), jnp.ones((3, 3, 4, 4))

    def loss(x, kernel):
        return (sbn.conv_norm(x, kernel, sampler=sampler)[0] ** 2).sum()

    count = {
        platform: jax.export.export(
            jax.jit(jax.grad(loss, (0, 1))), platforms=[platform]
        )(x, kernel)
        .mlir_module()
        .count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    }
    # Output and sample, both as functions of the kernel, and the input's gradient. A
    # GPU makes the input's gradient of the sample by itself.
    assert count == {"cpu": 5, "cuda": 6, "tpu": 5}


FOLDING = [
    "BatchNorm",
    "BatchRenorm",
    "DiminishingBatchNorm",
    "L1BatchNorm",
    "RangeBatchNorm",
]


@pytest.mark.parametrize("norm", FOLDING)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_that_fold_take_the_cheap_gradient(api, norm, monkeypatch):
    taken = []

    def fold(*args, plain=fixed_fold.fixed_fold):
        taken.append(args)
        return plain(*args)

    monkeypatch.setattr(folding, "fixed_fold", fold)
    options = {"sampler": sbn.LatticeSampling(), "dtype": jnp.float32}
    x = jnp.ones((16, 9, 9, 3))
    if api == "linen":
        norm_cls = getattr(sbn.linen, norm)
        layer = sbn.linen.ConvNorm(4, (3, 3), norm_cls=norm_cls, **options)
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        layer.apply(variables, x, None, False, mutable=["batch_stats"])
    else:
        norm_cls = getattr(sbn.nnx, norm)
        rngs = nnx.Rngs(0)
        sbn.nnx.ConvNorm(3, 4, (3, 3), norm_cls=norm_cls, **options, rngs=rngs)(x)
    assert len(taken) == 1
