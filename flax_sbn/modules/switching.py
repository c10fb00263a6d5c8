"""What switches a model of Flax's layers: Linen and NNX share all that is here.

A norm recognizes the linear layer before it because its input *is* the very array that
the layer returned. It then calls :func:`flax_sbn.conv_norm` on the layer's input. The
plain convolution is left without a reader, and ``jax.jit`` drops it; where something
else reads its output it stays, and nothing is wrong.
"""

import contextlib
import contextvars
import dataclasses
import io
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from rich.console import Console
from rich.table import Column, Table

from flax_sbn.folding import fold_like
from flax_sbn.linear_layers import masked_kernel
from flax_sbn.sampling import Sampler, needs_key, sampled_parts
from flax_sbn.statistics import Statistics

Path = tuple[str, ...]
# Whether a norm is switched, by its path and the module itself.
Only = Callable[[Path, Any], bool]
Norm = Callable[..., tuple[jax.Array, Statistics]]
_EVALUATED = "evaluated"


class SwitchedNorm(NamedTuple):
    """What became of a norm.

    Attributes:
      norm: path of the norm.
      treatment: ``'folded'``, ``'sampled'`` or ``'plain'``.
      layer: path of the layer that it is folded into; empty if there is none.
      reason: why it is not folded; empty if it is.
    """

    norm: str
    treatment: str
    layer: str
    reason: str


@dataclasses.dataclass(frozen=True)
class SwitchReport:
    """What became of a model's norms; prints as a table.

    Attributes:
      norms: one entry for each norm, in the order of their calls.
      relus: fields of the model that hold :func:`jax.nn.relu`, where
        :func:`flax_sbn.relu` stays fused by itself.
      fuses_relu: whether :func:`jax.nn.relu` stays fused as the model is called.
    """

    norms: tuple[SwitchedNorm, ...]
    relus: tuple[str, ...] = ()
    fuses_relu: bool = True

    def count(self, treatment: str) -> int:
        """Returns how many norms are ``'folded'``, ``'sampled'`` or ``'plain'``."""
        return sum(norm.treatment == treatment for norm in self.norms)

    def __str__(self) -> str:
        header = ("norm", "treatment", "layer, or why it is not folded")
        table = Table(*(Column(text, overflow="fold") for text in header))
        for norm in self.norms:
            table.add_row(norm.norm, norm.treatment, norm.layer or norm.reason)
        text = io.StringIO()
        console = Console(file=text)  # as wide as the terminal
        console.print(table, end="")
        treatments = ("folded", "sampled", "plain")
        counts = [f"{self.count(each)} {each}" for each in treatments]
        norms = "norm" if len(self.norms) == 1 else "norms"
        lines = [f"{len(self.norms)} {norms}: {', '.join(counts)}."]
        if self.count("folded"):
            lines.append("Folded only in calls that jax.jit compiles.")
            if not self.fuses_relu:
                fields = f", or flax_sbn.relu in {', '.join(self.relus)}"
                lines.append(
                    "To keep a relu fused, put `with flax_sbn.fused_relu():` "
                    f"around the call{fields if self.relus else ''}."
                )
        console.print("\n".join(lines), markup=False, highlight=False)
        return text.getvalue().rstrip()


_report: contextvars.ContextVar[list[SwitchedNorm] | None] = contextvars.ContextVar(
    "report", default=None
)


@contextlib.contextmanager
def reporting() -> Iterator[list[SwitchedNorm]]:
    """Collects what becomes of the norms that are called meanwhile."""
    norms: list[SwitchedNorm] = []
    token = _report.set(norms)
    try:
        yield norms
    finally:
        _report.reset(token)


def _note(norm: Path, treatment: str, layer: Path = (), reason: str = "") -> None:
    """Adds to the report, if one is wanted."""
    norms = _report.get()
    if norms is not None:
        norms.append(SwitchedNorm(written(norm), treatment, written(layer), reason))


def written(path: Path) -> str:
    """Returns a path as text."""
    return "/".join(path)


def check_module(model: Any, base: type, api: str, other: str) -> None:
    """Raises a TypeError if a model is not a module of an API."""
    if isinstance(model, base):
        return
    got = f"a {type(model).__name__}"
    if isinstance(model, type):
        got, other = f"the class {model.__name__}", f"Call it: {model.__name__}(...)."
    raise TypeError(f"Expected a module of {api}, got {got}. {other}")


def report_on(
    found: list[SwitchedNorm],
    relus: list[str],
    *,
    model: Any,
    train: str,
    fuses_relu: bool,
) -> SwitchReport:
    """Returns the report; raises a ValueError if there are no norms or all evaluate."""
    if not found:
        raise ValueError(
            "Expected a model that sample_norms returned, got "
            f"{type(model).__name__} without a switched norm. Write "
            "switch_report(sample_norms(model), ...)."
        )
    if all(norm.reason == _EVALUATED for norm in found):
        raise ValueError(
            f"Expected a call in training, got one in which all norms evaluate. {train}"
        )
    return SwitchReport(tuple(found), tuple(relus), fuses_relu)


def complain_of_no_norm(model: Any, what: str) -> ValueError:
    """Returns the error of a model without a norm to switch."""
    return ValueError(
        f"Expected a model with {what} that `only` admits, got none in "
        f"{type(model).__name__}. Name classes of its own in `norm_types`."
    )


def check_copy(norm: Any, what: str, *needed: str) -> None:
    """Raises a TypeError if a class of `norm_types` lacks what is needed of it."""
    needed = ("momentum", "epsilon", "use_running_average", *needed)
    if missing := [name for name in needed if not hasattr(norm, name)]:
        raise TypeError(
            f"Expected a class with {what}'s fields, got {type(norm).__name__} without "
            f"{', '.join(missing)}. Leave it out of `norm_types`."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """The output of a linear layer, and what it was made of."""

    path: Path  # of the layer
    x: jax.Array  # its input
    kernel: jax.Array  # (..., C), masked
    bias: jax.Array | None  # (C,)
    fold: Norm | None  # of `fold_like`
    compute_dtype: Any  # that in which the layer computes
    dtype: Any  # that of its output

    def norm(
        self,
        *affine: Any,
        running: Statistics,
        dtype: Any,
        promoted: Sequence[jax.Array] = (),
        **options: Any,
    ) -> tuple[jax.Array, Statistics]:
        """Computes the layer with a norm in it.

        ``promoted`` are further arrays with which an unfolded norm promotes its input.
        """
        assert self.fold is not None  # or it is sampled
        # Only the mean sees a bias before a norm.
        shift = 0 if self.bias is None else self.bias.astype(running.mean.dtype)
        y, statistics = self.fold(
            self.x,
            self.kernel,
            *affine,
            running=running._replace(mean=running.mean - shift),
            dtype=self.compute_dtype,
            **options,
        )
        like = (*affine, *promoted, jnp.zeros((), self.dtype))
        y = y.astype(canonicalize_dtype(*like, dtype=dtype))
        return y, statistics._replace(mean=statistics.mean + shift)


# By the identity of an output, as long as that lives.
_products: dict[int, tuple[weakref.ref[jax.Array], Product]] = {}


def remember(
    path: Path,
    layer: Any,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    y: jax.Array,
) -> None:
    """Remembers how a layer made its output, if a compiler will see both."""
    # A convolution of several batch axes, or none, is sampled only.
    fits = y.ndim >= 2 if kernel.ndim == 2 else y.ndim == kernel.ndim
    if not fits or not _is_traced(y):
        return
    product = Product(
        path,
        x,
        masked_kernel(kernel, getattr(layer, "mask", None)),
        bias,
        fold_like(layer),
        canonicalize_dtype(x, kernel, bias, dtype=layer.dtype),
        y.dtype,
    )
    key = id(y)
    forgets = weakref.ref(y, lambda _: _products.pop(key, None))
    _products[key] = forgets, product


def _is_traced(x: Any) -> bool:
    """Whether a program is made of what is computed, in which nothing is done twice."""
    while isinstance(x, jax.core.Tracer):
        inner = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(inner, jax.Array):
            return True
        x = inner
    return False


def stays_plain(
    path: Path, x: jax.Array, axis: Any, sampler: Sampler, evaluate: bool
) -> bool:
    """Whether a norm of input ``x`` stays as it is, which is then reported."""
    if evaluate:
        _note(path, "plain", reason=_EVALUATED)
        return True
    features = 1 if isinstance(axis, int) else len(axis)
    if x.ndim - features == 1:  # does the sampler need spatial axes?
        try:
            jax.eval_shape(
                lambda key: [part.weight for part in sampler.parts(x.shape[:1], key)],
                jax.random.key(0),
            )
        except ValueError:
            _note(path, "plain", reason="no spatial axes to sample from")
            return True
    return False


def layer_to_fold(
    path: Path, x: jax.Array, axis: Any, sampler: Sampler, fold: bool
) -> Product | None:
    """Returns the layer that a norm of input ``x`` folds into, if any; reports it."""
    made = _products.get(id(x))
    product = made[1] if made and made[0]() is x else None
    reason = ""
    if not fold:
        reason = "fold=False"
    elif not _is_traced(x):
        reason = "not compiled: the layer before would run twice"
    elif product is None:
        reason = "not directly after a convolution or dense layer"
    elif product.fold is None:
        reason = "a class (..._cls) computes its layer"
    elif axis not in (-1, x.ndim - 1):
        reason = "its features are not last"
    elif not needs_key(sampler):
        parts = sampled_parts(sampler, x.shape[:-1], None)
        if any(not part.windows for part in parts):
            reason = "so small that the sampler measures all of it"
    if reason or product is None:
        _note(path, "sampled", reason=reason)
        return None
    _note(path, "folded", layer=product.path)
    return product
