"""Configuration of the documentation: Sphinx, MyST, sphinx-book-theme."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax_sbn

sys.path.insert(0, str(Path(__file__).parent))

project = "flax_sbn"
author = "The flax_sbn authors"
copyright = author
version = release = flax_sbn.__version__

extensions = [
    "myst_parser",
    "signatures",  # the file beside this one
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # docs/signatures.py puts them into signatures
autosummary_generate = False  # tables only
maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# The attributes of the dataclasses are what their constructors take.
napoleon_custom_sections = [("Attributes", "params_style")]

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# MathJax comes with the site, so that formulas need no network: one file, which needs
# no others (it draws, and has no fonts), out of a package that brings all of MathJax.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
mathjax_path = "tex-svg-full.js"

html_theme = "sphinx_book_theme"
html_title = f"flax_sbn {release}"
html_static_path = ["_static", str(MATHJAX / mathjax_path)]
html_css_files = ["custom.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

# Pages of other projects that the docstrings refer to. A table, and no download of
# their inventories, so that the documentation builds without a network.
FLAX = "https://flax.readthedocs.io/en/latest/api_reference"
JAX = "https://docs.jax.dev/en/latest/_autosummary"
PAGES = {
    "flax.linen": f"{FLAX}/flax.linen/index.html",
    "flax.linen.BatchNorm": f"{FLAX}/flax.linen/layers.html#flax.linen.BatchNorm",
    "flax.linen.Conv": f"{FLAX}/flax.linen/layers.html#flax.linen.Conv",
    "flax.linen.Dense": f"{FLAX}/flax.linen/layers.html#flax.linen.Dense",
    "flax.linen.Dropout": f"{FLAX}/flax.linen/layers.html#flax.linen.Dropout",
    "flax.linen.Module.apply": f"{FLAX}/flax.linen/module.html#flax.linen.Module.apply",
    "flax.linen.relu": f"{FLAX}/flax.linen/activation_functions.html#flax.linen.relu",
    "flax.nnx": f"{FLAX}/flax.nnx/index.html",
    "flax.nnx.BatchNorm": f"{FLAX}/flax.nnx/nn/normalization.html#flax.nnx.BatchNorm",
    "flax.nnx.BatchStat": f"{FLAX}/flax.nnx/variables.html#flax.nnx.BatchStat",
    "flax.nnx.Conv": f"{FLAX}/flax.nnx/nn/linear.html#flax.nnx.Conv",
    "flax.nnx.Dropout": f"{FLAX}/flax.nnx/nn/stochastic.html#flax.nnx.Dropout",
    "flax.nnx.Linear": f"{FLAX}/flax.nnx/nn/linear.html#flax.nnx.Linear",
    "flax.nnx.Param": f"{FLAX}/flax.nnx/variables.html#flax.nnx.Param",
    "flax.nnx.capture": f"{FLAX}/flax.nnx/index.html",
    "flax.nnx.relu": f"{FLAX}/flax.nnx/nn/activations.html#flax.nnx.relu",
    "flax.training.train_state.TrainState": f"{FLAX}/flax.training.html",
    "functools.partial": "https://docs.python.org/3/library/functools.html",
    "jax.ShapeDtypeStruct": f"{JAX}/jax.ShapeDtypeStruct.html",
    "jax.lax.conv_general_dilated": f"{JAX}/jax.lax.conv_general_dilated.html",
    "jax.lax.dot_general": f"{JAX}/jax.lax.dot_general.html",
    "jax.nn.relu": f"{JAX}/jax.nn.relu.html",
    "jax.vmap": f"{JAX}/jax.vmap.html",
}


def link_elsewhere(app: Any, env: Any, node: Any, contents: Any) -> Any:
    """Links what this documentation does not define, if it is in the table."""
    from docutils import nodes  # not there when tests import this file

    if (url := PAGES.get(node["reftarget"])) is None:
        return None
    return nodes.reference("", "", contents, internal=False, refuri=url)


def close_up(app: Any, docname: str, source: list[str]) -> None:
    """Removes the blank lines that end a doctest where its code block ends."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def space_lines(app: Any, doctree: Any) -> None:
    """Keeps the lines of a formula apart: fractions would touch those of the next."""
    from docutils import nodes

    for formula in doctree.findall(nodes.math_block):
        spaced = formula.astext().replace("\\\\\n", "\\\\[0.5em]\n")
        formula.children = [nodes.Text(spaced)]


def break_lines_in_tables(app: Any, doctree: Any) -> None:
    """Lets cells break after the dots and underscores of names, not in 1e-07."""
    from docutils import nodes

    for cell in doctree.findall(nodes.entry):
        for text in list(cell.findall(nodes.Text)):
            if isinstance(text.parent, nodes.literal):
                pieces = re.split(r"(?<=[._])(?=[a-z])", text)
                may_break = nodes.raw("", "<wbr>", format="html")
                new = [nodes.Text(pieces[0])]
                for piece in pieces[1:]:
                    new += [may_break.deepcopy(), nodes.Text(piece)]
            else:
                pieces = re.split(r"(\d[\d.]*e-\d+)", text)
                new = [nodes.Text(piece) for piece in pieces]
                for i, number in list(enumerate(pieces))[1::2]:
                    new[i] = nodes.inline("", number, classes=["number"])
            text.parent.replace(text, new)


def setup(app: Any) -> None:
    """Registers the functions above."""
    app.connect("doctree-read", space_lines)
    app.connect("doctree-read", break_lines_in_tables)
    app.connect("missing-reference", link_elsewhere)
    app.connect("source-read", close_up)
