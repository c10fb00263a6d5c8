"""Whether an NNX layer trains or evaluates."""

from typing import Any


def evaluates(layer: Any, use_running_average: bool | None) -> bool:
    """Returns what a call says or, where it says nothing, the layer.

    Args:
      layer: has the attribute ``use_running_average``.
      use_running_average: the argument of the call.

    Raises:
      ValueError: if both are None.
    """
    for given in (use_running_average, layer.use_running_average):
        if given is not None:
            return bool(given)
    raise ValueError(
        "Expected use_running_average in the constructor or the call, got None in "
        "both. Use model.train() and model.eval(), or pass it."
    )
