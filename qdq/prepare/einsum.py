"""Einsum by a constant: a MatMul, which has an integer kernel and a faster float one."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.prepare.editing import Editor, Node

__all__ = ["einsum_products"]


class _Product(NamedTuple):
    """An Einsum as a product of an activation and a matrix.

    Attributes:
        x, weight: the activation, and the constant.
        labels: those of the constant's axes.
        lead, inner, outer: labels of the axes that are kept, summed, and new from the constant.
    """

    x: str
    weight: str
    labels: str
    lead: str
    inner: str
    outer: str


def einsum_products(ed: Editor) -> None:
    """Einsum of an activation with a constant, over the activation's last axes, becomes a MatMul.

    ``einsum("ibh,hnd->ibnd", x, W)`` is ``reshape(x W', (i, b, n, d))`` with W' = W as a matrix of
    (h, n d); where several axes are summed, x is reshaped too. What the two share without summing
    over it (a batch of matrices) and what changes the order of x's axes stays an Einsum.
    """
    for node in ed.nodes("Einsum"):
        found = _product(ed, node)
        value = ed.array(found.weight) if found is not None else None
        if found is not None and value is not None:
            order = [found.labels.index(i) for i in found.inner + found.outer]
            ed.replace([node], _written(ed, node, found, np.transpose(value, order)))


def _written(
    ed: Editor,
    node: Node,
    found: _Product,
    value: NDArray[np.generic],
) -> list[onnx.NodeProto]:
    """The nodes; ``value``: the weight with the summed axes first."""
    summed, made = value.shape[: len(found.inner)], value.shape[len(found.inner) :]
    matrix = np.ascontiguousarray(value.reshape(prod(summed), prod(made)))
    weight = ed.add_constant(f"{node.name}_matrix", matrix)
    x, y, new = found.x, node.output, []
    if len(summed) != 1:
        x = _intermediate(ed, found, f"{found.x}_rows", matrix.shape[0])
        new.append(_reshape(ed, f"{node.name}_flatten", found, [found.x, x], matrix.shape[:1]))
    if len(made) != 1:
        y = _intermediate(ed, found, f"{node.output}_rows", matrix.shape[1])
    new.append(ed.new_node("MatMul", [x, weight], [y], node.name))
    if len(made) != 1:
        new.append(_reshape(ed, f"{node.name}_restore", found, [y, node.output], made))
    return new


def _intermediate(ed: Editor, found: _Product, name: str, width: int) -> str:
    """A tensor of the axes that are kept, and one more."""
    count = len(found.lead)
    shape = ed.shape(found.x) or (None,) * count
    fresh = ed.fresh(name)
    ed.set_type(fresh, ed.elem_type(found.x), (*shape[:count], width))
    return fresh


def _reshape(
    ed: Editor, name: str, found: _Product, ends: Sequence[str], sizes: Sequence[int]
) -> onnx.NodeProto:
    """A Reshape between the two ends, of the axes behind those that are kept (0: as it is)."""
    target = np.array([*[0] * len(found.lead), *sizes], np.int64)
    shape = ed.add_constant(f"{name}_shape", target)
    return ed.new_node("Reshape", [ends[0], shape], [ends[1]], ed.fresh(name))


def _product(ed: Editor, node: Node) -> _Product | None:
    """None where it is none."""
    left, _, result = node.attr("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not result or not "".join([*terms, result]).isalpha():
        return None
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    for slot in (0, 1):
        weight, x = node.input(slot), node.input(1 - slot)
        dtype = ed.dtype(weight)
        floating = dtype is not None and dtype.kind == "f"
        if not floating or weight not in ed.constants or x in ed.constants:
            continue
        given, mine = terms[slot], terms[1 - slot]
        lead = "".join(i for i in mine if i in result)
        inner = "".join(i for i in mine if i not in result)
        outer = "".join(i for i in result if i not in lead)
        fits = mine == lead + inner and result == lead + outer and set(given) == set(inner + outer)
        if lead and inner and fits:
            return _Product(x, weight, given, lead, inner, outer)
    return None
