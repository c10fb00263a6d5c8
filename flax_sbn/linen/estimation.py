"""Running statistics of a Linen model, measured anew over many batches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import unfreeze
from flax.core.scope import CollectionFilter, union_filters
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_sbn.modules.estimation import (
    ALL_INPUTS,
    Measured,
    Path,
    add_call,
    estimated,
    nothing_measured,
    over_batches,
)
from flax_sbn.statistics import Statistics

_STATS, _RUNNING, _MEASURED = "batch_stats", ("mean", "var"), ALL_INPUTS


def estimate_statistics(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *args: Any,
    rngs: Any = None,
    mutable: CollectionFilter = False,
    **kwargs: Any,
) -> dict[str, Any]:
    r"""Sets the running statistics of all batch norms to those of all batches together.

    For a norm with the inputs :math:`x_b` of ``n_b`` values per feature:

    .. math::
      \begin{aligned}
      \mu &= \frac{\sum_b n_b \mu_b}{\sum_b n_b} \\
      v &= \frac{\sum_b n_b \left( v_b + |\mu_b - \mu|^2 \right)}{\sum_b n_b}
      \end{aligned}

    Also known as precise BN. Use it where the running averages do not fit the
    parameters: after averaging parameters, after few training steps, or with a large
    momentum.

    The model runs once over the batches, and normalizes as in training: with what a
    norm measures in a batch, on its sample if it has a sampler, and with the given
    running statistics if it uses them (``running_weight``, :class:`BatchRenorm`). But
    the new running statistics are those of whole batches, whatever the sampler and
    ``ghost_groups``. To normalize with the whole batch as well, pass the model with
    ``sampler=None``: its variables are the same. Do so after training with virtual
    images, which would be measured like any others.

    It covers :class:`flax.linen.BatchNorm`, :class:`BatchNorm` and all classes derived
    from them, :class:`ConvNorm`, :class:`DenseNorm`, :class:`BNET` and :class:`IC`;
    also in ``nn.scan``, ``nn.vmap``, ``nn.remat`` and ``nn.jit``. It leaves alone norms
    that normalize with their running statistics (frozen ones), and layers whose running
    state is not that of a batch norm: :class:`KalmanNorm` with the norm inside,
    :class:`MixtureNorm`, :class:`MovingAverageBatchNorm`, :class:`Shade`.
    :class:`L1BatchNorm` and :class:`RangeBatchNorm` measure each batch in their own
    way.

    Each batch is a compiled step, so call this outside of ``jit``. The last batch may
    be smaller, which compiles again. A batch that lies on several devices is measured
    as a whole, without ``axis_name``: pass the model without it, as its variables are
    the same.

    Args:
      model: what is called.
      variables: its variables, with running statistics of any value.
      batches: what the model is called with: arrays, or trees of arrays. Wrap the
        iterable to see progress, ``tqdm(batches)``.
      *args: what the model is called with after a batch; arrays or static.
      rngs: as in :meth:`flax.linen.Module.apply`; every batch draws anew.
      mutable: collections that the model changes besides ``'batch_stats'``; their new
        values are dropped.
      **kwargs: of ``apply``, such as ``train=True``. ``method`` may be a function of
        the module and a batch, for models that take other arguments:
        ``lambda model, batch: model(batch["image"], batch["mask"], train=True)``.

    Returns:
      The variables with new running statistics. All else is as it was, counters of
      training steps included.

    Raises:
      TypeError: if ``batches`` is an array.
      ValueError: if there is no batch, no norm that trains, a norm without running
        statistics, or a measured value that is not finite.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         return nn.BatchNorm(use_running_average=not train)(x)
      >>> x = 5 + 2 * jax.random.normal(jax.random.key(0), (1000, 1))
      >>> variables = Net().init(jax.random.key(1), x, train=False)
      >>> variables = sbn.linen.estimate_statistics(
      ...     Net(), variables, [x[:600], x[600:]], train=True
      ... )
      >>> y = Net().apply(variables, x, train=False)
      >>> print(f"{abs(y.mean()):.3f} {y.std():.3f}")
      0.000 1.000

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576.
    """
    given = unfreeze(dict(variables)).get(_STATS, {})
    stats = flatten_dict(nn.meta.unbox(given), keep_empty_nodes=True)
    running = {
        path[:-1]: Statistics(stats[*path[:-1], "mean"], var)
        for path, var in stats.items()
        if path[-1] == "var" and (*path[:-1], "mean") in stats
    }

    @jax.jit
    def step(
        variables: Any,
        stats: Any,
        rngs: Any,
        measured: dict[Path, Measured],
        batch: Any,
        number: int,
    ) -> dict[Path, Measured]:
        rngs = jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)
        state = {(*path, _MEASURED): each for path, each in measured.items()}
        with nn.intercept_methods(_measure):
            _, updates = model.apply(
                {**variables, _STATS: unflatten_dict({**stats, **state})},
                batch,
                *args,
                rngs=rngs,
                mutable=union_filters(mutable, _STATS),
                **kwargs,
            )
        updated = flatten_dict(updates[_STATS])
        return {path: updated[*path, _MEASURED] for path in measured}

    start = {path: nothing_measured(each) for path, each in running.items()}
    with_given = functools.partial(step, variables, stats, rngs)
    measured = over_batches(with_given, start, batches)
    for path, new in estimated(running, measured).items():
        stats[*path, "mean"], stats[*path, "var"] = new
    return {**variables, _STATS: nn.meta.replace_boxed(given, unflatten_dict(stats))}


def _measure(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    layer = context.module
    if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)

    before: Measured | None = layer.get_variable(_STATS, _MEASURED)
    if before is None:
        raise ValueError(
            "Expected running statistics of every batch norm, got none in layer "
            f"{'/'.join(layer.path) or type(layer).__name__}. Pass all variables that "
            "init returned, with the parameters replaced."
        )
    running = Statistics(*(layer.get_variable(_STATS, name) for name in _RUNNING))
    y = call(*args, **kwargs)
    if layer.get_variable(_STATS, _MEASURED) is not before:
        return y  # measured inside of the call, which is that of a derived class
    measured = add_call(layer, before, running, *args, **kwargs)
    layer.put_variable(_STATS, _MEASURED, measured)
    return y
