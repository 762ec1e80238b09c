"""Sphinx: `make docs` builds the site into build/docs, without a network."""

from importlib.metadata import version as installed

project = "spafl-kernels"
author = "The spafl-kernels authors"
version = release = installed("spafl-kernels")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"spafl-kernels {version}"
exclude_patterns = ["requirements.txt"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}

myst_heading_anchors = 3
# Pages link to files of the repository, which are not pages of the site.
suppress_warnings = ["myst.xref_missing", "myst.header"]
