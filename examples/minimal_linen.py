"""Trains a small network on real digits with Flax Linen: read it from top to bottom."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits  # pip install '.[examples]'

import flax_sbn as sbn

EPOCHS, BATCH_SIZE = 5, 64


class Net(nn.Module):
    """Three convolutions, each with its norm and ReLU folded into it."""

    @nn.compact
    def __call__(self, x, train):
        """Returns the logits of images ``(N, H, W, C)``."""
        for features, strides in (16, 1), (32, 2), (32, 1):
            layer = sbn.linen.ConvNorm(
                features,
                (3, 3),
                strides,
                sampler=sbn.LatticeSampling(),
                momentum=0.9,
                activation=nn.relu,
            )
            x = layer(x, use_running_average=not train)
        return nn.Dense(10)(x.mean((1, 2)))


# 1,797 scans of 8 x 8 pixels, a quarter of them for the test.
digits = load_digits()
images, labels = digits.images[..., None].astype(np.float32) / 16, digits.target
(x_test, x_train), (y_test, y_train) = (np.split(a, [450]) for a in (images, labels))

model = Net()
variables = model.init(jax.random.key(0), x_train[:1], train=False)
params, batch_stats = variables["params"], variables["batch_stats"]
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, batch_stats, opt_state, x, y):
    """Returns what a step changes, and its loss. Nothing is drawn: there is no key."""

    def loss_fn(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


rng = np.random.default_rng(0)
for epoch in range(1, EPOCHS + 1):
    losses = []
    for chosen in np.split(rng.permutation(len(x_train))[: 21 * BATCH_SIZE], 21):
        params, batch_stats, opt_state, loss = train_step(
            params, batch_stats, opt_state, x_train[chosen], y_train[chosen]
        )
        losses.append(loss)
    print(f"epoch {epoch}: loss {jnp.stack(losses).mean():.3f}")

variables = {"params": params, "batch_stats": batch_stats}
correct = model.apply(variables, x_test, train=False).argmax(-1) == y_test
print(f"test accuracy {correct.mean():.1%}")
