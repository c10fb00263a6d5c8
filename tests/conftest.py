"""Eight devices on the CPU for every test, and float64 for those that ask for it."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# How many cases are drawn, unless a test says so: pytest --hypothesis-profile=many.
settings.register_profile(
    "few", max_examples=10, deadline=None, derandomize=True, database=None
)
settings.register_profile("many", max_examples=1000, deadline=None, database=None)
settings.load_profile("few")


@pytest.fixture
def x64() -> Iterator[None]:
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield
