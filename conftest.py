"""How tests and doctests trace and compile programs, and that these are kept."""

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import compiler

# Of XLA's options, those that leave programs as they are and shorten making code of
# them: no MLIR for what is fused, and one module for LLVM instead of many.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


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


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives as long as the tests do."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@functools.cache
def _quick_is_known() -> bool:
    """Whether this version of XLA has these options."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=QUICK)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.wraps(compiler.get_compile_options)
def _quick_options(*args: Any, **kwargs: Any) -> Any:
    options = _compile_options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
    return options


_compile_options = compiler.get_compile_options


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
    if _quick_is_known():
        monkeypatch.setattr(compiler, "get_compile_options", _quick_options)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
