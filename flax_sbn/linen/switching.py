"""Any Linen model with sampled and folded norms, its source untouched."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from flax_sbn.activation import fused_relu
from flax_sbn.lattice import LatticeSampling
from flax_sbn.linen.batch_norm import BatchNorm, shared_options
from flax_sbn.linen.variables import evaluates
from flax_sbn.modules import switching
from flax_sbn.normalization import batch_norm
from flax_sbn.sampling import Sampler, needs_key
from flax_sbn.statistics import feature_shape

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class _Options:
    sampler: Sampler
    running_weight: float
    fold: bool
    only: switching.Only | None
    norm_types: tuple[type, ...]
    fuse_relu: bool
    rng_collection: str


def sample_norms(
    model: M,
    sampler: Sampler | None = None,
    *,
    running_weight: float = 0.0,
    fold: bool = True,
    only: switching.Only | None = None,
    norm_types: tuple[type, ...] = (),
    fuse_relu: bool = True,
    rng_collection: str = "sampling",
) -> M:
    """Returns a model whose batch norms measure a sample, with nothing else changed.

    In training every :class:`flax.linen.BatchNorm` in it is a
    :class:`flax_sbn.linen.BatchNorm` with the sampler. Where its input is the very
    output of a :class:`flax.linen.Conv` or :class:`flax.linen.Dense`, and the model is
    compiled, it is folded into that layer, as by :class:`flax_sbn.linen.ConvNorm`.
    Output and gradients are those of the unfolded layers, up to rounding. ``init`` and
    evaluation are the model's own, bit for bit. Variables, calls, class name and
    checkpoints are the same: the given model is this one's plain form.

    Samplers that draw take an rng stream, as in :class:`flax_sbn.linen.BatchNorm`.

    Args:
      model: a module that is not bound to variables.
      sampler: which positions are measured; None for :class:`flax_sbn.LatticeSampling`.
      running_weight: how far a step's statistics are moved towards the running ones
        before normalizing, in [0, 1]; see :func:`flax_sbn.renormalize`.
      fold: whether norms are folded where they can be.
      only: a function of a norm's path and the module that says whether to switch it.
        None for every norm.
      norm_types: your own batch norm classes, with the fields, variables and call of
        Flax's. Subclasses of Flax's without a ``__call__`` of their own are switched
        anyway.
      fuse_relu: whether, while the model runs, :func:`jax.nn.relu` is differentiated in
        the way of :func:`flax_sbn.relu`, which stays fused. The gradients are the same.
      rng_collection: see :class:`flax_sbn.linen.BatchNorm`.

    Returns:
      A model of a class derived from the model's own.

    Raises:
      TypeError: if ``model`` is not a Linen module, ``sampler`` is not a sampler, or a
        norm of ``norm_types`` lacks a field.
      ValueError: if the model is bound; in ``init``, if nothing matches.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.Conv(8, (3, 3), use_bias=False)(x)
      ...         return nn.relu(nn.BatchNorm(not train)(x))
      >>> model = sbn.linen.sample_norms(Net())
      >>> x = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
      >>> variables = model.init(jax.random.key(1), x, train=True)
      >>> y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
      >>> y.shape
      (32, 16, 16, 8)
    """
    other = "Switch NNX models with flax_sbn.nnx.sample_norms."
    switching.check_module(model, nn.Module, "Linen", other)
    sampler = LatticeSampling() if sampler is None else sampler
    needs_key(sampler)  # complains
    if model.scope is not None or isinstance(model.parent, nn.Module):
        raise ValueError(
            f"Expected a model of its own, got a {type(model).__name__} that is bound "
            "to variables or part of another module. Switch the outermost module."
        )
    options = _Options(
        sampler,
        running_weight,
        fold,
        only,
        tuple(norm_types),
        fuse_relu,
        rng_collection,
    )
    return _rebuild(type(model), _given(model), options)


def switch_report(
    model: nn.Module, *args: Any, rngs: Any = None, **kwargs: Any
) -> switching.SwitchReport:
    """Says what becomes of each norm of a switched model, and why. Nothing is computed.

    Args:
      model: what :func:`sample_norms` returned.
      *args: what the model is called with in training; a
        :class:`jax.ShapeDtypeStruct` serves for an array.
      rngs: see :meth:`flax.linen.Module.apply`; None for any key.
      **kwargs: further arguments of the call.

    Returns:
      A report, which prints as a table.

    Raises:
      ValueError: if the model was not switched, has no norm to switch, or is in
        evaluation mode.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> net = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(False)])
      >>> model = sbn.linen.sample_norms(net)
      >>> [norm] = sbn.linen.switch_report(model, jnp.ones((32, 16, 16, 3))).norms
      >>> norm.treatment, norm.layer
      ('folded', 'layers_0')
    """
    key = jax.random.key(0)
    rngs = key if rngs is None else rngs
    initial = {"params": key, **rngs} if isinstance(rngs, Mapping) else rngs

    def run(*args: Any) -> None:
        variables = model.init(initial, *args, **kwargs)
        found.clear()  # what was applied in `init`
        model.apply(variables, *args, mutable=True, rngs=rngs, **kwargs)

    with switching.reporting() as found:
        jax.eval_shape(run, *args)
    relus = [
        f"{type(model).__name__}.{field.name}"
        for field in dataclasses.fields(model)
        if getattr(model, field.name, None) is jax.nn.relu
    ]
    return switching.report_on(
        found,
        relus,
        model=model,
        train="Pass what the model takes in training, such as train=True.",
        fuses_relu=getattr(type(model), "fuses_relu", False),
    )


def _given(model: nn.Module) -> dict[str, Any]:
    """Returns the fields that a model was made with."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name != "parent"
    }


def _rebuild(cls: Any, fields: dict[str, Any], options: _Options) -> Any:
    return _switched(cls, options)(**fields)


# What jax.jit has traced for the plain model does not serve the switched one.
_context = jax.make_user_context()


@contextlib.contextmanager
def _switched_calls(options: _Options) -> "Iterator[_Interceptor]":
    """Intercepts calls of methods, if that is not already done."""
    active = _active.get()
    if active is not None and active.options == options:
        yield active
        return
    interceptor = _Interceptor(options)
    relu = fused_relu() if options.fuse_relu else contextlib.nullcontext()
    token = _active.set(interceptor)
    try:
        with nn.intercept_methods(interceptor), _context(options), relu:
            yield interceptor
    finally:
        _active.reset(token)


@functools.cache
def _switched(cls: Any, options: _Options) -> Any:
    """Returns a class whose calls are intercepted; the same for the same arguments."""

    # The one place that all calls of methods come through, by whatever name.
    @nn.nowrap
    def _call_wrapped_method(self: Any, fun: Any, args: Any, kwargs: Any) -> Any:
        with _switched_calls(options) as interceptor:
            result = super(derived, self)._call_wrapped_method(fun, args, kwargs)
        named = getattr(fun, "__name__", "")
        if named == "__call__" and self.is_initializing() and not interceptor.norms:
            raise switching.complain_of_no_norm(self, "flax.linen.BatchNorm")
        return result

    @nn.nowrap
    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        # `method` may be a function that calls submodules.
        with _switched_calls(options):
            return super(derived, self).apply(*args, **kwargs)

    def reduce(self: Any) -> Any:
        return _rebuild, (cls, _given(self), options)

    members = {
        "_call_wrapped_method": _call_wrapped_method,
        "apply": apply,
        "__reduce__": reduce,
        "fuses_relu": options.fuse_relu,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    derived: Any = type(cls.__name__, (cls,), members)
    return derived


class _Interceptor:
    """Notes what linear layers make, and does the batch norms' work."""

    def __init__(self, options: _Options) -> None:
        self.options = options
        self.norms = 0

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name == "__call__":
            if _is_linear(module):
                return _remembered(module, call, *args, **kwargs)
            if self._switches(module):
                self.norms += 1
                plain = functools.partial(call, *args, **kwargs)
                return self._norm(module, plain, *args, **kwargs)
        return call(*args, **kwargs)

    def _switches(self, module: nn.Module) -> bool:
        own = type(module)
        if not (
            issubclass(own, self.options.norm_types)
            or own.__call__ is nn.BatchNorm.__call__
        ):
            return False
        return self.options.only is None or self.options.only(module.path, module)

    def _norm(
        self,
        module: Any,
        plain: Callable[[], Any],
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Any:
        """Measures a sample, and folds if it can."""
        switching.check_copy(module, "flax.linen.BatchNorm")
        if module.is_initializing():
            return plain()
        options, axis = self.options, getattr(module, "axis", -1)
        evaluate = evaluates(module.use_running_average, use_running_average)
        norm_call = module.path, x, axis, options.sampler
        if switching.stays_plain(*norm_call, evaluate):
            return plain()
        product = switching.layer_to_fold(*norm_call, options.fold)
        norm: switching.Norm = functools.partial(batch_norm, x, axis=axis)
        if product is not None:
            norm = product.norm
        ours = BatchNorm(
            **shared_options(module, nn.BatchNorm),
            sampler=options.sampler,
            running_weight=options.running_weight,
            rng_collection=options.rng_collection,
            parent=module.scope,
        )
        features = feature_shape(x.shape, axis)
        y, _ = ours._step(norm, *ours._values(features), mask)
        return y


_active: contextvars.ContextVar[_Interceptor | None] = contextvars.ContextVar(
    "active", default=None
)


def _is_linear(module: Any) -> bool:
    """Whether a module computes what Flax's layer does, of the kernel it stores."""
    own = type(module)
    return (
        isinstance(module, nn.Conv | nn.Dense)  # ConvLocal has the call of Conv
        and own.__call__ in (nn.Conv.__call__, nn.Dense.__call__)
        and own.param is nn.Module.param
        and module.promote_dtype is promote_dtype
    )


def _remembered(module: Any, call: Callable[..., Any], inputs: jax.Array) -> Any:
    y = call(inputs)
    if not module.is_initializing():
        read = functools.partial(module.get_variable, "params")
        kernel, bias = nn.meta.unbox((read("kernel"), read("bias")))
        switching.remember(module.path, module, inputs, kernel, bias, y)
    return y
