"""Numbers that change during training."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A schedule: ``low`` up to ``begin``, linear to ``high`` at ``end``.

    Ramps of the same numbers are equal, and so are the layers that hold them.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(Ramp(10, 20, 1.0, 3.0)(jnp.array(step))) for step in (0, 15, 30)]
      [1.0, 2.0, 3.0]
    """

    begin: int
    end: int
    low: float
    high: float

    def __call__(self, step: jax.Array) -> jax.Array:
        """Returns the value at a step."""
        steps, values = (self.begin, self.end), (self.low, self.high)
        return jnp.interp(step, jnp.array(steps), jnp.array(values))
