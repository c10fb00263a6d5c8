"""How tests and doctests trace and compile programs, and that these are kept."""

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src import compiler
from jax._src.interpreters import mlir

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
    # XLA reads its flags once: before those are set that are for other processes.
    compiler.get_compile_options(num_replicas=1, num_partitions=1)
    _compile(quick=True)  # fixtures of whole modules, too


def pytest_collection_finish() -> None:
    """Spares the garbage collector what lives as long as the tests do."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# Programs share what MLIR registers first: for a small one it is a third of the work.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """Lets the programs that a module traced go.

    MLIR looks through all that it keeps to make the next: after some thousands of
    programs that takes longer than all else.
    """
    yield
    jax.clear_caches()
    mlir.make_ir_context.cache_clear()


@functools.wraps(compiler.get_compile_options)
def _quick_options(*args: Any, **kwargs: Any) -> Any:
    options = _compile_options(*args, **kwargs)
    options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
    return options


_compile_options = compiler.get_compile_options


def _compile(quick: bool) -> None:
    """Leaves out LLVM's optimizations, too. Without ``quick``, as users compile."""
    jax.config.update("jax_disable_most_optimizations", quick)
    compiler.get_compile_options = _quick_options if quick else _compile_options


@pytest.fixture(autouse=True)
def _compile_fast(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Compiles fast, here and in processes of a test, unless marked ``optimized``.

    Most tests mostly compile. What XLA itself makes of a program stays the same.
    """
    if request.node.get_closest_marker("optimized"):
        _compile(quick=False)
        yield
        _compile(quick=True)
        return
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    monkeypatch.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *flags]))
    yield
