"""Sphinx configuration: ``sphinx-build -W docs docs/_build/html``.

Pages that begin with ``file_format: mystnb`` are run at every build, so that their output and
plots are those of this version; a cell that fails stops the build. pytest runs the examples of
every page too, without Sphinx (see conftest.py).
"""

import os
import re
from pathlib import Path
from typing import Any

from qdq.version import __version__

project = "qdq"
author = "the qdq developers"
copyright = "the qdq developers, MIT licence"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "jupyter_execute"]

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120  # seconds, for a cell
nb_execution_in_temp = True  # what a page writes is gone with it
nb_merge_streams = True  # what a cell prints is one block
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent / "matplotlibrc")  # read by the kernels
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
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def plain_asterisks(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]):
    """Docstrings are plain text: an asterisk before a word, as in (M, C, *kernel), is no markup."""
    lines[:] = [re.sub(r"(?<=[\s(])\*(?=\w)", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", plain_asterisks, priority=400)
