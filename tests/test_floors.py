"""Imports go down, mathematics and graph work do not share a file, one file runs models."""

import ast
from pathlib import Path

import pytest

import qdq

ROOT = Path(qdq.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if "demo" not in p.parts or p.name == "__init__.py")
# from the lowest floor up; a file imports only from floors below its own (packages: from their own
# files in any order that has no cycle, checked by Python itself)
FLOORS = (
    {"errors", "version"},
    {"spec"},
    {"ranges", "scheme", "graph", "mincut", "ops", "prepare", "modelio", "data", "affine",
     "problem", "targets", "costs", "cost_table", "weighing", "calibrate", "session", "views",
     "rules", "harm", "probing", "smoothing", "equalizing", "dividing", "files", "packing",
     "statistics", "observe", "shipment", "worker", "sharding", "weights", "wholes"},
    {"placement", "solve", "steps", "bias_scale"},
    {"plan"},
    {"wiring", "layouts", "channels", "history", "sqnr", "matching", "alone", "advice", "tally",
     "report", "report_text", "report_svg", "report_html", "sensitivity", "frontier", "rating"},
    {"evidence"},
    {"balancing"},
    {"stages"},
    {"emit", "verify"},
    {"api", "compare"},
    {"__init__"},
    {"demo", "cli", "compat"},
    {"__main__"},
)  # fmt: skip
NUMPY_ONLY = {"affine", "bias_scale", "calibrate", "costs", "cost_table", "harm", "mincut",
              "packing", "problem", "ranges", "scheme", "solve", "sqnr", "spec", "statistics",
              "steps", "smoothing", "equalizing", "targets", "weighing", "ops"}  # fmt: skip


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def floor_of(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "qdq" or len(parts) < 2:
            continue
        other = parts[1] if (ROOT / parts[1]).exists() or (ROOT / f"{parts[1]}.py").exists() else ""
        other = other or "__init__"
        assert other == own or floor_of(other) <= floor_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_what(path: Path) -> None:
    heads = {name.split(".")[0] for name in imports(path)}
    assert heads.isdisjoint({"onnxruntime"}) or path.name == "session.py"
    assert not any(name.startswith("onnxruntime.quantization") for name in imports(path))
    if module_of(path) in NUMPY_ONLY:
        assert "onnx" not in heads


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf8").splitlines()) <= 330
