"""A jit for tests whose work is mostly compilation."""

import functools

import jax

# Four times as fast to compile, for slower programs.
fast_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
