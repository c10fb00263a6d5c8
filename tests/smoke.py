"""Does what is installed work? Imports, metadata, a training step in Linen and in NNX.

    python smoke.py

``make dist`` runs it in an environment that holds the wheel and its dependencies alone.
"""

import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path

import jax
import optax
from flax import linen as nn
from flax import nnx

import flax_sbn as sbn

OPTIONS = {"sampler": sbn.LatticeSampling(), "activation": jax.nn.relu}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = sbn.linen.ConvNorm(8, (3, 3), **OPTIONS)(x, use_running_average=False)
        return nn.Dense(1)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = sbn.nnx.ConvNorm(3, 8, (3, 3), rngs=rngs, **OPTIONS)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x).mean((1, 2)))


def check_installation():
    """The package is the wheel's, whole, typed and licensed, and nothing is beside."""
    assert Path(sys.prefix) in Path(sbn.__file__).parents, sbn.__file__
    for module in pkgutil.walk_packages(sbn.__path__, "flax_sbn."):
        importlib.import_module(module.name)
    about, files = metadata.metadata("flax-sbn"), metadata.files("flax-sbn")
    assert about["Version"] == sbn.__version__
    assert about["License-Expression"] == "Apache-2.0"
    info = f"flax_sbn-{sbn.__version__}.dist-info"
    assert {file.parts[0] for file in files} == {"flax_sbn", info}
    for name in ("flax_sbn/py.typed", f"{info}/licenses/LICENSE"):
        assert name in map(str, files), name


def linen_losses(x, y):
    """Returns the losses of some training steps."""
    model, optimizer = Net(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def step(variables):
        def loss(params):
            y_now, updates = model.apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return ((y_now - y) ** 2).mean(), updates

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, updates), grads = grad(variables["params"])
        change, _ = optimizer.update(grads, optimizer.init(grads))
        params = optax.apply_updates(variables["params"], change)
        return {"params": params, **updates}, value

    for _ in range(5):
        variables, value = step(variables)
        yield float(value)


def nnx_losses(x, y):
    """Returns the losses of some training steps."""
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
        optimizer.update(model, grads)
        return value

    for _ in range(5):
        yield float(step(model, optimizer))


def main():
    check_installation()
    x = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
    y = x[..., :1].mean((1, 2)) + 1
    for losses in (linen_losses, nnx_losses):
        first, *_, last = losses(x, y)
        assert last < first / 2, (losses.__name__, first, last)
        print(f"{losses.__name__}: {first:.2f} falls to {last:.2f}")
    print(f"flax-sbn {sbn.__version__} works, as installed in {sys.prefix}")


if __name__ == "__main__":
    main()
