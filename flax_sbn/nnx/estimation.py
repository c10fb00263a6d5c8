"""Running statistics of an NNX model, measured anew over many batches."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from flax_sbn.modules.estimation import (
    Path,
    add_call,
    estimated,
    nothing_measured,
    over_batches,
)
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.input_statistics import set_class
from flax_sbn.statistics import Statistics


def estimate_statistics(
    model: nnx.Module,
    batches: Iterable[Any],
    *args: Any,
    method: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> None:
    """Sets the running statistics of all batch norms to those of all batches together.

    See :func:`flax_sbn.linen.estimate_statistics` for what is measured, and what is
    left alone. The model runs as it is: call ``model.train()`` before. Its running
    statistics are changed in place. All else is as it was, counters of training steps
    and keys included; samplers and dropout draw anew in each batch all the same.

    It covers :class:`flax.nnx.BatchNorm`, :class:`BatchNorm` and all classes derived
    from them, :class:`ConvNorm`, :class:`DenseNorm`, :class:`BNET` and :class:`IC`,
    also in ``nnx.scan``, ``nnx.vmap``, ``nnx.remat`` and ``nnx.jit``.

    Args:
      model: what is called.
      batches: what the model is called with: arrays, or trees of arrays. Wrap the
        iterable to see progress, ``tqdm(batches)``.
      *args: what the model is called with after a batch; arrays or static.
      method: a function of the module and a batch, for models that take other
        arguments: ``lambda model, batch: model(batch["image"], batch["mask"])``.
      **kwargs: further arguments of the call.

    Raises:
      TypeError: if ``batches`` is an array.
      ValueError: if there is no batch, no norm that trains, or a measured value that is
        not finite. The model is then as it was.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (1000, 1))
      >>> model.train()
      >>> sbn.nnx.estimate_statistics(model, [x[:600], x[600:]])
      >>> model.eval()
      >>> y = model(x)
      >>> print(f"{abs(y.mean()):.3f} {y.std():.3f}")
      0.000 1.000

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576.
    """
    measuring = nnx.clone(model)
    for layer in _norms(measuring).values():
        layer.all_inputs = _Measured(nothing_measured(_running(layer)))
        set_class(layer, _measuring(layer.__class__))
    split: Any = nnx.split(measuring, _CHANGING, ...)
    graph, state, rest = split
    call: Callable[..., Any] = method or type(measuring).__call__

    @jax.jit
    def step(rest: Any, state: Any, batch: Any, _: int) -> Any:
        measuring = nnx.merge(graph, state, rest)
        call(measuring, batch, *args, **kwargs)
        return nnx.state(measuring, _CHANGING)

    state = over_batches(functools.partial(step, rest), state, batches)
    nnx.update(measuring, state)
    layers = _norms(model)
    new = estimated(
        {path: _running(layer) for path, layer in layers.items()},
        {
            path: layer.all_inputs.get_value()
            for path, layer in _norms(measuring).items()
        },
    )
    for path, layer in layers.items():
        layer.mean[...], layer.var[...] = new[path]


def _norms(model: nnx.Module) -> dict[Path, Any]:
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }


def _running(norm: nnx.BatchNorm) -> Statistics:
    return Statistics(norm.mean[...], norm.var[...])


class _Measured(nnx.BatchStat[Any]):
    """What all inputs of a norm so far amount to."""


_CHANGING = (_Measured, nnx.RngState)


@functools.cache
def _measuring(norm: Any) -> type:
    """Returns a class of norms that also measure their input.

    Measured is what the call of Flax's class or of ours gets: classes that are derived
    from them may be called otherwise.
    """
    base: Any = BatchNorm if issubclass(norm, BatchNorm) else nnx.BatchNorm
    if norm is not base:
        return type("Measuring", (norm, _measuring(base)), {})

    class Measuring(base):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
            running = _running(self)
            y: jax.Array = super().__call__(*args, **kwargs)
            before = self.all_inputs.get_value()
            self.all_inputs.set_value(add_call(self, before, running, *args, **kwargs))
            return y

    return Measuring
