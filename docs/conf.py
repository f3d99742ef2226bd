"""Sphinx configuration; `make docs` builds."""

from importlib import metadata

project = "secateur"
author = "the secateur authors"
copyright = "the secateur authors, Apache-2.0"
release = metadata.version("secateur")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings are written in Google style, with single backticks for code.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"secateur {release}"
