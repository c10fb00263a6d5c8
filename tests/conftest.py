"""Eight devices on the CPU for every test, and float64 for those that ask for it."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64() -> Iterator[None]:
    """Enables float64 for one test."""
    with jax.enable_x64(True):
        yield
