"""How the examples of the pages run."""

from collections.abc import Iterator

import jax
import pytest

# Else JAX adds a note, which doctest of Python 3.11.2 takes for the message.
jax.config.update("jax_traceback_filtering", "off")


@pytest.fixture(autouse=True)
def _as_users_do() -> Iterator[None]:
    """Lets arrays of different ranks meet, as by default."""
    with jax.numpy_rank_promotion("allow"):
        yield
