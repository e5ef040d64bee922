"""Shapes of a model's inputs, which decide what pays on integers. Numpy only."""

from collections.abc import Mapping

__all__ = ["Shapes", "larger"]

Shapes = Mapping[str, tuple[int, ...]]
"""Input → shape of a sample."""


def larger(a: Shapes, b: Shapes) -> dict[str, tuple[int, ...]]:
    """Each input's larger size along every axis, or its larger rank; in any order the same."""
    found = dict(a)
    for name, shape in b.items():
        own = found.setdefault(name, shape)
        same = len(own) == len(shape)
        found[name] = tuple(map(max, own, shape)) if same else max(own, shape, key=len)
    return found
