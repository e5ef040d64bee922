"""Sphinx configuration: ``sphinx-build -W docs docs/_build``.

The examples are not run here: pytest runs every page (see conftest.py), and what a page shows as
output is checked there.
"""

import re
from typing import Any

from qdq.version import __version__

project = "qdq"
author = "the qdq developers"
copyright = "the qdq developers, MIT licence"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

nb_execution_mode = "off"
# Code cells in a page that is not converted to a notebook are shown as code, which is meant.
suppress_warnings = ["mystnb.nbcell"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "qdq"


def plain_asterisks(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]):
    """Docstrings are plain text: an asterisk before a word, as in (M, C, *kernel), is no markup."""
    lines[:] = [re.sub(r"(?<=[\s(])\*(?=\w)", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", plain_asterisks, priority=400)
