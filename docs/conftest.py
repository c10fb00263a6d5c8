"""Errors in the examples end with their message, as doctest expects them to."""

import jax

# Else JAX adds a note, which doctest of Python 3.11.2 takes for the message.
jax.config.update("jax_traceback_filtering", "off")
