"""Layers drawn at random, on one device and on many, against the NumPy reference.

The property tests draw a few of them, ``benchmarks/reliability/fuzz.py`` some thousand.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_sbn as sbn
from tests import reference, samples, unfolded
from tests.closeness import assert_close, tolerance

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
# Examples are divided along the first axis, and repeated along the second.
MESHES: dict[str, Any] = {
    "one device": None,
    "8 auto": ((8,), ("data",), (AUTO,)),
    "8 explicit": ((8,), ("data",), (EXPLICIT,)),
    "4 x 2 auto": ((4, 2), ("data", "model"), (AUTO, AUTO)),
    "4 x 2 explicit": ((4, 2), ("data", "model"), (EXPLICIT, EXPLICIT)),
    "2 x 4 explicit, auto": ((2, 4), ("data", "model"), (EXPLICIT, AUTO)),
}
INPUTS, OUTPUTS = 3, 4
WINDOW = 3
FORMS: dict[str, Callable[..., Any]] = {
    "norm": sbn.batch_norm,
    "conv": unfolded.conv_norm,
    "conv folded": sbn.conv_norm,
    "dense": unfolded.dense_norm,
    "dense folded": sbn.dense_norm,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer on a mesh: what is one compiled program.

    Attributes:
      form: one of ``FORMS``.
      extent: examples and space of the input.
      sampler: of the norm.
      dtype: of input and computation; the parameters are float32, or float64.
      mesh: one of ``MESHES``.
      masked: whether there is a mask.
      activated: whether a residual is added, and a ReLU follows.
      strides: of a convolution.
      padding: of a convolution.
    """

    form: str
    extent: tuple[int, ...]
    sampler: sbn.Sampler | None
    dtype: str
    mesh: str
    masked: bool
    activated: bool
    strides: int
    padding: str


@dataclasses.dataclass(frozen=True)
class Data:
    """What a layer is given.

    Attributes:
      seed: of all values.
      mean: that all features of the input have.
      constant: whether a feature is constant.
      unmasked: share of values that are left, where there is a mask.
    """

    seed: int
    mean: float
    constant: bool
    unmasked: float


# Few distinct extents, so that few programs are compiled.
_COUNTS, _STRATA = st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 1, 2, 4])
_ROWS = st.one_of(
    st.builds(sbn.NaiveSampling, _COUNTS),
    st.builds(sbn.BatchSampling, _COUNTS, _STRATA),
    st.builds(sbn.CopySampling, st.sampled_from([2, 4])),
)
_PATCHES = st.builds(
    sbn.FeatureSampling,
    st.sampled_from([0.05, 0.25, 0.5]),
    min_values=st.sampled_from([8, 32]),
    groups=st.sampled_from([1, 2, None]),
)
_LATTICES = st.builds(
    sbn.LatticeSampling,
    st.sampled_from([1, 2, 8]),
    min_values=st.sampled_from([8, 32]),
)
_VIRTUAL = st.builds(sbn.VirtualSampling, st.sampled_from([2, 4]), _STRATA)
_SAMPLERS = st.one_of(
    st.none(),
    _ROWS,
    _PATCHES,
    _LATTICES,
    _VIRTUAL,
    st.builds(
        sbn.MixedSampling,
        st.one_of(_ROWS, _PATCHES, _LATTICES),
        _VIRTUAL,
        st.sampled_from([0.25, 0.5]),
    ),
)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Draws a layer; its sampler may not fit."""
    form = draw(st.sampled_from(list(FORMS)))
    conv = form.startswith("conv")
    spaces = [(9,), (6, 4)] if conv else [(), (5,), (4, 4), (2, 3, 4)]
    images = draw(st.sampled_from([8, 16]))
    dtypes = ["float32", "float32", "float64", "bfloat16", "float16"]
    return Layer(
        form=form,
        extent=(images, *draw(st.sampled_from(spaces))),
        sampler=draw(_SAMPLERS),
        dtype=draw(st.sampled_from(dtypes)),
        mesh=draw(st.sampled_from(list(MESHES))),
        masked=draw(st.sampled_from([False, False, True])),
        activated=form != "norm" and draw(st.booleans()),
        strides=draw(st.sampled_from([1, 2])) if conv else 1,
        padding=draw(st.sampled_from(["SAME", "VALID"])) if conv else "SAME",
    )


SEEDS = st.integers(0, 2**32 - 1)


def data(seed: int) -> Data:
    """Returns what a layer is given, by a seed."""
    rng = np.random.default_rng(seed)
    return Data(
        seed=seed,
        mean=float(rng.choice([0, 0, 3])),
        constant=bool(rng.choice([False, True])),
        unmasked=float(rng.choice([0, 0.3, 0.9])),
    )


def check(layer: Layer, given: Data) -> float | None:
    """Compares value, statistics and gradients with the reference.

    Returns:
      The largest error, as a share of what rounding may be; None if the sampler does
      not fit the layer, and the layer says so.

    Raises:
      AssertionError: if anything is not finite, or not as close as rounding is.
    """
    with jax.enable_x64(layer.dtype == "float64"):
        arguments, rest = _problem(layer, given)
        shape = _output_shape(layer)
        why = _refusal(lambda: sbn.num_measured(layer.sampler, shape[:-1]))
        if why is not None:
            call = functools.partial(_call, layer)
            again = _refusal(lambda: jax.eval_shape(call, arguments, rest))
            assert again is not None, f"Expected a refusal, since {why}"
            return None
        expected, cotangent, rounding = _truth(layer, given, arguments, rest)
        found = _on_mesh(layer, arguments, cotangent, rest)
    worst = 0.0
    half = jnp.finfo(layer.dtype).bits < 32  # of which the bounds are generous
    for name, truth in expected.items():
        values = np.asarray(found[name]).astype(np.float64)
        assert np.isfinite(values).all(), f"{name} is not finite"
        allowed = (1 if half else 16) * rounding[name]
        try:
            assert_close(values, truth, layer.dtype, c=allowed)
        except AssertionError as problem:
            raise AssertionError(f"{name}: {problem}") from None
        error = abs(values - truth).max(initial=0.0)
        worst = max(worst, error / tolerance(truth, layer.dtype, c=allowed))
    return worst


def forget_programs() -> None:
    """Frees what has been compiled."""
    _program.cache_clear()
    jax.clear_caches()


def _problem(layer: Layer, given: Data) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what gradients are asked for, and a key and a mask."""
    rng = np.random.default_rng(given.seed)
    features = OUTPUTS if layer.form == "norm" else INPUTS
    x = rng.normal(size=(*layer.extent, features)) * 10 ** rng.uniform(-1, 1, features)
    x += given.mean
    if given.constant:
        x[..., 0] = 1.0
    wide = "float64" if layer.dtype == "float64" else "float32"
    arguments = {"x": jnp.asarray(x, layer.dtype)}
    shape = _output_shape(layer)
    if layer.form != "norm":
        window = (WINDOW,) * (len(layer.extent) - 1) if "conv" in layer.form else ()
        kernel = rng.normal(size=(*window, INPUTS, OUTPUTS))
        kernel /= math.sqrt(math.prod(kernel.shape[:-1]))
        arguments["kernel"] = jnp.asarray(kernel, wide)
    scale, bias = rng.normal(size=(2, OUTPUTS)) / 2
    arguments |= {
        "scale": jnp.asarray(1 + scale, wide),
        "bias": jnp.asarray(bias, wide),
    }
    if layer.activated:
        arguments["residual"] = jnp.asarray(rng.normal(size=shape), layer.dtype)
    rest = {"key": jax.random.key(given.seed)}
    if layer.masked:
        rest["mask"] = jnp.asarray(rng.random(shape) < given.unmasked)
    return arguments, rest


def _output_shape(layer: Layer) -> tuple[int, ...]:
    images, *space = layer.extent
    if "conv" in layer.form:
        lost = 0 if layer.padding == "SAME" else WINDOW - 1
        space = [-(-(n - lost) // layer.strides) for n in space]
    return (images, *space, OUTPUTS)


def _call(layer: Layer, arguments: Any, rest: Any) -> Any:
    options: dict[str, Any] = {"sampler": layer.sampler, "dtype": layer.dtype, **rest}
    if "conv" in layer.form:
        options |= {"strides": layer.strides, "padding": layer.padding}
    if layer.activated:
        options["activation"] = jax.nn.relu
    return FORMS[layer.form](**arguments, **options)


def _refusal(call: Callable[[], Any]) -> str | None:
    """Returns what a call's ValueError says, None if it has none."""
    try:
        call()
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert message.startswith("Expected"), message
    return message


@functools.lru_cache(maxsize=64)
def _program(layer: Layer) -> Any:
    def run(arguments: Any, cotangent: Any, rest: Any) -> Any:
        y, pull, statistics = jax.vjp(
            lambda arguments: _call(layer, arguments, rest), arguments, has_aux=True
        )
        (gradients,) = pull(cotangent)
        gradients = {f"gradient of {name}": g for name, g in gradients.items()}
        return {"y": y, **statistics._asdict(), **gradients}

    return jax.jit(run)


def _on_mesh(layer: Layer, arguments: Any, cotangent: Any, rest: Any) -> Any:
    """Runs a layer with its examples divided among the devices."""
    if MESHES[layer.mesh] is None:
        return jax.device_get(_program(layer)(arguments, cotangent, rest))
    mesh = jax.make_mesh(*MESHES[layer.mesh])

    def lay_out(path: Any, array: jax.Array) -> jax.Array:
        of_images = array.ndim > 1 and "kernel" not in jax.tree_util.keystr(path)
        return jax.device_put(
            array, NamedSharding(mesh, P("data") if of_images else P())
        )

    args = jax.tree_util.tree_map_with_path(lay_out, (arguments, cotangent, rest))
    with jax.set_mesh(mesh):
        return jax.device_get(_program(layer)(*args))


def _truth(
    layer: Layer, given: Data, arguments: Any, rest: Any
) -> tuple[dict[str, Any], jax.Array, dict[str, float]]:
    """Returns the reference's results, a cotangent, and how much each may be off.

    What is off is in units of the spacing of numbers near the largest of the result.
    """
    x = reference.wide(arguments["x"])
    linear = layer.form != "norm"
    shape = _output_shape(layer)
    z, magnitude = x, abs(x)
    if linear:
        kernel = np.asarray(arguments["kernel"].astype(layer.dtype), np.float64)
        taps = _taps(layer)
        if not taps:  # every position is an image
            x = x.reshape(-1, INPUTS)
        z = reference.contract("y", taps, x=x, kernel=kernel).reshape(shape)
        magnitude = reference.contract("y", taps, x=abs(x), kernel=abs(kernel))
    mask = np.asarray(rest["mask"]) if layer.masked else True
    shares = samples.shares(layer.sampler, shape, mask, rest["key"])
    mean, var = reference.population(z, shares)
    scale, bias = (reference.wide(arguments[name]) for name in ("scale", "bias"))
    y = reference.normalize(z, mean, var, scale, bias)
    rng = np.random.default_rng(given.seed + 1)
    cotangent = rng.normal(size=shape)
    if layer.activated:
        y = y + reference.wide(arguments["residual"])
        # Rounding may turn the ReLU on or off where it hardly is.
        cotangent = np.where(abs(y) > 0.1, cotangent, 0)
    given_back = jnp.asarray(cotangent, layer.dtype)
    g = reference.wide(np.asarray(given_back))
    if layer.activated:
        g = np.where(y > 0, g, 0)
        y = np.maximum(y, 0)
    dz, dscale, dbias = reference.backward(z, g, shares, scale)
    expected = {"y": y, "mean": mean, "var": var}
    expected |= {"gradient of scale": dscale, "gradient of bias": dbias}
    if layer.activated:
        expected["gradient of residual"] = g
    dx = dz
    if linear:
        flat = dz.reshape(-1, *(tap.shape[0] for tap in taps), OUTPUTS)
        dx = reference.contract("x", taps, y=flat, kernel=kernel)
        expected["gradient of kernel"] = reference.contract("kernel", taps, x=x, y=flat)
    expected["gradient of x"] = dx.reshape(np.shape(arguments["x"]))
    magnitude = magnitude.reshape(shape)
    rounding = _rounding(layer, expected, magnitude, shares, arguments, z, g)
    return expected, given_back, rounding


def _taps(layer: Layer) -> list[np.ndarray]:
    if "conv" not in layer.form:
        return []
    taps = []
    for size, outputs in zip(layer.extent[1:], _output_shape(layer)[1:-1], strict=True):
        pads = 0, 0
        if layer.padding == "SAME":
            total = max(0, (outputs - 1) * layer.strides + WINDOW - size)
            pads = total // 2, total - total // 2
        taps.append(reference.taps(size, WINDOW, layer.strides, pads, 1, 1))
    return taps


def _rounding(
    layer: Layer,
    expected: dict[str, Any],
    magnitude: np.ndarray,
    shares: np.ndarray,
    arguments: Any,
    z: np.ndarray,
    g: np.ndarray,
) -> dict[str, float]:
    """Returns by how many roundings of its largest value, or of one, each may be off.

    A result that is a small difference of large numbers has their rounding.
    """
    eps, single = (float(jnp.finfo(t).eps) for t in (layer.dtype, "float32"))
    axes, scale = reference.over(z), abs(reference.wide(arguments["scale"]))
    mean, std = expected["mean"], np.sqrt(expected["var"] + 1e-5)
    normal, size = abs(z - mean) / std, magnitude.max(axes)
    # Values that are given are exact: then only the arithmetic rounds.
    precision = min(1, single / eps) if layer.form == "norm" else 1
    relative = 1 + (size + abs(mean)) / std * precision
    squares = 0.0
    if layer.sampler is None:  # one pass about zero
        squares = (mean**2).max() * min(1, single / eps)
        lost = (mean / std) ** 2 * (1 + normal.max(axes))
        relative += lost * min(1, single / eps)
    sums = np.sqrt((g**2).sum(axes)) + abs(expected["gradient of bias"])
    sums += abs(expected["gradient of scale"])
    spread = abs(g).max(axes) + shares.max(axes) * sums * (1 + normal.max(axes))
    dz = (relative * scale / std * spread).max()
    rounding = {
        "y": (relative * scale).max() + 1,
        "mean": (size * precision).max(),
        "var": ((2 * np.sqrt(expected["var"]) + eps * size) * size).max() + squares,
        "gradient of bias": sums.max(),
        "gradient of scale": (relative * sums).max(),
        "gradient of residual": 1.0,
        "gradient of x": dz,
    }
    if "kernel" in arguments:
        kernel, x = (abs(reference.wide(arguments[n])) for n in ("kernel", "x"))
        rounding["gradient of x"] *= kernel.sum(-1).max()
        rounding["gradient of kernel"] = dz * np.sqrt((x**2).sum())
    # Those of `assert_close` are of the largest value, if that is more than one.
    return {
        name: rounding[name] / max(1.0, abs(truth).max())
        if "gradient of x" in name or "kernel" in name
        else rounding[name]
        for name, truth in expected.items()
    }
