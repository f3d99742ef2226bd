"""Sphinx configuration; `make docs` builds."""

from importlib import metadata

project = "secateur"
author = "the secateur authors"
copyright = "the secateur authors, Apache-2.0"
release = metadata.version("secateur")
version = release

# myst_nb reads Markdown as myst_parser does, and notebooks.
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Notebooks are stored without what their cells print; each build runs them.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings are written in Google style, with single backticks for code.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"secateur {release}"
