"""Gemm in one shape: x times a constant (K, N), plus a constant (N,) or nothing."""

import numpy as np
import onnx

from qdq.prepare.editing import Array, Editor, Node

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
    b = ed.array(node.input(1))
    alpha = float(node.attr("alpha", 1.0))
    if b is None or b.dtype.kind != "f":
        return
    if node.attr("transB", 0):
        b = b.T
    if alpha != 1.0:
        b = (b.astype(np.float64) * alpha).astype(b.dtype)
    if node.attr("transB", 0) or alpha != 1.0:
        ed.set_input(node, 1, _shared(ed, node.input(1), f"B{alpha!r}", b))
    for name in ("alpha", "transB"):
        node.set_attr(name, None)
    if node.attr("transA", 0):
        a = node.input(0)
        out = ed.fresh(f"{a}_transposed")
        name = ed.fresh(f"{node.name}_transpose")
        ed.add_before(node, ed.new_node("Transpose", [a], [out], name, perm=[1, 0]))
        shape = ed.shape(a)
        ed.set_type(out, ed.elem_type(a), None if shape is None else shape[::-1])
        ed.set_input(node, 0, out)
        node.set_attr("transA", None)


def _shared(ed: Editor, source: str, what: str, value: Array) -> str:
    """A constant derived from ``source``; derived once for all nodes that want the same."""
    key = (source, what)
    if key not in ed.derived:
        ed.derived[key] = ed.add_constant(f"{source}_folded", value)
    return ed.derived[key]


def _plain_bias(ed: Editor, node: Node) -> None:
    c, b = ed.array(node.input(2)), ed.shape(node.input(1))
    if c is None or b is None:
        return
    width = b[0] if node.attr("transB", 0) else b[1]
    beta = float(node.attr("beta", 1.0))
    row = c.reshape(c.shape[-1:]) if c.ndim == 2 and c.shape[0] == 1 else c
    if beta != 1.0:
        row = (row.astype(np.float64) * beta).astype(c.dtype)
    node.set_attr("beta", None)
    if row.ndim < 2 and width is not None:
        row = np.broadcast_to(row, (width,))
        if beta != 1.0 or row.shape != c.shape:
            ed.set_input(node, 2, ed.add_constant(f"{node.name}_bias", row))
        return
    y = node.output
    product = ed.fresh(f"{y}_product")
    constant = ed.add_constant(f"{node.name}_addend", row)
    gemm = onnx.NodeProto()
    gemm.CopyFrom(node.proto)
    gemm.output[0] = product
    del gemm.input[2:]
    ed.set_type_like(product, y)
    add = ed.new_node("Add", [product, constant], [y], ed.fresh(f"{node.name}_add"))
    ed.replace([node], [gemm, add])
