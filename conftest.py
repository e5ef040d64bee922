"""The Python examples of the README and of the pages under docs/ run as tests.

Blocks fenced as ``python`` or ``{code-cell} python`` run in order, with one namespace and one
empty working directory per page, so that a page that has gone stale fails.
"""

import os
import tempfile
from typing import Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

os.environ.setdefault("MPLBACKEND", "Agg")  # pages that draw need no screen


def enter(namespace: dict[str, Any]) -> None:
    """Go to an empty directory."""
    folder = tempfile.TemporaryDirectory()
    namespace["_page"] = folder, os.getcwd()  # noqa: PTH109
    os.chdir(folder.name)


def leave(namespace: dict[str, Any]) -> None:
    """Go back, and remove the directory with what the page wrote."""
    folder, before = namespace.pop("_page")
    os.chdir(before)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=enter,
    teardown=leave,
).pytest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the blocks of a page back in order, last, where a plugin has shuffled the tests."""
    blocks = [item for item in items if isinstance(item, SybilItem)]
    blocks.sort(key=lambda item: (str(item.path), item.example.line))
    items[:] = [item for item in items if not isinstance(item, SybilItem)] + blocks
