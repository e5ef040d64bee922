"""Imports go down, mathematics and graph work do not share a file, one file runs models."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

import qdq

ROOT = Path(qdq.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if "demo" not in p.parts or p.name == "__init__.py")
# from the lowest floor up; a file imports only from floors below its own. Packages count as one,
# with their own files in any order that has no cycle (Python itself sees to that), but for those
# of SPREAD, whose files are on several floors
SPREAD = frozenset({"balancing", "placement"})
FLOORS = (
    {"checks", "errors", "facts", "joined", "sqnr", "version", "balancing"},
    {"spec"},
    {"affine", "borrowed", "calibrate", "data", "dynamic", "equation", "excerpt", "extent",
     "external", "files", "forms", "graph", "light", "lookups", "lowering", "modelio", "nested",
     "ops", "outputs", "prepare", "problem", "ranges", "rules", "scheme", "session", "shell",
     "spelling", "statistics", "subpixel", "successors", "tables", "targets", "timing", "twins",
     "upsampling", "views", "weights", "wire", "wish", "balancing.dividing", "balancing.equalizing",
     "balancing.smoothing", "placement.cost_table", "placement.costs", "placement.harm",
     "placement.mincut",
     "placement.adjoint", "placement.choosing", "placement.gradients", "placement.masked",
     "placement.normalizing", "placement.ranking", "placement.recurrence", "placement.scores",
     "placement.tape", "placement.transposes", "placement.weighing", "placement.wholes"},
    {"bias_scale", "kernel", "placement", "placement.borders", "placement.layout",
     "placement.network", "placement.place", "placement.units",
     "solve", "steps"},
    {"plan"},
    {"absorbed", "balancing.channels", "balancing.layouts", "history", "placement.budget",
     "placement.frontier", "placement.gains",
     "placement.rating", "placement.trial", "report", "wiring"},
    {"evidence"},
    {"balancing.balance"},
    {"stages"},
    {"emit", "verify"},
    {"choice"},
    {"api", "compare"},
    {"__init__"},
    {"cli", "compat", "demo"},
    {"__main__"},
)  # fmt: skip
NUMPY_ONLY = {"affine", "balancing.equalizing", "balancing.smoothing", "bias_scale", "calibrate",
              "checks", "equation", "extent", "facts", "joined", "kernel", "ops",
              "placement.cost_table", "placement.costs", "placement.harm", "placement.mincut",
              "placement.ranking", "placement.scores", "placement.weighing", "problem", "ranges",
              "report.sqnr", "scheme", "solve", "spec", "spelling", "sqnr",
              "statistics.few", "statistics.packing", "statistics.summary",
              "steps", "subpixel", "tables", "targets"}  # fmt: skip


def unit_of(parts: Sequence[str]) -> str:
    """The file or package that counts: ``("placement", "costs", "Features")`` → placement.costs."""
    inner = parts[0] in SPREAD and len(parts) > 1 and (ROOT / parts[0] / f"{parts[1]}.py").exists()
    return f"{parts[0]}.{parts[1]}" if inner and parts[1] != "__init__" else parts[0]


def names_of(path: Path) -> list[str]:
    """The module's dotted name below qdq, in parts."""
    return list(path.relative_to(ROOT).with_suffix("").parts)


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
    own = unit_of(names_of(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "qdq" or len(parts) < 2:
            continue
        known = (ROOT / parts[1]).exists() or (ROOT / f"{parts[1]}.py").exists()
        other = unit_of(parts[1:]) if known else "__init__"
        assert other == own or floor_of(other) <= floor_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_what(path: Path) -> None:
    heads = {name.split(".")[0] for name in imports(path)}
    assert heads.isdisjoint({"onnxruntime"}) or path.name == "session.py"
    assert not any(name.startswith("onnxruntime.quantization") for name in imports(path))
    parts = names_of(path)
    if not NUMPY_ONLY.isdisjoint({parts[0], ".".join(parts[:2])}):
        assert "onnx" not in heads


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf8").splitlines()) <= 330
