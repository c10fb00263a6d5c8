"""Signatures of the API as the source has them: short types, defaults by their names.

At run time `ArrayLike` is a union of eight types, a default is an address, and nnx's
classes take `*args, **kwargs`. What their authors wrote is shorter, and is a signature.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

import flax_sbn

# Where names in signatures lead, beside this package's own. In the overview of the API
# is a table of those that have no page elsewhere.
LINEN = "https://flax.readthedocs.io/en/latest/api_reference/flax.linen"
NNX = "https://flax.readthedocs.io/en/latest/api_reference/flax.nnx"
JAX = "https://docs.jax.dev/en/latest/_autosummary"
OPTAX = "https://optax.readthedocs.io/en/latest/api/transformations.html"
TYPES = {
    "Activation": "types",
    "Array": f"{JAX}/jax.Array.html",
    "ArrayLike": "types",
    "Axis": "types",
    "Correct": "types",
    "DTypeLike": "types",
    "Extents": "types",
    "GradientTransformation": f"{OPTAX}#optax.GradientTransformation",
    "GradientTransformationExtraArgs": f"{OPTAX}#optax.GradientTransformationExtraArgs",
    "Initializer": "types",
    "Measure": "types",
    "Moments": "types",
    "Padding": "types",
    "Schedule": "types",
    "nn.Module": f"{LINEN}/module.html#flax.linen.Module",
    "nnx.Module": f"{NNX}/module.html#flax.nnx.Module",
    "nnx.Rngs": f"{NNX}/rnglib.html#flax.nnx.Rngs",
}
NO_PAGE = {
    "CollectionFilter",
    "ConvGeneralDilatedT",
    "DotGeneralT",
    "M",
    "Names",
    "Only",
    "OptState",
    "PrecisionLike",
    "PromoteDtypeFn",
    "Selection",
    "Start",
}
NOT_SHOWN = {"name", "parent"}  # fields of every linen module
RENAMED = {"Dtype": "DTypeLike", "PaddingLike": "Padding", "Rngs": "nnx.Rngs"}


class Shorten(ast.NodeTransformer):
    """Rewrites an annotation: `Optional[jax.Array]` becomes `Array | None`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Drops the module where that leaves no doubt."""
        whole = ast.unparse(node)
        return self.visit_Name(ast.Name(whole if whole in TYPES else node.attr))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        """Writes unions with a bar."""
        self.generic_visit(node)
        of = node.value.id if isinstance(node.value, ast.Name) else ""
        if of == "Optional":
            return ast.BinOp(node.slice, ast.BitOr(), ast.Constant(None))
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Calls a type by the name that this package has for it."""
        return ast.Name(RENAMED.get(node.id, node.id))


def short(annotation: ast.expr | None) -> ast.expr | None:
    """Returns the annotation in few words."""
    return annotation and Shorten().visit(annotation)


def definition(obj: Any) -> Any:
    """The syntax tree of a class or function."""
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


def fields(cls: type) -> list[tuple[ast.arg, ast.expr | None, bool]]:
    """Name, type and default of the fields that a class is made from.

    Each is written where it was last set, in the class or one that it derives from. The
    third value says whether a field is given by name only.
    """
    written = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("flax"):
            for node in definition(base).body:
                if isinstance(node, ast.AnnAssign):
                    written[ast.unparse(node.target)] = node
    if dataclasses.is_dataclass(cls):
        names = {f.name: bool(f.kw_only) for f in dataclasses.fields(cls) if f.init}
    else:
        names = dict.fromkeys(cls.__annotations__, issubclass(cls, dict))
    return [
        (
            ast.arg(name, short(written[name].annotation)),
            by_default(written[name].value, getattr(cls, name, None)),
            by_name,
        )
        for name, by_name in names.items()
        if name not in NOT_SHOWN
    ]


def by_default(written: ast.expr | None, value: Any) -> ast.expr | None:
    """Returns the default of a field, without what dataclasses put around it."""
    if isinstance(written, ast.Name) and written.id.isupper():
        return ast.Name(repr(value))  # a constant of some other file
    if isinstance(written, ast.Call) and ast.unparse(written.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in written.keywords}
        if "default_factory" in given:
            return ast.Call(given["default_factory"], [], [])
        return given.get("default")
    return written


def of_class(cls: type) -> ast.arguments:
    """Returns what a class is called with."""
    if dataclasses.is_dataclass(cls) or issubclass(cls, (tuple, dict)):
        taken = fields(cls)
        first = [(arg, default) for arg, default, by_name in taken if not by_name]
        named = [(arg, default) for arg, default, by_name in taken if by_name]
        return ast.arguments(
            posonlyargs=[],
            args=[arg for arg, _ in first],
            defaults=[default for _, default in first if default],
            kwonlyargs=[arg for arg, _ in named],
            kw_defaults=[default for _, default in named],
        )
    return of_function(definition(cls.__init__), bound=True)


def of_function(node: ast.FunctionDef, bound: bool) -> ast.arguments:
    """Returns the arguments of a function, less the first where it is bound."""
    taken = node.args
    if bound:
        del (taken.posonlyargs or taken.args)[0]
    everything = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    for arg in filter(None, [*everything, taken.vararg, taken.kwarg]):
        arg.annotation = short(arg.annotation)
    return taken


def in_brackets(taken: ast.arguments) -> str:
    """Writes the arguments of a call; `1e-5` as people do."""
    return f"({re.sub(r'e-0', 'e-', ast.unparse(taken))})"


def write(
    app: Any, what: str, name: str, obj: Any, options: Any, now: str, returns: str
) -> tuple[str, str | None] | None:
    """Gives autodoc the signature of a public name."""
    if what == "class":
        if getattr(obj, "_is_protocol", False) or "nnx.variablelib" in {
            base.__module__.removeprefix("flax.") for base in obj.__mro__
        }:
            return "", None
        return in_brackets(of_class(obj)), None
    if what not in ("function", "method"):
        return None
    node = definition(inspect.unwrap(obj))
    taken = of_function(node, bound=what == "method")
    return in_brackets(taken), node.returns and ast.unparse(short(node.returns))


def link(app: Any, env: Any, node: Any, contents: Any) -> Any:
    """Links the types in signatures."""
    from docutils import nodes  # not there when tests import this file
    from sphinx.util.nodes import make_refnode

    target, objects = node["reftarget"], env.domains["py"].objects
    for namespace in ("", "optim.", "alternatives.", "linen.", "nnx."):
        if entry := objects.get(f"flax_sbn.{namespace}{target}"):
            place = (entry.docname, entry.node_id)
            return make_refnode(app.builder, node["refdoc"], *place, contents)
    if target in NO_PAGE:
        return contents
    if (url := TYPES.get(target)) is None:
        return None
    if url == "types":
        return make_refnode(app.builder, node["refdoc"], "api", "types", contents)
    return nodes.reference("", "", contents, internal=False, refuri=url)


def keep_anchors(app: Any, doctree: Any, docname: str) -> None:
    """Lets `api.html#NAME`, where all of the API once was, lead to NAME's row there."""
    from docutils import nodes

    if docname == "api":
        for reference in doctree.findall(nodes.reference):
            name = reference.get("reftitle", "")
            if name.startswith("flax_sbn."):
                reference["ids"].append(name)


def setup(app: Any) -> dict[str, bool]:
    """Registers the three functions above."""
    # Autodoc lets a signature be replaced, but of a TypedDict it finds none.
    flax_sbn.NormOptions.__signature__ = inspect.Signature()
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", write)
    app.connect("missing-reference", link)
    app.connect("doctree-resolved", keep_anchors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
