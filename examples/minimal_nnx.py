"""Trains a small network on real digits with Flax NNX: read it from top to bottom."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits  # pip install '.[examples]'

import flax_sbn as sbn

EPOCHS, BATCH_SIZE = 5, 64


class Net(nnx.Module):
    """Three convolutions, each with its norm and ReLU folded into it."""

    def __init__(self, rngs):
        def layer(in_features, out_features, strides):
            return sbn.nnx.ConvNorm(
                in_features,
                out_features,
                (3, 3),
                strides,
                sampler=sbn.LatticeSampling(),
                momentum=0.9,
                activation=nnx.relu,
                rngs=rngs,
            )

        self.layers = nnx.List([layer(1, 16, 1), layer(16, 32, 2), layer(32, 32, 1)])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Returns the logits of images ``(N, H, W, C)``."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


# 1,797 scans of 8 x 8 pixels, a quarter of them for the test.
digits = load_digits()
images, labels = digits.images[..., None].astype(np.float32) / 16, digits.target
(x_test, x_train), (y_test, y_train) = (np.split(a, [450]) for a in (images, labels))

model = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    """Returns the loss of a step. The sample is fixed: nothing is drawn."""

    def loss_fn(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


rng = np.random.default_rng(0)
model.train()
for epoch in range(1, EPOCHS + 1):
    losses = []
    for chosen in np.split(rng.permutation(len(x_train))[: 21 * BATCH_SIZE], 21):
        losses.append(train_step(model, optimizer, x_train[chosen], y_train[chosen]))
    print(f"epoch {epoch}: loss {jnp.stack(losses).mean():.3f}")

model.eval()
print(f"test accuracy {(model(x_test).argmax(-1) == y_test).mean():.1%}")
