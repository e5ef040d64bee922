"""Softmaxes whose scores a mask may cut off, found in a graph.

A mask adds -10000, say, to the scores of what must not be looked at. The weights of those are 0,
but on the way there the runtime's exp passes through numbers that are not normal any more, which
many processors take a hundred times as long for (``qdq.placement.scores``).
"""

import onnx
from onnx import TensorProto

from qdq.graph import Graph, attributes

__all__ = ["weighing_scores"]

_PASSES = frozenset({"Dropout", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def weighing_scores(model: onnx.ModelProto) -> dict[str, str]:
    """Softmax → its scores, of a prepared model: what may have a floor, if it is masked."""
    graph = Graph(model)
    # of rows in which all is masked by -inf it makes NaN, and a floor would hide those
    if any(n.op_type == "IsNaN" for n in graph.nodes):
        return {}
    return {n.name: n.input[0] for n in graph.nodes if _is_last_softmax(graph, n)}


def _is_last_softmax(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether it is a Softmax in float32, over the last axis, of several rows, to weigh values."""
    if node.op_type != "Softmax" or graph.elem_type(node.input[0]) != TensorProto.FLOAT:
        return False
    if not _only_weighs(graph, node.output[0]):
        return False
    shape = graph.shape(node.input[0])
    axis = attributes(node).get("axis", -1)
    return shape is not None and len(shape) > 1 and axis in (-1, len(shape) - 1)


def _only_weighs(graph: Graph, name: str) -> bool:
    """Whether a tensor is read by products alone: others may tell 0 from what is next to it."""
    waiting = [name]
    for tensor in waiting:
        for use in graph.uses(tensor):
            node = graph.nodes[use.node]
            if use.slot < 0 or node.op_type not in _PASSES | {"MatMul"}:
                return False
            if node.op_type in _PASSES:
                waiting.append(node.output[0])
    return True
