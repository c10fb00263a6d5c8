"""Numbers that change during training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# A number, or a function of the step such as those of optax.
Schedule = float | Callable[[jax.Array], jax.typing.ArrayLike]


def value_at(schedule: Schedule, step: jax.Array) -> float | jax.Array:
    """Returns a schedule's value at a step; a number is itself.

    Args:
      schedule: a number, or a function of the step.
      step: number of training steps so far, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> value_at(3.0, jnp.array(7)), value_at(lambda step: step / 2, jnp.array(7))
      (3.0, Array(3.5, dtype=float32, weak_type=True))
    """
    return jnp.asarray(schedule(step)) if callable(schedule) else schedule


def ramp(begin: int, end: int, low: float, high: float) -> Schedule:
    """Returns a schedule: ``low`` up to ``begin``, linear to ``high`` at ``end``.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(ramp(10, 20, 1.0, 3.0)(jnp.array(step))) for step in (0, 15, 30)]
      [1.0, 2.0, 3.0]
    """

    def schedule(step: jax.Array) -> jax.Array:
        return jnp.interp(step, jnp.array([begin, end]), jnp.array([low, high]))

    return schedule
