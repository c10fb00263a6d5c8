"""How tests and doctests trace and compile programs, and that these are kept."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs for other workers, subprocesses and the next run.

    ``pytest --cache-clear`` empties the cache. In all of them arrays of different ranks
    do not meet unless broadcast explicitly, as in flax's own tests.
    """
    options: dict[str, Any] = {
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_numpy_rank_promotion": "raise",
    }
    if hasattr(config, "cache"):
        folder = config.cache.mkdir("jax")
        options |= {"jax_compilation_cache_dir": str(folder)}
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def _compile_fast(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Leaves out LLVM's optimizations, but for tests that are marked ``optimized``.

    Most tests mostly compile. What XLA itself makes of a program stays the same.
    """
    if request.node.get_closest_marker("optimized"):
        yield
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
