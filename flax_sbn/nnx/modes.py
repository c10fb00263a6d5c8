"""Whether an NNX layer trains or evaluates."""

from typing import Any

from flax.nnx.module import first_from


def evaluates(layer: Any, use_running_average: bool | None) -> bool:
    """Returns what a call says or, where it says nothing, the layer."""
    evaluate = first_from(
        use_running_average,
        layer.use_running_average,
        error_msg="Expected use_running_average in the constructor or the call, got "
        "None in both. Use model.train() and model.eval(), or pass it.",
    )
    return bool(evaluate)
