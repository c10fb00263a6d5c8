"""Batch Renormalization against its equations, by steps; folded; state and schedule."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import flax_sbn as sbn
from flax_sbn.alternatives.batch_renormalization import D_MAX, R_MAX
from flax_sbn.alternatives.schedules import Ramp
from tests import cases
from tests.closeness import assert_close, assert_same_to_rounding

SHAPE = (8, 4, 4, 3)
RUNNING = sbn.Statistics(jnp.array([0.5, 1.0, -3.0]), jnp.array([4.0, 0.3, 1.0]))
EPS = 1e-5
LINEN = sbn.linen.BatchRenorm
NNX = sbn.nnx.BatchRenorm


def corrections(mean, var, old_mean, old_var, r_max, d_max, epsilon=EPS):
    """The paper's r and d."""
    s_b, s = np.sqrt(var + epsilon), np.sqrt(old_var + epsilon)
    r = np.clip(s_b / s, 1 / r_max, r_max)
    return r, np.clip((mean - old_mean) / s, -d_max, d_max)


def reference(x, mean, std, r_max, d_max, momentum=0.9, epsilon=EPS):
    """One training step of the paper's algorithm: output, running mean and std."""
    x = np.asarray(x, np.float64)
    mean_b = x.mean((0, 1, 2))
    std_b = np.sqrt(x.var((0, 1, 2)) + epsilon)
    r, d = corrections(mean_b, std_b**2 - epsilon, mean, std**2 - epsilon, r_max, d_max)
    y = (x - mean_b) / std_b * r + d
    rate = 1 - momentum
    return y, mean + rate * (mean_b - mean), std + rate * (std_b - std)


def backward(x, g, r):
    """Gradient of x with r and d held constant: BN's, times r."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    num = x[..., 0].size
    std = np.sqrt(x.var((0, 1, 2)) + EPS)
    normal = (x - x.mean((0, 1, 2))) / std
    sums = g.sum((0, 1, 2)) + normal * (g * normal).sum((0, 1, 2))
    return r / std * (g - sums / num)


def limits(step):
    """Limits that grow within a few steps."""
    return {"r_max": 1 + 0.5 * step, "d_max": 0.25 * step}


SCHEDULES = {"r_max": lambda t: 1 + 0.5 * t, "d_max": lambda t: 0.25 * t}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.25), (100.0, 100.0)])
def test_output_and_gradient_are_those_of_the_equations(dtype, r_max, d_max, x64):
    x, g = cases.inputs(SHAPE, dtype), cases.inputs(SHAPE, dtype, seed=1)
    running = sbn.Statistics(*(np.float64(s) for s in RUNNING))
    limit = {"r_max": r_max, "d_max": d_max}

    @jax.jit
    def norm(x):
        return sbn.alternatives.batch_renorm(x, running=RUNNING, **limit)[0]

    y, pullback = jax.vjp(norm, x)
    expected, *_ = reference(x, running.mean, np.sqrt(running.var + EPS), **limit)
    wide = np.asarray(x, np.float64)
    r, d = corrections(wide.mean((0, 1, 2)), wide.var((0, 1, 2)), *running, **limit)
    # With loose limits nothing is clipped, with tight ones everything.
    assert (np.isin(r, (r_max, 1 / r_max)) | (abs(d) == d_max)).any() == (r_max < 100)
    num = wide[..., 0].size
    assert_close(y, expected, dtype, num=num)
    assert_close(pullback(g)[0], backward(x, g, r), dtype, num=num)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_channels_of_small_variance_are_scaled_right(dtype, x64):
    # Adding epsilon twice would divide by more than the standard deviation.
    x = 1e-2 * jax.random.normal(jax.random.key(0), (4096, 2), dtype)
    var = jnp.full(2, 1e-4, dtype)
    running = sbn.Statistics(jnp.zeros(2, dtype), var)
    y, _ = sbn.alternatives.batch_renorm(x, running=running, r_max=3.0, d_max=5.0)
    assert_close(y, np.asarray(x, np.float64) / np.sqrt(1.1e-4), dtype, num=64)


def test_without_limits_training_equals_inference():
    x, inf = cases.inputs(SHAPE), float("inf")
    y, _ = sbn.alternatives.batch_renorm(x, running=RUNNING, r_max=inf, d_max=inf)
    assert_close(y, np.asarray(sbn.normalize(x, RUNNING)), num=x[..., 0].size)


def test_with_r_1_and_d_0_it_is_batch_norm():
    x, g = cases.inputs(SHAPE), cases.inputs(SHAPE, seed=1)

    def renorm(x):
        options = {"running": RUNNING, "r_max": 1.0, "d_max": 0.0}
        return sbn.alternatives.batch_renorm(x, **options)[0]

    y, pullback = jax.vjp(renorm, x)
    expected, expected_pullback = jax.vjp(lambda x: sbn.batch_norm(x)[0], x)
    assert_close(y, np.asarray(expected), num=x[..., 0].size)
    assert_close(*map(np.asarray, (pullback(g)[0], expected_pullback(g)[0])), num=64)


def trained_linen(layer, steps, **apply):
    """Yields output and variables of a few training steps."""
    variables = layer.init(jax.random.key(0), jnp.zeros((1, *SHAPE[1:])))
    for step in range(steps):
        x = cases.inputs(SHAPE, seed=step)
        y, updates = layer.apply(variables, x, mutable=["batch_stats"], **apply)
        variables = {**variables, **updates}
        yield x, y, variables


def test_both_layers_follow_the_equations_over_several_steps():
    options = {"momentum": 0.9, **SCHEDULES}
    module = NNX(3, rngs=nnx.Rngs(0), **options)
    mean, std = np.zeros(3), np.full(3, np.sqrt(1 + EPS))
    layer = LINEN(use_running_average=False, **options)
    for step, (x, y, variables) in enumerate(trained_linen(layer, 5)):
        expected, mean, std = reference(x, mean, std, **limits(step))
        stats = variables["batch_stats"]
        assert_close(y, expected, num=128)
        assert_close(stats["mean"], mean, num=128)
        assert_close(stats["var"], std**2 - EPS, num=128)
        assert int(stats["step"]) == step + 1
        assert_close(module(x), expected, num=128)
        assert_close(module.mean[...], mean, num=128)
        assert_close(module.var[...], std**2 - EPS, num=128)
        assert int(module.step[...]) == step + 1

    evaluated = layer.clone(use_running_average=True).apply(variables, x)
    assert_close(evaluated, (np.float64(x) - mean) / std, num=128)
    module.eval()
    assert_close(module(x), (np.float64(x) - mean) / std, num=128)
    assert int(module.step[...]) == 5  # evaluation does not count


def test_the_default_schedule_is_the_papers():
    steps = jnp.array([0, 5_000, 15_000, 25_000, 40_000, 10**6])
    assert_close(jax.vmap(R_MAX)(steps), np.interp(steps, [5e3, 4e4], [1, 3]))
    assert_close(jax.vmap(D_MAX)(steps), np.interp(steps, [5e3, 2.5e4], [0, 5]))
    assert LINEN(use_running_average=False) == LINEN(use_running_average=False)


@pytest.mark.parametrize(
    "schedule",
    [Ramp(1, 3, 1.0, 2.0), optax.linear_schedule(1.0, 2.0, 2, 1), lambda t: 1 + t],
)
def test_a_schedule_is_any_function_of_the_step_and_needs_no_new_compilation(schedule):
    layer = LINEN(use_running_average=False, r_max=schedule, d_max=0.0)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    x = 10 * cases.inputs((16, 3))
    count = 0

    @jax.jit
    def step(variables):
        nonlocal count
        count += 1
        return layer.apply(variables, x, mutable=["batch_stats"])

    normal, _ = sbn.batch_norm(x)
    for t in range(4):
        var = np.asarray(variables["batch_stats"]["var"], np.float64)
        unlimited = np.sqrt((np.var(np.float64(x), 0) + EPS) / (var + EPS))
        assert (unlimited > 4).all()
        y, updates = step(variables)
        variables = {**variables, **updates}
        expected = np.minimum(float(schedule(jnp.array(t))), unlimited)
        assert_close(y.std(0) / normal.std(0), expected, num=16)
    assert count == 1


def test_schedules_out_of_range_count_as_the_nearest_limit():
    x = cases.inputs(SHAPE)
    low = {"r_max": jnp.array(0.5), "d_max": jnp.array(-1.0)}
    y, _ = sbn.alternatives.batch_renorm(x, running=RUNNING, **low)
    assert_close(y, np.asarray(sbn.batch_norm(x)[0]), num=128)


@pytest.mark.parametrize(("limit", "value"), [("r_max", 0.5), ("d_max", -1.0)])
def test_limits_out_of_range_are_refused(limit, value):
    layer = LINEN(use_running_average=False, **{limit: value})
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=f"Expected {limit} in .* got {limit}="):
        layer.apply(variables, jnp.ones((4, 3)), mutable=["batch_stats"])


def test_masked_positions_are_not_measured():
    x = cases.inputs(SHAPE).at[4:].set(jnp.nan)
    mask = (jnp.arange(8) < 4).reshape(8, 1, 1, 1)
    options = {"running": RUNNING, "r_max": 3.0, "d_max": 5.0}
    y, measured = sbn.alternatives.batch_renorm(x, mask=mask, **options)
    expected, of_rest = sbn.alternatives.batch_renorm(x[:4], **options)
    assert_close(y[:4], np.asarray(expected), num=64)
    assert_close(measured.var, np.asarray(of_rest.var), num=64)


def test_a_mask_without_a_true_leaves_the_statistics_but_counts():
    layer = LINEN(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    y, updates = layer.apply(
        variables,
        cases.inputs((8, 3)),
        mask=jnp.zeros((8, 1), bool),
        mutable=["batch_stats"],
    )
    assert np.isfinite(y).all()
    stats = updates["batch_stats"]
    assert_same_to_rounding(
        {n: stats[n] for n in ("mean", "var")},
        {n: variables["batch_stats"][n] for n in ("mean", "var")},
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_channels_and_single_rows_are_finite(rows, value):
    layer = LINEN(use_running_average=False, r_max=3.0, d_max=5.0)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))

    def loss(x):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.sin(y).sum(), (y, updates)

    grad, rest = jax.grad(loss, has_aux=True)(jnp.full((rows, 3), value))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((grad, rest)))


def test_devices_pool_their_statistics():
    x = cases.inputs((8, 4, 3))
    options = {"running": RUNNING, "r_max": 1.5, "d_max": 0.5}
    y, pooled = jax.vmap(
        functools.partial(sbn.alternatives.batch_renorm, axis_name="i", **options),
        axis_name="i",
    )(x)
    expected, measured = sbn.alternatives.batch_renorm(x.reshape(32, 3), **options)
    assert_close(y.reshape(32, 3), np.asarray(expected), num=32)
    assert_close(pooled.var[3], np.asarray(measured.var), num=32)


SAMPLER = sbn.FeatureSampling(1 / 4)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_folded_into_a_convolution_it_is_the_layers_one_by_one(api, x64):
    x = cases.inputs((8, 6, 6, 2), "float64")
    options = {"param_dtype": jnp.float64, "sampler": SAMPLER, "momentum": 0.9}
    norm = {"r_max": 1.2, "d_max": 0.1}
    key = jax.random.key(5)
    if api == "linen":
        folded = sbn.linen.ConvNorm(
            3,
            (3, 3),
            use_running_average=False,
            **options,
            norm_cls=functools.partial(LINEN, **norm),
        )
        variables = folded.init(jax.random.key(0), x)

        class OneByOne(nn.Module):
            @nn.compact
            def __call__(self, x):
                dtype = {"param_dtype": jnp.float64}
                x = nn.Conv(3, (3, 3), use_bias=False, name="conv", **dtype)(x)
                return LINEN(use_running_average=False, name="norm", **options, **norm)(
                    x
                )

        def loss(model, params, x):
            variables_ = {**variables, "params": params}
            apply = functools.partial(model.apply, mutable=["batch_stats"])
            y, updates = apply(variables_, x, rngs={"sampling": key})
            return jnp.sin(y).sum(), (y, updates)

        results = [
            jax.value_and_grad(functools.partial(loss, model), (0, 1), has_aux=True)(
                variables["params"], x
            )
            for model in (folded, OneByOne())
        ]
    else:
        module = sbn.nnx.ConvNorm(
            2,
            3,
            (3, 3),
            **options,
            rngs=nnx.Rngs(0),
            norm_cls=functools.partial(NNX, **norm),
        )
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def loss(one_by_one, params, x):
            module = nnx.merge(graph, params, rest, copy=True)
            y = module.norm(module.conv(x)) if one_by_one else module(x)
            return jnp.sin(y).sum(), (y, nnx.state(module, nnx.BatchStat))

        results = [
            jax.value_and_grad(functools.partial(loss, way), (0, 1), has_aux=True)(
                params, x
            )
            for way in (False, True)
        ]
    assert_same_to_rounding(*results, rtol=1e-11)


def test_checkpoints_restore_the_step_and_targets_copy_the_statistics():
    layer = LINEN(use_running_average=False, momentum=0.9, **SCHEDULES)
    *_, (x, _, variables) = trained_linen(layer, 3)
    saved = serialization.to_bytes(variables)
    fresh = layer.init(jax.random.key(0), jnp.zeros((1, *SHAPE[1:])))
    restored = serialization.from_bytes(fresh, saved)
    apply = functools.partial(layer.apply, mutable=["batch_stats"])
    assert_same_to_rounding(apply(restored, x), apply(variables, x), rtol=0)
    assert int(restored["batch_stats"]["step"]) == 3

    # A target network in reinforcement learning follows slowly, but for the counter.
    target = optax.incremental_update(variables, fresh, 0.25)
    mean = target["batch_stats"]["mean"]
    assert_close(mean, 0.25 * np.asarray(variables["batch_stats"]["mean"]))

    online = NNX(3, rngs=nnx.Rngs(0), momentum=0.9, **SCHEDULES)
    online(x)
    copy = NNX(3, rngs=nnx.Rngs(1), momentum=0.9, **SCHEDULES)
    nnx.update(copy, nnx.state(online))
    assert_same_to_rounding(copy(x), online(x), rtol=0)


def test_plain_batch_norm_reads_the_statistics():
    layer = LINEN(use_running_average=False, momentum=0.5)
    *_, (x, _, variables) = trained_linen(layer, 2)
    stats = {n: variables["batch_stats"][n] for n in ("mean", "var")}
    y = nn.BatchNorm(use_running_average=True).apply(
        {**variables, "batch_stats": stats}, x
    )
    expected = layer.clone(use_running_average=True).apply(variables, x)
    assert_close(y, np.asarray(expected))
