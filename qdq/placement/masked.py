"""What a Softmax of masked scores is measured by, beside a model.

A mask adds -10000, say, to the scores of what must not be looked at. The weights of those are 0,
but on the way there the runtime's exp passes through numbers that are not normal any more, which
many processors take a hundred times as long for (``qdq.placement.scores``).
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from qdq.graph import Graph, attributes
from qdq.placement.scores import DENORMAL
from qdq.placement.tape import OPSET, Tape

__all__ = ["Watch", "watch"]

_PASSES = frozenset({"Dropout", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Watch:
    """Nodes that measure the scores.

    Attributes:
        names: each Softmax' name, three times in a row.
        output: has for each of them the lowest peak (the largest score of a row), the highest one,
            and the share of scores that are more than ``DENORMAL`` below theirs.
        added: the nodes and constants, beside those of the model.
    """

    names: tuple[str, ...]
    output: str
    added: onnx.GraphProto


def watch(model: onnx.ModelProto) -> Watch | None:
    """The nodes for a prepared model, which is not changed; None if it has no such Softmax."""
    graph = Graph(model)
    nodes = [n for n in graph.nodes if _is_last_softmax(graph, n)]
    # of rows in which all is masked by -inf it makes NaN, and a floor would hide those
    guarded = any(n.op_type == "IsNaN" for n in graph.nodes)
    if not nodes or guarded or graph.opset < OPSET:
        return None
    tape = Tape(graph, (), label="peak")
    found = (n for node in nodes for n in _measured(tape, node.input[0]))
    output = tape.node("Concat", *found, axis=0)
    names = tuple(node.name for node in nodes for _ in range(3))
    return Watch(names, output, tape.added)


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


def _measured(tape: Tape, scores: str) -> tuple[str, str, str]:
    peaks = tape.node("ReduceMax", scores, tape.whole(-1), keepdims=1)
    all_peaks = tape.flat(peaks)
    # a tensor may be empty, and nothing has no maximum
    low = tape.node("Concat", all_peaks, tape.constant(np.full(1, np.inf, np.float32)), axis=0)
    high = tape.node("Concat", all_peaks, tape.constant(np.full(1, -np.inf, np.float32)), axis=0)
    deep = tape.node("Less", scores, tape.node("Sub", peaks, tape.real(DENORMAL)))
    count = tape.node("ReduceSum", tape.node("Cast", deep, to=1), keepdims=0)
    size = tape.node("Cast", tape.node("Size", scores), to=1)
    return (
        tape.node("ReduceMin", low, keepdims=1),
        tape.node("ReduceMax", high, keepdims=1),
        tape.flat(tape.node("Div", count, tape.node("Max", size, tape.real(1)))),
    )
