"""An older operator set for a model that is the same in it, where onnxruntime is better at that.

Runtimes get the kernels of a new operator set late. onnxruntime 1.23 runs float models of opset 23,
but has no QuantizeLinear of it, and before 1.28 a MaxPool of opset 22 fuses with no Q and DQ.

From opset 19 on, onnxruntime (1.32) runs AveragePool as plain loops, below with vectorized kernels
and in several threads: 57 against 272 us for 3x3 windows over 40 x 28 x 28 values, 39 against 258
for means of 5 of 48 x 23 x 23 channels (local response normalization). Only over images whose
channels come in whole blocks of 16 does a third kernel, for blocks, take both.
"""

from collections.abc import Container
from typing import Any

import onnx
from onnx import TensorProto

from qdq.facts import BLOCK, DEFAULT
from qdq.graph import Graph, attributes, declare_opset, opset_of
from qdq.nested import all_graphs, subgraphs
from qdq.prepare.opset import OPSET

__all__ = ["lower_for_pools", "lower_to_usual"]

_OPSET = 18
_NEW_TYPES_ONLY = frozenset(
    {"AveragePool", "Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Flatten",
     "Identity", "Pad", "QuantizeLinear", "ReduceMax", "ReduceMin", "Reshape", "Resize", "Shape",
     "Size", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators of which later operator sets know more types, and attributes that are looked at."""
_TYPES = frozenset({"dtype", "output_dtype", "to"})
"""Attributes that name a type."""
_NEW_ATTRIBUTES = frozenset({"block_size", "output_dtype", "precision", "saturate"})
_OLD_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64,
     TensorProto.BOOL}
)  # fmt: skip


def lower_to_usual(model: onnx.ModelProto) -> None:
    """Declare opset 21, to which older models are raised, for a later one, if nothing differs.

    Since then operators have got types, and attributes that say so; new ones have come, but no
    old one has changed its meaning (up to opset 26). Changes the model in place.
    """
    if opset_of(model) <= OPSET or model.functions:  # those have an opset of their own
        return
    graphs = list(all_graphs(model.graph))
    typed = all(_is_usual(t.data_type) for g in graphs for t in g.initializer)
    values = (v.type.tensor_type.elem_type for g in graphs for v in (*g.input, *g.output))
    if typed and all(map(_is_usual, values)) and all(_is_known(n) for g in graphs for n in g.node):
        declare_opset(model, OPSET)


def _is_usual(kind: int) -> bool:
    """Whether a type has been one of all operators' for long, as bfloat16 and later ones are not.

    What is no tensor has the type 0.
    """
    return kind < TensorProto.BFLOAT16


def _is_known(node: onnx.NodeProto) -> bool:
    """Whether opset 21 has the operator, with the attributes and types that the node names."""
    if node.domain not in DEFAULT:
        return True
    if not onnx.defs.has(node.op_type, OPSET):
        return False
    known = onnx.defs.get_schema(node.op_type, OPSET, "").attributes
    return all(
        a.name in known and _is_usual(a.t.data_type) and (a.name not in _TYPES or _is_usual(a.i))
        for a in node.attribute
    )


def lower_for_pools(model: onnx.ModelProto, graph: Graph, integer: Container[str]) -> None:
    """Declare opset 18 for a later one, if a float AveragePool gains by that and nothing differs.

    Args:
        model: the emitted model; changed in place.
        graph: the prepared model that it was made of, whose shapes are known.
        integer: names of the nodes that run on integers.
    """
    nodes = model.graph.node
    pools = [n for n in graph.nodes if n.op_type == "AveragePool"]
    gains = any(n.name not in integer and _is_slow(graph, n) for n in pools)
    opset = opset_of(model)
    if opset <= _OPSET or not gains:
        return
    typed = all(t.data_type in _OLD_TYPES for t in model.graph.initializer)
    if typed and all(map(_is_plain, pools)) and all(_is_old(n, opset) for n in nodes):
        declare_opset(model, _OPSET)


def _is_slow(graph: Graph, pool: onnx.NodeProto) -> bool:
    shape = graph.shape(pool.input[0])
    return shape is not None and (len(shape) != 4 or (shape[1] or 0) % BLOCK != 0)


def _is_plain(pool: onnx.NodeProto) -> bool:
    """Whether the kernels of all operator sets agree: at the borders they do not always.

    With padding in numbers they do, whether it counts or not.
    """
    found: dict[str, Any] = attributes(pool)
    computed = found.get("auto_pad", b"NOTSET") != b"NOTSET" and found.get("count_include_pad", 0)
    return not (computed or found.get("ceil_mode", 0) or "dilations" in found)


def _is_old(node: onnx.NodeProto, opset: int) -> bool:
    """Whether the node means the same in the older operator set."""
    if node.domain not in DEFAULT:
        return True
    if any(True for _ in subgraphs(node)):
        return False
    found = attributes(node)
    new_mode = found.get("coordinate_transformation_mode") == b"half_pixel_symmetric"
    if new_mode or not _NEW_ATTRIBUTES.isdisjoint(found):
        return False
    since = onnx.defs.get_schema(node.op_type, opset, "").since_version
    return since <= _OPSET or node.op_type in _NEW_TYPES_ONLY
