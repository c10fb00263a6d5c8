"""The forward pass of a Linen module that also measures its layers' inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import CollectionFilter, union_filters

from flax_sbn.optim.preconditioning import input_statistics, pool_inputs

_COLLECTION = "input_statistics"


def apply_with_inputs(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: CollectionFilter = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Calls ``module.apply``, and measures what goes into each layer.

    Layers are :class:`flax.linen.Dense` and :class:`flax.linen.Conv`, wherever in the
    module. Their subclasses, which may compute something else, grouped convolutions,
    and layers lifted by ``nn.vmap`` or ``nn.scan`` are left out; ``nn.jit`` and
    ``nn.remat`` are fine. A layer that is called more than once gives the statistics of
    all its inputs.

    The statistics carry no gradient. Each device of a ``shard_map`` measures its own
    images.

    Args:
      module: whose ``apply`` is called.
      variables: see :meth:`flax.linen.Module.apply`, also for the rest.
      *args: see there.
      mutable: see there.
      **kwargs: see there.

    Returns:
      What ``apply`` returns, and a tree with
      :class:`flax_sbn.optim.InputStatistics` at the paths of the layers' kernels in
      the parameters, for :func:`flax_sbn.optim.batch_norm_preconditioning`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, inputs = sbn.linen.apply_with_inputs(model, variables, x)
      >>> y.shape, inputs["layers_2"]["kernel"].mean.shape
      ((8, 2), (5,))
    """
    with nn.intercept_methods(_measure):
        result, updates = module.apply(
            variables, *args, mutable=union_filters(mutable, _COLLECTION), **kwargs
        )
    updates = dict(updates)
    inputs = updates.pop(_COLLECTION, {})
    return (result if mutable is False else (result, updates)), inputs


def _measure(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    layer = context.module
    if context.method_name == "__call__" and (
        type(layer) is nn.Dense
        or (type(layer) is nn.Conv and layer.feature_group_count == 1)
    ):
        x: jax.Array = args[0] if args else kwargs["inputs"]
        layer.sow(
            _COLLECTION,
            "kernel",
            input_statistics(x),
            reduce_fn=pool_inputs,
            init_fn=lambda: None,
        )
    return call(*args, **kwargs)
