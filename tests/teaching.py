"""What every error has to do: say what was given and how to mend it, while tracing."""

import re
from collections.abc import Callable
from typing import Any

import jax
import pytest


def message_while_tracing(
    shape: tuple[int, ...],
    call: Callable[[jax.Array], Any],
    error: type[Exception],
    given: str,
    fix: str,
) -> str:
    """Returns the message of the error, which names what was given and the fix."""
    pattern = f"(?s)(?=.*{re.escape(given)}).*{re.escape(fix)}"
    with pytest.raises(error, match=pattern) as raised:
        jax.eval_shape(call, jax.ShapeDtypeStruct(shape, "float32"))
    return str(raised.value)
