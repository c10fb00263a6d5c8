"""The IC layer: batch norm against its equation, and what dropout makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flax_sbn as sbn
from tests import cases, reference, samples, teaching
from tests.closeness import assert_close
from tests.samples import KEY

SHAPE = (8, 4, 3, 2)
RATE = 0.3


class Linen:
    """A linen layer with its state, called as an nnx layer is."""

    def __init__(self, **options):
        self.layer = sbn.linen.IC(**options)
        init = functools.partial(self.layer.init, use_running_average=False)
        self.state = init(KEY, jnp.zeros((1, *SHAPE[1:])))
        self.steps = 0

    def __call__(self, x, evaluate=False, **options):
        self.steps += 1
        keys = jax.random.split(jax.random.key(self.steps))
        rngs = {} if evaluate else dict(zip(("dropout", "sampling"), keys, strict=True))
        y, updates = self.layer.apply(
            self.state, x, evaluate, rngs=rngs, mutable=["batch_stats"], **options
        )
        self.state = {**self.state, **updates}
        return y

    def statistics(self):
        norm = self.state["batch_stats"]["norm"]
        return norm["mean"], norm["var"]


class Nnx:
    """An nnx layer."""

    def __init__(self, **options):
        self.layer = sbn.nnx.IC(SHAPE[-1], **options, rngs=nnx.Rngs(0))

    def __call__(self, x, evaluate=False, **options):
        self.layer.eval() if evaluate else self.layer.train()
        return self.layer(x, **options)

    def statistics(self):
        return self.layer.norm.mean[...], self.layer.norm.var[...]


APIS = [Linen, Nnx]
OPTIONS = {
    "all": {},
    "sample": {"sampler": sbn.NaiveSampling(3)},
    "ghost": {"ghost_groups": 2},
}


def expected_norm(x, options):
    """Batch norm's output and statistics, averaged over the groups."""
    groups = np.split(reference.wide(x), options.get("ghost_groups", 1))
    found = [samples.moments(group, options.get("sampler")) for group in groups]
    outputs = [
        reference.normalize(group, *moments, 1.0, 0.0)
        for group, moments in zip(groups, found, strict=True)
    ]
    return np.concatenate(outputs), *np.mean(found, 0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("api", APIS)
def test_training_drops_of_the_normalized_and_evaluation_nothing(api, name):
    layer = api(rate=RATE, momentum=0.8, **OPTIONS[name])
    running = np.zeros(2), np.ones(2)
    dropped = []
    for seed in range(3):
        x = cases.inputs(SHAPE, seed=seed)
        y, (normal, *measured) = layer(x), expected_norm(x, OPTIONS[name])
        kept = np.asarray(y) != 0
        assert_close(y, np.where(kept, normal / (1 - RATE), 0), num=x.size)
        dropped.append(~kept)
        running = [
            reference.running(old, new, 0.8)
            for old, new in zip(running, measured, strict=True)
        ]
        for found, wanted in zip(layer.statistics(), running, strict=True):
            assert_close(found, wanted, num=x.size)
    assert (dropped[0] != dropped[1]).any()

    y = layer(x, evaluate=True)
    assert_close(y, reference.normalize(x, *running, 1.0, 0.0), num=x.size)
    for found, wanted in zip(layer.statistics(), running, strict=True):
        assert_close(found, wanted, num=x.size)


@pytest.mark.parametrize("api", APIS)
def test_the_share_that_is_dropped_is_the_rate(api):
    x = cases.inputs((256, 32, 2))
    assert 0.045 < (api()(x) == 0).mean() < 0.055
    assert 0.48 < (api(rate=0.5)(x) == 0).mean() < 0.52
    assert not (api(rate=0.0)(x) == 0).any()


def test_linen_and_nnx_normalize_alike():
    x = cases.inputs(SHAPE)
    options = {"rate": 0.0, "use_scale": False, "epsilon": 0.1, "running_weight": 0.5}
    options["use_fast_variance"] = False
    first, second = (api(**options) for api in APIS)
    np.testing.assert_array_equal(first(x), second(x))
    for a, b in zip(first.statistics(), second.statistics(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("api", APIS)
def test_the_gradient_is_that_of_what_was_kept(api):
    x, g = (np.asarray(cases.inputs(SHAPE, seed=i)) for i in range(2))
    layer = api(rate=RATE)

    def output(x):
        if api is Linen:
            rngs = {"dropout": KEY}
            return layer.layer.apply(
                layer.state, x, False, rngs=rngs, mutable=["batch_stats"]
            )[0]
        return nnx.clone(layer.layer)(x)

    y, pullback = jax.vjp(output, x)
    kept = (np.asarray(y) != 0) / (1 - RATE)
    shares = samples.shares(None, SHAPE)
    expected, _, _ = reference.backward(x, g * kept, shares, np.ones(2))
    assert_close(pullback(g)[0], expected, num=x.size)


@pytest.mark.parametrize("api", APIS)
def test_features_that_do_not_vary_and_masks_stay_finite(api):
    x = jnp.where(jnp.arange(8)[:, None] < 6, jnp.full((8, 2), 7.0), jnp.nan)
    layer = api()
    y = layer(x, mask=jnp.arange(8)[:, None] < 6)
    assert np.isfinite(y[:6]).all()
    for statistic in layer.statistics():
        assert np.isfinite(statistic).all()


def test_linen_draws_in_training_only():
    x = cases.inputs(SHAPE)
    layer = sbn.linen.IC(use_running_average=False, sampler=sbn.BatchSampling(4))
    variables = layer.init({"params": KEY}, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "norm": {"scale": (2,), "bias": (2,)}
    }
    keys = {"sampling": KEY, "dropout": KEY}
    layer.apply(variables, x, rngs=keys, mutable=["batch_stats"])
    for missing in keys:
        rngs = {name: key for name, key in keys.items() if name != missing}
        with pytest.raises(Exception, match=missing):
            layer.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
    evaluation = sbn.linen.IC(use_running_average=True, sampler=sbn.BatchSampling(4))
    assert evaluation.apply(variables, x).shape == SHAPE


def test_layers_of_a_network_drop_apart():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [
                sbn.linen.IC(rate=0.5, use_running_average=False)(x) for _ in range(2)
            ]

    x = cases.inputs(SHAPE)
    variables = Two().init(KEY, x)
    rngs = {"dropout": KEY}
    (a, b), _ = Two().apply(variables, x, rngs=rngs, mutable=["batch_stats"])
    assert ((a == 0) != (b == 0)).any()

    rngs = nnx.Rngs(0)
    a, b = (sbn.nnx.IC(2, rate=0.5, rngs=rngs)(x) for _ in range(2))
    assert ((a == 0) != (b == 0)).any()


def test_nnx_takes_the_switch_of_the_call_and_the_constructor():
    x = cases.inputs(SHAPE)
    layer = sbn.nnx.IC(2, rate=0.5, use_running_average=True, rngs=nnx.Rngs(0))
    assert not (layer(x) == 0).any()
    assert (layer(x, use_running_average=False) == 0).any()
    layer.train()
    assert (layer(x) == 0).any()
    assert not (layer(x, use_running_average=True) == 0).any()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 5])
def test_a_rate_out_of_range_is_refused(rate):
    for call in (
        lambda x: sbn.linen.IC(rate=rate).init(KEY, x, use_running_average=False),
        lambda x: sbn.nnx.IC(2, rate=rate, rngs=nnx.Rngs(0))(x),
    ):
        teaching.message_while_tracing(
            SHAPE, call, ValueError, f"rate={rate}", "Expected rate in [0, 1)"
        )
