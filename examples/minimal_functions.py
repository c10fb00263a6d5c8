"""Trains a small network on real digits with functions alone: from top to bottom."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits  # pip install '.[examples]'

import flax_sbn as sbn

EPOCHS, BATCH_SIZE = 5, 64
SIZES, STRIDES = [(1, 16), (16, 32), (32, 32)], [1, 2, 1]
LATTICE = sbn.LatticeSampling()

init = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0), 4)
params = {
    "convs": [
        {"kernel": init(key, (3, 3, m, n)), "scale": jnp.ones(n), "bias": jnp.zeros(n)}
        for key, (m, n) in zip(keys[:3], SIZES, strict=True)
    ],
    "head": init(keys[3], (32, 10)),
}
running = [sbn.Statistics(jnp.zeros(n), jnp.ones(n)) for _, n in SIZES]


def forward(params, x, running=None):
    """Returns logits and what was measured; normalizes with `running` if given."""
    measured = []
    for i, layer in enumerate(params["convs"]):
        x, statistics = sbn.conv_norm(
            x,
            **layer,
            strides=STRIDES[i],
            sampler=LATTICE,
            statistics=None if running is None else running[i],
            activation=jax.nn.relu,
        )
        measured.append(statistics)
    return x.mean((1, 2)) @ params["head"], measured


# 1,797 scans of 8 x 8 pixels, a quarter of them for the test.
digits = load_digits()
images, labels = digits.images[..., None].astype(np.float32) / 16, digits.target
(x_test, x_train), (y_test, y_train) = (np.split(a, [450]) for a in (images, labels))
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, running, opt_state, x, y):
    """Returns what a step changes, and its loss."""

    def loss_fn(params):
        logits, measured = forward(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), measured

    (loss, measured), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    running = [
        sbn.update_running(*pair, 0.9) for pair in zip(running, measured, strict=True)
    ]
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), running, opt_state, loss


rng = np.random.default_rng(0)
for epoch in range(1, EPOCHS + 1):
    losses = []
    for chosen in np.split(rng.permutation(len(x_train))[: 21 * BATCH_SIZE], 21):
        params, running, opt_state, loss = train_step(
            params, running, opt_state, x_train[chosen], y_train[chosen]
        )
        losses.append(loss)
    print(f"epoch {epoch}: loss {jnp.stack(losses).mean():.3f}")

logits, _ = forward(params, x_test, running)
print(f"test accuracy {(logits.argmax(-1) == y_test).mean():.1%}")
