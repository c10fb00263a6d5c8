"""Convolutions and dense layers with the norm folded into their kernel and bias.

Sampled statistics are those of a small part of the output, and a small part of the
input is enough to compute it. So they are known before the layer itself runs, and
normalizing costs no pass over its output. Letters in shapes: ``N`` images, ``H W``
spatial axes (any number), ``I`` input and ``C`` output features.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_sbn.activation import Activation, add_and_activate
from flax_sbn.fixed_fold import fixed_fold, fixed_fold_applies
from flax_sbn.linear_layers import (
    Extents,
    Linear,
    MatrixProduct,
    Padding,
    make_convolution,
)
from flax_sbn.moments import Measure
from flax_sbn.normalization import Norm
from flax_sbn.renormalization import Correct
from flax_sbn.sampled_layer import Layer, fold_kernel
from flax_sbn.sampling import Sampler, needs_key
from flax_sbn.statistics import Statistics, broadcast_mask
from flax_sbn.xla.sharding import varying_like


class NormOptions(TypedDict, total=False):
    """Options of :func:`conv_norm` and :func:`dense_norm` that are seldom needed.

    Attributes:
      statistics: normalize with these, ``(C,)``, and measure nothing: evaluation.
      mask: booleans that broadcast to the output: False is not measured.
      axis_name: see :func:`batch_statistics`.
      axis_index_groups: see :func:`batch_statistics`.
      use_fast_variance: see :func:`batch_statistics`.
      running: see :func:`batch_statistics`.
      running_weight: see :func:`batch_norm`; 0 by default.
      measure: see :func:`batch_statistics`.
      correct: see :func:`batch_norm`.
      epsilon: added to the variance; 1e-5 by default.
      dtype: dtype of the computation and its result; by default that of the arguments
        promoted. Statistics and the fold are in float32 or wider.
    """

    statistics: Statistics | None
    mask: ArrayLike | None
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: Any
    use_fast_variance: bool
    running: Statistics | None
    running_weight: float | jax.Array
    measure: Measure | None
    correct: Correct | None
    epsilon: float
    dtype: DTypeLike | None


def fold(
    kernel: ArrayLike,
    statistics: Statistics,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    r"""Folds a normalization into the kernel and bias of the layer before it.

    .. math::
      \begin{aligned}
      a &= \frac{\mathit{scale}}{\sqrt{v + \epsilon}} \\
      \mathit{kernel}' &= a \cdot \mathit{kernel} \\
      \mathit{bias}' &= \mathit{bias} - a \mu
      \end{aligned}

    Args:
      kernel: ``(..., C)``, of a convolution or dense layer without bias.
      statistics: mean and variance of the layer's output, ``(C,)``; for inference and
        export, the running ones. For layers that are stacked along leading axes, those
        of each, ``(*stack, C)``; likewise for all other arguments.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      epsilon: added to the variance.

    Returns:
      Kernel ``(..., C)`` and bias ``(C,)``, in the dtype of the statistics or wider.

    Raises:
      ValueError: if scale, bias or the statistics have another shape than ``(C,)``, or
        than the kernel's stack and features.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax_sbn import Statistics, fold
      >>> statistics = Statistics(mean=jnp.array([1.0]), var=jnp.array([4.0]))
      >>> fold(jnp.array([[6.0], [2.0]]), statistics, epsilon=0.0)
      (Array([[3.],
             [1.]], dtype=float32), Array([-0.5], dtype=float32))

    Source: Jacob et al., "Quantization and Training of Neural Networks", arXiv
    1712.05877, for inference. In training, with sampled statistics, it is ours.
    """
    kernel = jnp.asarray(kernel)
    stack = jnp.ndim(statistics.mean) - 1
    given = {**statistics._asdict(), "scale": scale, "bias": bias}
    _check_features(kernel, stack, **given)
    function = functools.partial(fold_kernel, epsilon=epsilon)
    for _ in range(stack):
        function = jax.vmap(function)
    return function(kernel, statistics, scale, bias)


def _check_features(kernel: jax.Array, stack: int, **given: ArrayLike | None) -> None:
    """Raises a ValueError if an array has not one number for each output feature."""
    shape = (*kernel.shape[:stack], *kernel.shape[-1:])
    for name, value in given.items():
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(
                f"Expected {name} of shape {shape}, got {name} of shape "
                f"{jnp.shape(value)} for a kernel of shape {kernel.shape}. Is "
                "the kernel's last axis that of the output features?"
            )


def refuse_options(**given: object) -> None:
    """Raises a TypeError if ``use_bias`` or ``use_scale`` is given, that is, not None.

    A convolution before a norm has ``use_bias=False``. Kept in one layer for both, it
    would take away the norm's bias.
    """
    for name, value in given.items():
        if value is not None:
            own = name.replace("use", "norm")
            raise TypeError(
                f"Expected {own} of a layer that folds, got {name}={value!r}. Leave "
                "out the use_bias=False of a convolution or dense layer, which never "
                f"has a bias here; {own}={value!r} is for that of the norm."
            )


def check_input_features(x: jax.Array, in_features: int) -> None:
    """Raises a ValueError if an input has other features than a kernel reads."""
    if x.shape[-1] != in_features:
        raise ValueError(
            f"Expected an input of {in_features} features, which the kernel reads, got "
            f"an input of shape {x.shape}. Features are last; is in_features right?"
        )


def conv_norm(
    x: ArrayLike,
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    strides: Extents = 1,
    padding: Padding = "SAME",
    input_dilation: Extents = 1,
    kernel_dilation: Extents = 1,
    feature_group_count: int = 1,
    precision: Any = None,
    conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
    **options: Unpack[NormOptions],
) -> tuple[jax.Array, Statistics]:
    r"""Convolution, sampled batch norm, residual and activation as one convolution.

    With :math:`S` the sampled positions of the output, and ``z`` the convolution there,
    which needs only the part of ``x`` that :math:`S` depends on:

    .. math::
      \begin{aligned}
      z_S &= (x * \mathit{kernel})_S \\
      \mu, v &= \mathrm{moments}(z_S) \\
      a &= \frac{\mathit{scale}}{\sqrt{v + \epsilon}}
      \end{aligned}

      y = \mathrm{activation}\big(x * (a \cdot \mathit{kernel}) +
      (\mathit{bias} - a \mu) + \mathit{residual}\big)

    Output and gradients equal, up to rounding, those of convolution,
    :func:`flax_sbn.batch_norm`, addition and activation one after the other. The
    normalized tensor is never written to memory.

    Args:
      x: ``(N, *spatial, I)``, any floating dtype; several batch axes, or none, are
        taken together as one.
      kernel: ``(*window, I / feature_group_count, C)``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      sampler: which positions of the output are measured; None measures all, which
        cannot be folded: ordinary BN follows.
      key: random key, for samplers that draw positions.
      activation: of the sum. :func:`jax.nn.relu` is replaced by :func:`relu`, which is
        the same function and stays fused.
      residual: added before the activation, of the output's shape; cast to its dtype.
      strides: of the window, an int or one per axis.
      padding: ``'SAME'``, ``'SAME_LOWER'``, ``'VALID'``, ``'CIRCULAR'``, ``'REFLECT'``,
        ``'CAUSAL'``, an int, or an int or a pair per axis.
      input_dilation: an int or one per axis.
      kernel_dilation: an int or one per axis.
      feature_group_count: number of groups of features.
      precision: see :func:`jax.lax.conv_general_dilated`.
      conv_general_dilated: the convolution to use.
      **options: see :class:`NormOptions`.

    Returns:
      The output, ``(N, *spatial, C)``, and the statistics, ``(C,)``.

    Raises:
      TypeError: if ``sampler`` is not a sampler, or chooses anything but windows.
      ValueError: if the sampler does not fit the output, its key is missing, or
        ``residual``, ``mask``, ``scale`` or ``bias`` does not fit it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax_sbn import FeatureSampling, conv_norm, relu
      >>> x = jax.random.normal(jax.random.key(0), (32, 16, 16, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 4))
      >>> y, statistics = conv_norm(
      ...     x, kernel, sampler=FeatureSampling(1 / 16), key=jax.random.key(2),
      ...     strides=2, activation=relu,
      ... )
      >>> y.shape, jax.tree.map(jnp.shape, statistics)
      ((32, 8, 8, 4), Statistics(mean=(4,), var=(4,)))

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    rank = kernel.ndim - 2
    if rank < 1 or x.ndim <= rank:
        raise ValueError(
            "Expected an input (N, *spatial, I) and a kernel (*window, I, C) with one "
            f"extent for each spatial axis, got input of shape {x.shape} and kernel of "
            f"shape {kernel.shape}. Inputs without spatial axes are for dense_norm."
        )
    check_input_features(x, kernel.shape[-2] * feature_group_count)
    batch = x.shape[: x.ndim - rank - 1]
    x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
    convolution = make_convolution(
        kernel.shape[:-2],
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        feature_group_count,
        precision,
        conv_general_dilated,
    )
    x, convolution = convolution.bordered(x)
    return _linear_norm(
        convolution,
        x,
        batch,
        kernel,
        scale,
        bias,
        activation,
        residual,
        sampler=sampler,
        key=key,
        **options,
    )


def dense_norm(
    x: ArrayLike,
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    precision: Any = None,
    dot_general: Callable[..., jax.Array] = lax.dot_general,
    **options: Unpack[NormOptions],
) -> tuple[jax.Array, Statistics]:
    r"""Dense layer, sampled batch norm, residual and activation as one dense layer.

    As :func:`conv_norm`, with a matrix product in place of the convolution.

    Args:
      x: ``(N, *spatial, I)``, any floating dtype; often without spatial axes.
      kernel: ``(I, C)``.
      scale: ``(C,)``, or None for one.
      bias: ``(C,)``, or None for zero.
      sampler: which positions of the output are measured; None measures all, which
        cannot be folded: ordinary BN follows.
      key: random key, for samplers that draw positions.
      activation: of the sum. :func:`jax.nn.relu` is replaced by :func:`relu`, which is
        the same function and stays fused.
      residual: added before the activation, of the output's shape; cast to its dtype.
      precision: see :func:`jax.lax.dot_general`.
      dot_general: the matrix product to use.
      **options: see :class:`NormOptions`.

    Returns:
      The output, ``(N, *spatial, C)``, and the statistics, ``(C,)``.

    Raises:
      TypeError: if ``sampler`` is not a sampler.
      ValueError: if the sampler does not fit the output (FeatureSampling needs spatial
        axes), its key is missing, or ``residual``, ``mask``, ``scale`` or ``bias`` does
        not fit it.

    Example:
      >>> import jax
      >>> from flax_sbn import BatchSampling, dense_norm, relu
      >>> x = jax.random.normal(jax.random.key(0), (128, 16))
      >>> kernel = jax.random.normal(jax.random.key(1), (16, 4))
      >>> y, statistics = dense_norm(
      ...     x,
      ...     kernel,
      ...     sampler=BatchSampling(16),
      ...     key=jax.random.key(2),
      ...     activation=relu,
      ... )
      >>> y.shape, statistics.mean.shape
      ((128, 4), (4,))

    The fold in training is ours; the sampling is that of Chen et al., "Batch
    Normalization Sampling", arXiv 1810.10962.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if kernel.ndim != 2 or x.ndim < 2:
        raise ValueError(
            "Expected an input (N, *spatial, I) and a kernel (I, C), got input of "
            f"shape {x.shape} and kernel of shape {kernel.shape}."
        )
    check_input_features(x, kernel.shape[0])
    product = functools.partial(dot_general, precision=precision)
    return _linear_norm(
        MatrixProduct(product),
        x,
        x.shape[:1],
        kernel,
        scale,
        bias,
        activation,
        residual,
        sampler=sampler,
        key=key,
        **options,
    )


def fold_like(layer: Any) -> Callable[..., tuple[jax.Array, Statistics]] | None:
    """Returns ``conv_norm`` or ``dense_norm`` with the options of one of Flax's layers.

    None if a class makes the layer's product: it may keep a state, as Flax's fp8
    products do, of which a second product for the sample knows nothing.
    """
    kind = "conv_general_dilated" if hasattr(layer, "kernel_size") else "dot_general"
    if getattr(layer, f"{kind}_cls", None) is not None:
        return None
    function = getattr(layer, kind) or getattr(lax, kind)
    if (element := getattr(layer, "preferred_element_type", None)) is not None:
        function = functools.partial(function, preferred_element_type=element)
    options = {kind: function, "precision": layer.precision}
    if kind == "dot_general":
        return functools.partial(dense_norm, **options)
    return functools.partial(
        conv_norm,
        strides=layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=layer.feature_group_count,
        **options,
    )


def _inexact(value: ArrayLike | None) -> ArrayLike | None:
    """Returns whole numbers as floats, which have derivatives."""
    if value is None or jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return value
    return jnp.asarray(value, jnp.float32)


def _linear_norm(
    linear: Linear,
    x: jax.Array,
    batch: tuple[int, ...],
    kernel: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    activation: Activation | None,
    residual: ArrayLike | None,
    *,
    statistics: Statistics | None = None,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    """Measures, folds and applies; ``batch`` is the shape that the images of x had."""
    norm = Norm(**options)
    dtype = canonicalize_dtype(x, kernel, scale, bias, dtype=norm.dtype)
    x, _ = promote_dtype(x, kernel, dtype=norm.dtype)
    given_statistics = {} if statistics is None else statistics._asdict()
    _check_features(kernel, 0, **given_statistics, scale=scale, bias=bias)
    x_type = jax.typeof(x)
    scale, bias = map(_inexact, (scale, bias))
    scale, bias = varying_like(x_type, (scale, bias))
    # As unfolded layers send its gradient.
    kernel = varying_like(x_type, kernel, x.dtype)
    kernel_type = jax.typeof(kernel)
    shape = jax.eval_shape(linear, x_type, kernel_type.update(dtype=x.dtype)).shape
    y_shape = (*batch, *shape[1:])
    if norm.mask is not None:
        mask = broadcast_mask(norm.mask, y_shape).reshape(shape)
        norm = dataclasses.replace(norm, mask=mask)
    half, masked = jnp.finfo(x.dtype).bits < 32, norm.mask is not None
    layer = Layer(linear, shape, norm.epsilon, half, masked)
    if statistics is not None:
        y = layer.apply(x, kernel, statistics, None, scale, bias)
    else:
        # What is measured, if that is known in advance.
        parts = () if needs_key(norm.sampler) else norm.parts(shape[:-1])
        run: Callable[..., Any] = functools.partial(layer.fold, norm)
        if any(not part.windows for part in parts):  # all of it: nothing to fold
            norm = dataclasses.replace(norm, dtype=dtype)
            run = functools.partial(layer.plain, norm)
        elif parts and fixed_fold_applies(layer, norm, x_type):
            run = fixed_fold(layer, norm, parts, x_type, kernel_type)
        y, statistics = run(x, kernel, scale, bias)
    y = y.astype(dtype).reshape(y_shape)
    return add_and_activate(y, residual, activation), statistics
