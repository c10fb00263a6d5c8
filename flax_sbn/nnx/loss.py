"""How layers hand an extra loss to the training step."""

import jax
from flax import nnx


class Loss(nnx.Intermediate[jax.Array]):
    """An extra loss that a layer sows in training, for the training step to add.

    Collect it where the loss is computed, with :func:`flax.nnx.capture`, which leaves
    nothing behind in the model. Without it layers sow nothing.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=nnx.Rngs(0)), sbn.nnx.Shade(4, weight=1e-3)
      ... )
      >>> def loss_fn(model, x):
      ...     y, losses = nnx.capture(model, sbn.nnx.Loss)(x)
      ...     return (y**2).mean() + sum(jax.tree.leaves(losses))
      >>> grads = nnx.jit(nnx.grad(loss_fn))(model, jax.numpy.ones((8, 3)))
      >>> nnx.state(model, sbn.nnx.Loss)
      State({})
    """


def sow_loss(module: nnx.Module, name: str, value: jax.Array) -> None:
    """Sows a loss while ``nnx.capture`` collects them, and does nothing otherwise."""
    # Elsewhere Flax's sow sets an attribute, which would grow from call to call.
    if hasattr(module, "__captures__"):
        module.sow(Loss, name, value)
