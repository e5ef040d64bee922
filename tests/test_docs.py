"""The documentation is complete and holds together; its examples run through the root conftest."""

import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest

import qdq

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
REFERENCE = "\n".join(p.read_text(encoding="utf8") for p in sorted((DOCS / "reference").glob("*")))
FENCE = re.compile(r"^(```+)(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf8"))


def toctree() -> list[str]:
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text("utf8"), re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as MyST makes them: lower case, spaces to hyphens, punctuation away."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", qdq.__all__)
def test_every_public_name_is_on_a_reference_page(name: str) -> None:
    assert re.search(rf"\bqdq\.{re.escape(name)}\b", REFERENCE)


def test_operator_table_is_current() -> None:
    spec = importlib.util.spec_from_file_location("operators_table", DOCS / "operators_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.PAGE.read_text(encoding="utf8")
    assert found == script.page(found), "run: python docs/operators_table.py"
    assert all(f"| {op} |" in found for op in qdq.ops.TABLE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_every_page_is_in_the_toctree(page: Path) -> None:
    name = page.relative_to(DOCS).with_suffix("").as_posix()
    assert name == "index" or any(fnmatch.fnmatchcase(name, entry) for entry in toctree())


@pytest.mark.parametrize("entry", [e for e in toctree() if "*" not in e])
def test_every_toctree_entry_is_a_page(entry: str) -> None:
    assert (DOCS / f"{entry}.md").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_code_cells_are_in_notebooks_and_nothing_else_is_run_there(page: Path) -> None:
    """Sphinx runs cells alone and pytest all blocks, so all but comparisons must be cells."""
    text = page.read_text(encoding="utf8")
    notebook = text.startswith("---\nfile_format: mystnb\n")
    assert notebook == bool(re.search(r"^```\{code-cell\} python$", text, re.MULTILINE))
    if notebook:
        assert not re.search(r"^```python\n(?!>>> )", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name}: dead link {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: no heading {link}"


def test_errors_page_draws_the_whole_tree() -> None:
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf8")
    assert all(f"`qdq.{name}`" in text for name in qdq.errors.__all__ if name != "QdqError")


def test_design_page_has_every_file() -> None:
    text = (DOCS / "explanation" / "design.md").read_text(encoding="utf8")
    table = text.partition("## Floors")[2].partition("## Records")[0]
    root = Path(qdq.__file__).parent
    files = {p.stem for p in root.glob("*.py")} | {p.parent.name for p in root.glob("*/*.py")}
    missing = [f for f in files if f"`{f}`" not in table and f"`{f}/`" not in table]
    assert not missing
