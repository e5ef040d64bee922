"""MatMul by a constant matrix together with its bias: one Gemm."""

import math
from collections.abc import Sequence

import numpy as np
import onnx

from qdq.prepare.editing import Editor, Node
from qdq.prepare.linear import follow, scaled_weight

__all__ = ["matmul_units"]


def matmul_units(ed: Editor) -> None:
    """MatMul by a constant matrix with its bias becomes one Gemm.

    ``x B`` of shape (..., N) followed by Add of a constant (N,) is
    ``reshape(reshape(x, (-1, K)) B + bias, (..., N))``; for x of rank 2 without the reshapes.
    Factors in between fold as in fold_affine. MatMuls of one x share the reshaped x. A MatMul
    without bias stays a MatMul. A constant of shape (1, …, 1, K, N) is a matrix, if x has as many
    dimensions.
    """
    flat: dict[str, str] = {}
    for node in ed.nodes("MatMul"):
        rank = ed.rank(node.input(0)) or 0
        _squeeze(ed, node, rank)
        if rank < 2 or not _is_float_matrix(ed, node.input(1)):
            continue
        chain = follow(ed, node, axis=rank - 1, rank=rank)
        if chain is None:
            continue
        nodes, affine = chain
        b = scaled_weight(ed, node, affine.scale)
        if not affine.shift.any() and all(n.op in ("Mul", "Div") for n in nodes):
            new = [ed.new_node("MatMul", [node.input(0), b], [nodes[-1].output], node.name)]
        else:
            bias = ed.add_constant(f"{node.name}_bias", affine.shift.astype(ed.dtype(b)))
            new = _unit(ed, node, [b, bias], nodes[-1].output, flat)
        ed.replace([node, *nodes], new)


def _squeeze(ed: Editor, node: Node, rank: int) -> None:
    """Take axes of length 1, which batches of x broadcast over, from a constant right side."""
    name = node.input(1)
    dims = tuple(ed.constants[name].dims) if name in ed.constants else ()
    if not 2 < len(dims) <= rank or any(d != 1 for d in dims[:-2]):
        return
    key = (name, "matrix")
    value = None if key in ed.derived else ed.array(name)
    if value is not None:
        ed.derived[key] = ed.add_constant(f"{name}_matrix", value.reshape(dims[-2:]))
    ed.set_input(node, 1, ed.derived[key])


def _is_float_matrix(ed: Editor, name: str) -> bool:
    dtype = ed.dtype(name)
    known = name in ed.constants and dtype is not None and dtype.kind == "f"
    return known and len(ed.constants[name].dims) == 2


def _unit(
    ed: Editor, node: Node, constants: Sequence[str], y: str, flat: dict[str, str]
) -> list[onnx.NodeProto]:
    x = node.input(0)
    shape = ed.shape(x) or ()
    if len(shape) == 2:
        return [ed.new_node("Gemm", [x, *constants], [y], node.name)]
    k, width = ed.constants[constants[0]].dims
    rows = None if None in shape[:-1] else math.prod(d or 0 for d in shape[:-1])
    new: list[onnx.NodeProto] = []
    if x not in flat:
        flat[x] = ed.fresh(f"{x}_2d")
        target = ed.add_constant(f"{node.name}_rows", np.array([-1, k], np.int64))
        ed.set_type(flat[x], ed.elem_type(x), (rows, k))
        name = ed.fresh(f"{node.name}_flatten")
        ed.add_before(node, ed.new_node("Reshape", [x, target], [flat[x]], name))
    product = ed.fresh(f"{y}_2d")
    ed.set_type(product, ed.elem_type(x), (rows, width))
    new.append(ed.new_node("Gemm", [flat[x], *constants], [product], node.name))
    back = [*shape[:-1], width]
    if back.count(None) <= 1:
        dims = np.array([-1 if d is None else d for d in back], np.int64)
        target = ed.add_constant(f"{node.name}_shape", dims)
    else:
        target = _dynamic_shape(ed, node, int(width), new)
    name = ed.fresh(f"{node.name}_restore")
    new.append(ed.new_node("Reshape", [product, target], [y], name))
    return new


def _dynamic_shape(ed: Editor, node: Node, width: int, new: list[onnx.NodeProto]) -> str:
    """Nodes that give x's leading dimensions and N, for an x with several unknown ones."""
    leading, target = ed.fresh(f"{node.name}_leading"), ed.fresh(f"{node.name}_shape")
    last = ed.add_constant(f"{node.name}_width", np.array([width], np.int64))
    shape_name = ed.fresh(f"{node.name}_dims")
    new.append(ed.new_node("Shape", [node.input(0)], [leading], shape_name, start=0, end=-1))
    concat = ed.fresh(f"{node.name}_concat")
    new.append(ed.new_node("Concat", [leading, last], [target], concat, axis=0))
    return target
