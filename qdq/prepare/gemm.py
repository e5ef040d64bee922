"""Gemm in one shape: x times a constant (K, N), plus a constant (N,) or nothing."""

import numpy as np

from qdq.errors import ModelError
from qdq.prepare.editing import Editor, Node
from qdq.weights import is_reference

__all__ = ["plain_gemms"]


def plain_gemms(ed: Editor) -> None:
    """Gemm with constant B: alpha and transB into B, beta into C, C a vector of N or split off.

    ``alpha A' B' + beta C = A' (alpha B') + (beta C)``. A C with one value or one row is the
    same for every row of the result and becomes a vector (N,); a constant C that differs
    between rows becomes an Add behind the Gemm. A transposed A becomes a Transpose before it.
    A Gemm whose B is not constant stays, as does a C that is not constant.
    """
    for node in ed.nodes("Gemm"):
        _plain_weight(ed, node)
        _plain_bias(ed, node)


def _plain_weight(ed: Editor, node: Node) -> None:
    b, dtype = node.input(1), ed.dtype(node.input(1))
    if b not in ed.constants or dtype is None or dtype.kind != "f":
        return
    alpha, turned = float(node.attr("alpha", 1.0)), bool(node.attr("transB", 0))
    if turned or alpha != 1.0:
        ed.set_input(node, 1, _derived(ed, b, alpha, turned))
    transposed = node.attr("transA", 0)
    for name in ("alpha", "transA", "transB"):
        node.set_attr(name, None)
    if transposed:
        a = node.input(0)
        out = ed.fresh(f"{a}_transposed")
        name = ed.fresh(f"{node.name}_transpose")
        ed.add_before(node, ed.new_node("Transpose", [a], [out], name, perm=[1, 0]))
        shape = ed.shape(a)
        ed.set_type(out, ed.elem_type(a), None if shape is None else shape[::-1])
        ed.set_input(node, 0, out)


def _derived(ed: Editor, name: str, alpha: float, turned: bool) -> str:
    """``alpha B`` or ``alpha B^T`` as a constant, made once for all nodes that want the same."""
    key = (name, f"{alpha!r} {turned}")
    if key not in ed.derived and alpha == 1.0 and is_reference(ed.constants[name]):
        ed.derived[key] = ed.add_turned(f"{name}_folded", name)
    value = None if key in ed.derived else ed.array(name)
    if value is not None:
        value = value.T if turned else value
        if alpha != 1.0:
            value = (value.astype(np.float64) * alpha).astype(value.dtype)
        ed.derived[key] = ed.add_constant(f"{name}_folded", value)
    return ed.derived[key]


def _plain_bias(ed: Editor, node: Node) -> None:
    if node.attr("beta", 1.0) == 0.0:
        ed.set_input(node, 2, "")
    if not node.input(2):
        node.set_attr("beta", None)
        return
    c, b = ed.array(node.input(2)), ed.shape(node.input(1))
    if c is None or b is None or c.dtype.kind != "f":
        return
    width = b[0] if node.attr("transB", 0) else b[1]
    beta = float(node.attr("beta", 1.0))
    row = c.reshape(c.shape[-1:]) if c.ndim == 2 and c.shape[0] == 1 else c
    if beta != 1.0:
        row = (row.astype(np.float64) * beta).astype(c.dtype)
    node.set_attr("beta", None)
    if row.ndim < 2 and width is not None:
        if row.size not in (1, width):
            raise ModelError(
                f"node {node.name!r}: its addend {node.input(2)!r} has shape {c.shape}, which does "
                f"not fit the {width} columns of {node.input(1)!r}. Export the model again",
                node=node.name,
                tensor=node.input(2),
            )
        row = np.broadcast_to(row, (width,))
        if beta != 1.0 or row.shape != c.shape:
            ed.set_input(node, 2, ed.add_constant(f"{node.name}_bias", row))
        return
    y = node.output
    product = ed.fresh(f"{y}_product")
    constant = ed.add_constant(f"{node.name}_addend", row)
    gemm = node.copied()
    gemm.output[0] = product
    del gemm.input[2:]
    ed.set_type_like(product, y)
    add = ed.new_node("Add", [product, constant], [y], ed.fresh(f"{node.name}_add"))
    ed.replace([node], [gemm, add])
