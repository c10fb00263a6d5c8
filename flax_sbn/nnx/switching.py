"""Any NNX model with sampled and folded norms, in place, its source untouched."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from flax_sbn.lattice import LatticeSampling
from flax_sbn.modules import switching
from flax_sbn.nnx.batch_norm import BatchNorm
from flax_sbn.nnx.input_statistics import set_class
from flax_sbn.nnx.linear_norm import FLAX_CALLS
from flax_sbn.nnx.variables import evaluates, fork_stream
from flax_sbn.sampling import Sampler, needs_key

M = TypeVar("M", bound=nnx.Module)

# What a copy of Flax's class may lack.
_DEFAULTS = {
    "axis": -1,
    "axis_name": None,
    "axis_index_groups": None,
    "dtype": None,
    "promote_dtype": staticmethod(promote_dtype),
}
# Attributes that a switched norm has, and Flax's has not.
_OURS = (
    "sampler",
    "running_weight",
    "ghost_groups",
    "rng_collection",
    "rngs",
    "fold",
    "path",
)


def sample_norms(
    model: M,
    sampler: Sampler | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    running_weight: float = 0.0,
    fold: bool = True,
    only: switching.Only | None = None,
    norm_types: tuple[type, ...] = (),
    rng_collection: str = "sampling",
) -> M:
    """Makes the batch norms of a model measure a sample, in place.

    In training every :class:`flax.nnx.BatchNorm` in it is a
    :class:`flax_sbn.nnx.BatchNorm` with the sampler. Where its input is the very output
    of a :class:`flax.nnx.Conv` or :class:`flax.nnx.Linear`, and the call is compiled,
    it is folded into that layer, as by :class:`flax_sbn.nnx.ConvNorm`. Output and
    gradients are those of the unfolded layers, up to rounding. Evaluation is the
    model's own, bit for bit.

    Objects keep their identity and only change class. Paths, parameters, statistics,
    shared layers, checkpoints and an optimizer's state are untouched, so you can do
    this after loading. :func:`plain_norms` undoes it.

    Put :func:`flax_sbn.fused_relu` around the call of a model that uses
    :func:`flax.nnx.relu`, inside the function that is compiled.

    Args:
      model: the model.
      sampler: which positions are measured; None for :class:`flax_sbn.LatticeSampling`.
      rngs: keys for samplers that draw.
      running_weight: how far a step's statistics are moved towards the running ones
        before normalizing, in [0, 1]; see :func:`flax_sbn.renormalize`.
      fold: whether norms are folded where they can be.
      only: a function of a norm's path and the module that says whether to switch it.
        None for every norm.
      norm_types: your own batch norm classes, with the call and the attributes of
        Flax's. Only parameters, statistics, ``momentum``, ``epsilon`` and
        ``use_running_average`` must be there. Subclasses of Flax's without a
        ``__call__`` of their own are switched anyway.
      rng_collection: see :class:`flax_sbn.nnx.BatchNorm`.

    Returns:
      The same model.

    Raises:
      TypeError: if ``model`` is not an NNX module, ``sampler`` is not a sampler, or a
        norm of ``norm_types`` lacks an attribute.
      ValueError: if nothing matches, or keys are needed and missing.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import flax_sbn as sbn
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
      >>> sbn.nnx.sample_norms(model) is model
      True
      >>> [norm] = sbn.nnx.switch_report(model, x).norms
      >>> norm.treatment, norm.layer
      ('folded', 'layers/0')
    """
    other = "Switch Linen models with flax_sbn.linen.sample_norms."
    switching.check_module(model, nnx.Module, "NNX", other)
    sampler = LatticeSampling() if sampler is None else sampler
    draws = needs_key(sampler)
    if draws and rngs is None:
        raise ValueError(
            f"Expected rngs for {sampler}, got {rngs=}. Pass rngs=nnx.Rngs(0)."
        )
    streams = rngs or nnx.Rngs()
    norms = [
        (path, norm)
        for path, norm in _modules(model)
        if _is_norm(norm, tuple(norm_types)) and (only is None or only(path, norm))
    ]
    if not norms:
        raise switching.complain_of_no_norm(model, "flax.nnx.BatchNorm")
    for _, norm in norms:
        switching.check_copy(norm, "flax.nnx.BatchNorm", "mean", "var", "scale", "bias")
    for path, norm in norms:
        _change_class(norm, _Norm)
        norm.sampler, norm.running_weight = sampler, running_weight
        norm.ghost_groups, norm.fold, norm.path = 1, fold, path
        norm.rng_collection = rng_collection
        norm.rngs = nnx.data(
            fork_stream(streams, rng_collection, str(sampler)) if draws else None
        )
    for path, layer in _modules(model):
        linear = type(layer).__call__ in FLAX_CALLS
        if linear and layer.promote_dtype is promote_dtype:
            _change_class(layer, _Linear)
            layer.path = path
    return model


def plain_norms(model: M) -> M:
    """Undoes what :func:`sample_norms` did, in place, and returns the model."""
    for _, layer in _modules(model):
        if isinstance(layer, _Norm | _Linear):
            set_class(layer, type(layer).plain)
            for name in _OURS:
                if hasattr(layer, name):
                    delattr(layer, name)
    return model


def switch_report(
    model: nnx.Module, *args: Any, **kwargs: Any
) -> switching.SwitchReport:
    """Says what becomes of each norm of a switched model, and why. Nothing is computed.

    Args:
      model: what :func:`sample_norms` was given. It stays as it is.
      *args: what the model is called with in training; a
        :class:`jax.ShapeDtypeStruct` serves for an array.
      **kwargs: further arguments of the call.

    Returns:
      A report, which prints as a table.

    Raises:
      ValueError: if the model was not switched, or is in evaluation mode.
    """
    graph, state = nnx.split(model)

    def run(state: Any, *args: Any) -> None:
        nnx.merge(graph, state)(*args, **kwargs)

    with switching.reporting() as found:
        jax.eval_shape(run, state, *args)
    relus = [
        switching.written((*path, name))
        for path, module in _modules(model)
        for name, value in vars(module).items()
        if value is jax.nn.relu
    ]
    return switching.report_on(
        found,
        relus,
        model=model,
        train="Call model.train() first.",
        fuses_relu=False,
    )


def _modules(model: nnx.Module) -> Iterator[tuple[switching.Path, Any]]:
    """Yields paths and modules, each module once."""
    seen = set()  # without NNX's graph mode, a shared module comes several times
    for path, module in nnx.iter_modules(model):
        if id(module) not in seen:
            seen.add(id(module))
            yield tuple(map(str, path)), module


def _is_norm(module: nnx.Module, norm_types: tuple[type, ...]) -> bool:
    calls = (nnx.BatchNorm.__call__, _Norm.__call__)
    return isinstance(module, norm_types) or type(module).__call__ in calls


def _change_class(layer: nnx.Module, mixed_in: type) -> None:
    if not isinstance(layer, mixed_in):
        set_class(layer, _switched(type(layer), mixed_in))


@functools.cache
def _switched(plain: type, mixed_in: type) -> type:
    """Returns the class of a layer with another call; the same for the same class."""
    defaults = _DEFAULTS if mixed_in is _Norm else {}
    lacking = {n: value for n, value in defaults.items() if not hasattr(plain, n)}
    members = {
        **lacking,
        "plain": plain,
        "__reduce_ex__": _reduce,
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (mixed_in, plain), members)


def _reduce(layer: Any, protocol: Any) -> Any:
    """Pickles an object of a class that no module has a name for."""
    mixed_in = _Norm if isinstance(layer, _Norm) else _Linear
    return _new, (type(layer).plain, mixed_in), vars(layer)


def _new(plain: type, mixed_in: type) -> Any:
    return object.__new__(_switched(plain, mixed_in))


class _Linear(nnx.Module):
    """Mixed into a convolution or dense layer: remembers how it made its output."""

    plain: type
    path: switching.Path

    def __call__(self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        y = super().__call__(inputs, *args, **kwargs)
        if not args and not kwargs:
            bias = None if self.bias is None else self.bias[...]
            switching.remember(self.path, self, inputs, self.kernel[...], bias, y)
        return y


class _Norm(BatchNorm):
    """Mixed into a batch norm: folds into the layer before it, if there is one."""

    plain: type
    path: switching.Path
    fold: bool
    sampler: Sampler

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        plain = functools.partial(type(self).plain.__call__, self, *args, **kwargs)
        return self._switched(plain, *args, **kwargs)

    def _switched(
        self,
        plain: Callable[[], jax.Array],
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Measures a sample, and folds if it can."""
        evaluate = evaluates(self, use_running_average)
        norm_call = self.path, x, self.axis, self.sampler
        if switching.stays_plain(*norm_call, evaluate):
            return plain()
        product = switching.layer_to_fold(*norm_call, self.fold and self._folds())
        if product is None:
            return super().__call__(x, use_running_average, mask=mask)
        norm = functools.partial(product.norm, promoted=[self.mean[...]])
        y, _ = self._step(norm, *self._values(), mask)
        return y
