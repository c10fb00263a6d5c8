"""Gradients preconditioned by the statistics of the layers' inputs.

Letters in shapes: ``N`` images, ``I`` input and ``C`` output features.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from flax_sbn.moments import Moments, pool_moments
from flax_sbn.statistics import batch_statistics


class InputStatistics(NamedTuple):
    """Mean and (biased) variance of each feature of a layer's input.

    Attributes:
      mean: ``(I,)``, float32 or wider.
      var: ``(I,)``, likewise.
      num: how many values of a feature they come from, a scalar.
    """

    mean: jax.Array
    var: jax.Array
    num: jax.Array


class BatchNormPreconditioningState(NamedTuple):
    """State of :func:`batch_norm_preconditioning`.

    Attributes:
      running: :class:`InputStatistics` of the steps so far, at each kernel's path.
      inner: state of the transformation inside.
    """

    running: dict[str, Any]
    inner: optax.OptState


def input_statistics(x: ArrayLike) -> InputStatistics:
    """Measures the input of a dense or convolutional layer, without a gradient.

    Args:
      x: ``(N, *spatial, I)``, real; measured in two passes, in float32 or wider.
        Convolutions pad it later: what they add is not measured.

    Returns:
      Statistics of shape ``(I,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> statistics = sbn.optim.input_statistics(jnp.array([[1.0], [5.0]]))
      >>> print(statistics.mean, statistics.var, statistics.num)
      [3.] [4.] 2.0
    """
    x = lax.stop_gradient(jnp.atleast_2d(x))
    # One pass would cancel where a mean is large, and that is what this is for.
    mean, var = batch_statistics(x, use_fast_variance=False)
    return InputStatistics(mean, var, jnp.asarray(x.size // x.shape[-1], mean.dtype))


def pool_inputs(
    first: InputStatistics | None, second: InputStatistics
) -> InputStatistics:
    """Returns the statistics of all values that either comes from."""
    if first is None:
        return second
    num, mean, var = pool_moments(
        *(Moments(each.num, each.mean, each.var) for each in (first, second))
    )
    return InputStatistics(mean, var, num)


def precondition_gradients(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    inputs: InputStatistics,
    *,
    relative_epsilon: float = 1e-2,
    epsilon: float = 1e-4,
) -> tuple[jax.Array, jax.Array | None]:
    r"""Preconditions a layer's gradients as normalizing its input would.

    A layer :math:`W^\top h + b` is :math:`\hat W^\top (h - \mu) / \sigma + \hat b` with
    :math:`(b, W) = P (\hat b, \hat W)`. A gradient step on :math:`(\hat b, \hat W)`
    moves :math:`(b, W)`, of gradient :math:`g = (g_b, g_W)`, along :math:`P P^\top g =
    (d_b, d_W)`:

    .. math::
      \begin{aligned}
      P &= \frac 1 q \begin{pmatrix} 1 & -\mu^\top / \sigma \\
      0 & \mathrm{diag}(1 / \sigma) \end{pmatrix} \\
      d_W &= \frac{g_W - \mu g_b^\top}{\sigma^2 q^2} \\
      d_b &= \frac{g_b}{q^2} - \mu^\top d_W
      \end{aligned}

    .. math::
      \begin{aligned}
      \sigma^2 &= v + \epsilon_r \max_i v_i + \epsilon \\
      q^2 &= \max \Big( 1, \frac{n}{N} \Big)
      \end{aligned}

    where :math:`q` shortens the steps of batches that have fewer values :math:`N` of an
    input (``num``) than an output has weights :math:`n`. A convolution has the same
    mean and variance at all positions of its window.

    Without a bias nothing makes up for a shift. So the input is only scaled, by its
    second moment: :math:`\mu = 0`, and :math:`E[h^2]` in place of :math:`v`.

    Args:
      kernel: gradient of the kernel, ``(*window, I, C)``.
      bias: gradient of the bias, ``(C,)``, or None for a layer without.
      inputs: statistics of the layer's input, ``(I,)``.
      relative_epsilon: share of the largest variance that is added to each.
      epsilon: added to the variances, too.

    Returns:
      Both gradients, in their shapes and dtypes. The arithmetic is in the dtype of the
      statistics or wider.

    Raises:
      ValueError: if the statistics have another shape than ``(I,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_sbn as sbn
      >>> x, errors = jnp.array([[9.0], [11.0]]), jnp.array([[0.0], [1.0]])
      >>> inputs = sbn.optim.input_statistics(x)
      >>> kernel, bias = sbn.optim.precondition_gradients(
      ...     x.T @ errors, errors.sum(0), inputs, relative_epsilon=0.0, epsilon=0.0
      ... )
      >>> print(kernel, bias)
      [[1.]] [-9.]

    Source: Lange et al., "Batch Normalization Preconditioning for Neural Network
    Training", arXiv 2108.01110. The formulation is ours, and the constants are from
    memory; layers without a bias, and :math:`N` that counts images times positions, are
    ours.
    """
    kernel = jnp.asarray(kernel)
    bias = None if bias is None else jnp.asarray(bias)
    epsilons = relative_epsilon, epsilon
    kernel, bias = _to_normalized(kernel, bias, inputs, *epsilons)
    return _from_normalized(kernel, bias, inputs, *epsilons)


def batch_norm_preconditioning(
    decay: float = 0.99,
    *,
    inner: optax.GradientTransformation | None = None,
    relative_epsilon: float = 1e-2,
    epsilon: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    r"""Batch norm as a preconditioner of the gradients instead of a layer.

    Preconditions the gradients of dense and convolutional layers by running statistics
    of their inputs, for SGD after it in an ``optax.chain``. The network, and what it
    computes, stays as it is. With :math:`P` of :func:`precondition_gradients`:

    .. math::
      d = P \, f(P^\top g)

    where :math:`f` is ``inner``, by default the identity. Optimizers that scale each
    parameter for itself, such as Adam, belong there: after :math:`P` they would undo
    what couples kernel and bias, and with it the centring of the inputs. Weight decay
    goes after it.

    Each update needs the statistics of its step, which
    :func:`flax_sbn.linen.apply_with_inputs` and
    :func:`flax_sbn.nnx.call_with_inputs` gather in the forward pass. Gradients without
    statistics, of other layers and of convolutions in groups, pass as they are.

    The running statistics are those of all images so far, each step weighted ``decay``
    times as much as the next; the first uses its own. Their variance includes that
    between the steps, so that batches of one image will do.

    Args:
      decay: how much less a step counts than the next, in [0, 1).
      inner: what is done with the gradients of the layers with normalized inputs.
      relative_epsilon: see :func:`precondition_gradients`.
      epsilon: see :func:`precondition_gradients`.

    Returns:
      A transformation whose ``update(updates, state, params, *, inputs)`` takes a tree
      with :class:`InputStatistics` at the paths of the kernels they belong to. The
      state holds running statistics, float32 or wider, for each ``kernel``.

    Raises:
      ValueError: if ``decay`` is outside [0, 1), or in an update if no path of
        ``inputs`` is that of a kernel, or statistics do not fit theirs.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> import flax_sbn as sbn
      >>> x = 50 + jax.random.normal(jax.random.key(0), (128, 4))
      >>> model = nn.Dense(1)
      >>> params = model.init(jax.random.key(1), x)["params"]
      >>> tx = optax.chain(sbn.optim.batch_norm_preconditioning(), optax.sgd(0.5))
      >>> state = tx.init(params)
      >>> def loss(params):
      ...     y, inputs = sbn.linen.apply_with_inputs(model, {"params": params}, x)
      ...     return jnp.mean((y[:, 0] - x.sum(1)) ** 2), inputs
      >>> for _ in range(10):
      ...     grads, inputs = jax.grad(loss, has_aux=True)(params)
      ...     updates, state = tx.update(grads, state, params, inputs=inputs)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params)[0] < 0.1)
      True

    Source: Lange et al., "Batch Normalization Preconditioning for Neural Network
    Training", arXiv 2108.01110. The constants are from memory; ``inner`` and the
    weights of the running statistics are ours.
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"Expected decay in [0, 1), got {decay=}. 0 uses each step's statistics "
            "alone."
        )
    transform = optax.with_extra_args_support(inner or optax.identity())
    epsilons = relative_epsilon, epsilon

    def init(params: optax.Params) -> BatchNormPreconditioningState:
        running = {}
        for path, leaf in _by_path(params).items():
            if path[-1:] == ("kernel",) and jnp.ndim(leaf) >= 2:
                dtype = jnp.promote_types(leaf.dtype, jnp.float32)
                zeros = jnp.zeros(leaf.shape[-2], dtype)
                running[path] = InputStatistics(zeros, zeros, jnp.zeros((), dtype))
        return BatchNormPreconditioningState(
            unflatten_dict(running), transform.init(params)
        )

    def update(
        updates: optax.Updates,
        state: BatchNormPreconditioningState,
        params: optax.Params | None = None,
        *,
        inputs: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BatchNormPreconditioningState]:
        running, given = _by_path(state.running), _by_path(inputs)
        layers = {}
        for path in given:
            if path in running:
                old, step = running[path], given[path]
                _check_fit(step, old.mean.shape, "/".join(path))
                new = pool_inputs(old._replace(num=decay * old.num), step)
                running[path] = jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)
                # The images of this step alone made the gradient.
                layers[path] = running[path]._replace(num=step.num)
        if running and not layers:
            raise ValueError(
                "Expected statistics at the path of a kernel, got "
                f"inputs={['/'.join(path) for path in given]} for kernels "
                f"{['/'.join(path) for path in running]}. Gather them with the "
                "network whose parameters these are, and pass the tree as it is."
            )
        updates = _map_layers(_to_normalized, updates, layers, epsilons)
        updates, kept = transform.update(updates, state.inner, params, **extra_args)
        updates = _map_layers(_from_normalized, updates, layers, epsilons)
        return updates, BatchNormPreconditioningState(unflatten_dict(running), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_normalized(
    kernel: jax.Array,
    bias: jax.Array | None,
    inputs: InputStatistics,
    relative_epsilon: float,
    epsilon: float,
) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies with the transpose of P."""
    mean, std, q = _normalization(kernel, bias, inputs, relative_epsilon, epsilon)
    if bias is None:
        return (kernel / (std * q)).astype(kernel.dtype), None
    scaled = (kernel - mean * jnp.broadcast_to(bias, kernel.shape)) / (std * q)
    return scaled.astype(kernel.dtype), (bias / q).astype(bias.dtype)


def _from_normalized(
    kernel: jax.Array,
    bias: jax.Array | None,
    inputs: InputStatistics,
    relative_epsilon: float,
    epsilon: float,
) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies with P."""
    mean, std, q = _normalization(kernel, bias, inputs, relative_epsilon, epsilon)
    scaled = kernel / (std * q)
    if bias is not None:
        shift = (mean * scaled).sum(range(kernel.ndim - 1))
        bias = (bias / q - shift).astype(bias.dtype)
    return scaled.astype(kernel.dtype), bias


def _normalization(
    kernel: jax.Array,
    bias: jax.Array | None,
    inputs: InputStatistics,
    relative_epsilon: float,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns mean and deviation, ``(*1, I, 1)``, and the factor ``q``."""
    _check_fit(inputs, kernel.shape[-2:-1], "the kernel")
    others = (*range(kernel.ndim - 2), kernel.ndim - 1)
    mean, var = (jnp.expand_dims(s, others) for s in (inputs.mean, inputs.var))
    if bias is None:
        var = var + mean**2
    var = var + relative_epsilon * var.max(initial=0.0) + epsilon
    ratio = math.prod(kernel.shape[:-1]) / jnp.maximum(inputs.num, 1)
    return mean, jnp.sqrt(var), jnp.sqrt(jnp.maximum(ratio, 1))


def _map_layers(
    function: Callable[..., tuple[jax.Array, jax.Array | None]],
    tree: Any,
    layers: dict[tuple[str, ...], InputStatistics],
    epsilons: tuple[float, float],
) -> Any:
    """Applies a function to kernel and bias of each layer."""
    leaves = _by_path(tree)
    for kernel, inputs in layers.items():
        bias = (*kernel[:-1], "bias")
        leaves[kernel], found = function(
            leaves[kernel], leaves.get(bias), inputs, *epsilons
        )
        if found is not None:
            leaves[bias] = found
    return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns leaves, and statistics, by the names on the way to them."""
    leaves, _ = tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, InputStatistics)
    )
    # Variables of NNX and boxed parameters of Linen are no level of their own.
    return {
        tuple(keystr((k,), simple=True) for k in path if k != GetAttrKey("value")): leaf
        for path, leaf in leaves
    }


def _check_fit(inputs: InputStatistics, shape: tuple[int, ...], name: str) -> None:
    if not shape or inputs.mean.shape != shape:
        raise ValueError(
            f"Expected statistics of shape {shape} for {name}, got "
            f"mean.shape={inputs.mean.shape}. Measure the input of this very layer; "
            "convolutions in groups cannot be preconditioned."
        )
