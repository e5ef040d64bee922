"""Einsum of two tensors as a MatMul, which has an integer kernel and a way back."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.equation import labelled
from qdq.prepare.editing import Editor, Node

__all__ = ["einsum_batches", "einsum_products"]


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


def einsum_batches(ed: Editor) -> None:
    """Einsum of two tensors that is a batch of products of matrices becomes a MatMul.

    The axes of both are brought into the order batch, rows, columns, and those of the product into
    the order of the result; the runtime's Einsum does the same inside. What sums over several
    axes, or has several axes of one tensor alone, stays an Einsum: it would need a Reshape.
    """
    for node in ed.nodes("Einsum"):
        found = _terms(ed, node)
        if found is None or not _is_float(ed, node) or _broadcasts(ed, node, found[0]):
            continue
        (a, b), result = found
        inner = [i for i in a if i in b and i not in result]
        alone = [[i for i in term if i not in other] for term, other in ((a, b), (b, a))]
        batch = [i for i in result if i in a and i in b]
        if len(inner) != 1 or any(len(one) != 1 or one[0] not in result for one in alone):
            continue
        (row,), (column,) = alone
        slots = (0, 1) if result.index(row) < result.index(column) else (1, 0)
        terms, ends = (a, b), (row, column)
        orders = ([*batch, ends[slots[0]], *inner], [*batch, *inner, ends[slots[1]]])
        new: list[onnx.NodeProto] = []
        sides = [
            _turned(ed, node, node.input(slot), (terms[slot], "".join(order)), new)
            for slot, order in zip(slots, orders, strict=True)
        ]
        made = "".join([*batch, ends[slots[0]], ends[slots[1]]])
        y = node.output if made == result else ed.fresh(f"{node.output}_batches")
        new.append(ed.new_node("MatMul", sides, [y], node.name))
        if made != result:
            shape = ed.shape(node.output)
            if shape is not None:
                ed.set_type(y, ed.elem_type(node.output), [shape[result.index(i)] for i in made])
            new.append(_transpose(ed, node, [y, node.output], [made.index(i) for i in result]))
        ed.replace([node], new)


def _is_float(ed: Editor, node: Node) -> bool:
    """Whether both are of floating point, and not both constants, which the runtime folds."""
    if all(name in ed.constants for name in node.inputs):
        return False
    kinds = [ed.dtype(name) for name in node.inputs]
    return all(kind is not None and kind.kind == "f" for kind in kinds)


def _broadcasts(ed: Editor, node: Node, terms: Sequence[str]) -> bool:
    """Whether an axis of size 1 may stand for as many as the other tensor has."""
    a, b = (
        dict(zip(term, ed.shape(name) or (), strict=False))
        for term, name in zip(terms, node.inputs, strict=True)
    )
    sizes = [(a.get(label), b.get(label)) for label in set(a) & set(b)]
    return any(x != y and 1 in (x, y) for x, y in sizes)


def _turned(
    ed: Editor, node: Node, name: str, labels: tuple[str, str], new: list[onnx.NodeProto]
) -> str:
    """A tensor with its axes in another order: a constant, or behind a Transpose added to new."""
    have, want = labels
    order = [have.index(i) for i in want]
    value = ed.array(name)
    if have == want:
        return name
    if value is not None:
        turned = np.ascontiguousarray(np.transpose(value, order))
        return ed.add_constant(f"{node.name}_{want}", turned)
    result = ed.fresh(f"{name}_{want}")
    shape = ed.shape(name)
    if shape is not None:
        ed.set_type(result, ed.elem_type(name), [shape[k] for k in order])
    new.append(_transpose(ed, node, [name, result], order))
    return result


def _transpose(ed: Editor, node: Node, ends: Sequence[str], order: Sequence[int]) -> onnx.NodeProto:
    name = ed.fresh(f"{node.name}_transpose")
    return ed.new_node("Transpose", [ends[0]], [ends[1]], name, perm=list(order))


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


def _terms(ed: Editor, node: Node) -> tuple[list[str], str] | None:
    """Labels of two operands and of the result, none of them twice; None for other equations."""
    shapes = [ed.shape(name) for name in node.inputs]
    found = labelled(node.attr("equation", ""), [None if s is None else len(s) for s in shapes])
    if found is None or len(found[0]) != 2:
        return None
    terms, result = found
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    return terms, result


def _product(ed: Editor, node: Node) -> _Product | None:
    """None where it is none."""
    found = _terms(ed, node)
    if found is None or _broadcasts(ed, node, found[0]):
        return None
    terms, result = found
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
