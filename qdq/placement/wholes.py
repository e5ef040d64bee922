"""Functions of several nodes that are on integers as a whole or not at all; what outputs show."""

from collections.abc import Iterable

import onnx
from onnx import TensorProto

from qdq.graph import Graph, attributes
from qdq.placement.harm import Judged

__all__ = ["PASSED", "gate_of", "inside_whole", "judged", "logits_of", "shown_by"]

# on the way back from an output to the Softmax or Sigmoid that made its values
PASSED = frozenset({"Cast", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Split",
                    "Squeeze", "Transpose", "Unsqueeze"})  # fmt: skip
_SAME = frozenset({"Cast", "DepthToSpace", "Flatten", "Identity", "Reshape", "Squeeze",
                   "Transpose", "Unsqueeze"})  # fmt: skip
# which keep what is along the last axis, if that keeps its size
_ALONG = frozenset({"Add", "Cast", "Div", "Identity", "LayerNormalization", "Mul",
                    "RMSNormalization", "Reshape", "Squeeze", "Sub", "Sum", "Transpose",
                    "Unsqueeze"})  # fmt: skip
_PRODUCTS = frozenset({"Gemm", "MatMul"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
_GATES = frozenset({"HardSigmoid", "Sigmoid"})
_SATURATING = _GATES | {"LogSoftmax", "Softmax"}


def gate_of(graph: Graph, index: int, op_type: str) -> int | None:
    """Index of f in ``x * f(x)``, if the node is that Mul and f is of ``op_type``; else None."""
    node = graph.nodes[index]
    if node.op_type != "Mul":
        return None
    for gate, x in (node.input, node.input[::-1]):
        maker = graph.producer.get(gate)
        if maker is not None and graph.nodes[maker].op_type == op_type:
            return maker if graph.nodes[maker].input[0] == x else None
    return None


def inside_whole(graph: Graph, index: int) -> str | None:
    """Why a node stays float that is part of a function without an integer kernel, or None.

    A Q inside would cost accuracy and gain no kernel.
    """
    if _inside_hard_swish(graph, index):
        return "it is part of a hard-swish, which is never split"
    if _inside_softmax(graph, index):
        return "it is part of a softmax, which is never split"
    return None


def _inside_hard_swish(graph: Graph, index: int) -> bool:
    here = [index]
    if graph.nodes[index].op_type == "HardSigmoid":
        here = [use.node for use in graph.uses(graph.nodes[index].output[0])]
    return any(gate_of(graph, i, "HardSigmoid") is not None for i in here)


def _inside_softmax(graph: Graph, index: int) -> bool:
    """Whether a node is a part of ``exp(x - max x) / sum exp(x - max x)``, before or behind exp."""
    node = graph.nodes[index]
    if node.op_type == "ReduceMax":
        return any(_shifts(graph, use.node) for use in graph.uses(node.output[0]))
    if node.op_type == "Exp":
        return any(_softmax_input(graph, use.node) for use in graph.uses(node.output[0]))
    if node.op_type == "Div":
        return _softmax_input(graph, index) is not None
    return node.op_type == "Sub" and _shifts(graph, index)


def _softmax_input(graph: Graph, index: int) -> str | None:
    """The tensor of which a Div makes a softmax, up to a shift; None if it does not."""
    node = graph.nodes[index]
    if node.op_type != "Div":
        return None
    top, bottom = map(graph.maker, node.input)
    if top is None or bottom is None or top.op_type != "Exp":
        return None
    if bottom.op_type != "ReduceSum" or bottom.input[0] != top.output[0]:
        return None
    shifted = str(top.input[0])
    shift = graph.producer.get(shifted)
    if shift is not None and _shifts(graph, shift):
        return str(graph.nodes[shift].input[0])
    return shifted


def _shifts(graph: Graph, index: int) -> bool:
    """Whether a node is the ``x - max x`` in front of an exp."""
    node = graph.nodes[index]
    if node.op_type != "Sub":
        return False
    highest, use = graph.maker(node.input[1]), graph.only_use(node.output[0])
    return (
        highest is not None
        and highest.op_type == "ReduceMax"
        and highest.input[0] == node.input[0]
        and use is not None
        and graph.nodes[use.node].op_type == "Exp"
    )


def logits_of(graph: Graph) -> tuple[str, ...]:
    """Tensors whose Softmax or Sigmoid is (a part of) a model output."""
    found: dict[str, None] = {}
    waiting, seen = sorted(graph.outputs), set(graph.outputs)
    while waiting:
        index = graph.producer.get(waiting.pop())
        if index is None:
            continue
        node = graph.nodes[index]
        made_of = node.input[0] if node.op_type in _SATURATING else _softmax_input(graph, index)
        if made_of is not None and made_of not in graph.constants:
            found[made_of] = None
        elif node.op_type in PASSED:
            behind = [n for n in node.input if n and n not in graph.constants and n not in seen]
            seen.update(behind)
            waiting.extend(behind)
    return tuple(n for n in found if graph.elem_type(n) in (0, TensorProto.FLOAT))


def judged(graph: Graph) -> Judged:
    """What a model is judged by: its outputs of floating-point numbers, and further logits."""
    values = graph.model.graph.output
    outputs = tuple(v.name for v in values if v.type.tensor_type.elem_type in _FLOATS)
    lone = {n: logit for n in outputs if (logit := _lone_logit(graph, n)) is not None}
    logits = tuple(n for n in logits_of(graph) if n not in (*outputs, *lone.values()))
    several = {n for n in (*outputs, *logits) if len(graph.shape(n) or ()) > 2}
    return Judged(
        outputs=outputs,
        weighed=tuple(n for n in outputs if n not in lone),
        logits=logits,
        lone=tuple(dict.fromkeys(lone.values())),
        ranked=_ranked(graph, (*outputs, *logits)),
        varied=frozenset(several & _of_positions(graph)),
    )


def _of_positions(graph: Graph) -> set[str]:
    """Tensors whose last axis is what a product by a weight makes for each position."""
    found: set[str] = set()

    def is_along(node: onnx.NodeProto) -> bool:
        width = _width(graph, node.output[0])
        same = (n in found and width is not None and _width(graph, n) == width for n in node.input)
        return node.op_type in _ALONG and any(same)

    for node in graph.nodes:
        product = node.op_type in _PRODUCTS and node.input[1] in graph.constants
        if product or is_along(node):
            found.add(node.output[0])
    return found


def _width(graph: Graph, name: str) -> int | None:
    """The size of a tensor's last axis; None if that is not known."""
    return (graph.shape(name) or (None,))[-1]


def shown_by(graph: Graph, names: Iterable[str]) -> frozenset[str]:
    """Tensors whose values those of these names have one by one, in whatever order."""
    found = set(names)
    for node in reversed(graph.nodes):
        if node.op_type in _SAME and node.output[0] in found:
            found.add(node.input[0])
    return frozenset(found)


def _ranked(graph: Graph, names: tuple[str, ...]) -> dict[str, int]:
    """Tensors of one entry for each that a TopK chose → the axis of the entries.

    The last TopK on the way has put them in order. Of several with an order of their own, those of
    the first are told.
    """
    chosen: dict[int, int] = {}  # node → how many
    behind: dict[str, frozenset[int]] = {}
    for index, node in enumerate(graph.nodes):
        last = frozenset().union(*(behind.get(name, frozenset()) for name in node.input))
        if node.op_type == "TopK":
            shape = graph.shape(node.output[0]) or ()
            axis = int(attributes(node).get("axis", -1))  # type: ignore[call-overload]
            chosen[index] = (shape[axis] if shape else 0) or 0
            last = frozenset([index])
        if last:
            behind.update((name, last) for name in node.output if name)
    found: dict[int, dict[str, int]] = {}
    for name in names:
        for index in behind.get(name, ()) if len(behind.get(name, ())) == 1 else ():
            axes = [k for k, d in enumerate(graph.shape(name) or ()) if d == chosen[index] > 1]
            if len(axes) == 1:
                found.setdefault(index, {})[name] = axes[0]
    return found[min(found)] if found else {}


def _lone_logit(graph: Graph, output: str) -> str | None:
    """The logit of an output that is one probability for each entry of the batch, or None."""
    name = output
    while _is_lone(graph, name):
        node = graph.maker(name)
        if node is None or not node.input:
            return None
        name = node.input[0]
        if node.op_type in _GATES:
            return name if name not in graph.constants else None
        if node.op_type not in PASSED:
            return None
    return None


def _is_lone(graph: Graph, name: str) -> bool:
    """Whether a tensor has one value for each index of its first axis."""
    shape = graph.shape(name)
    return shape is not None and all(d == 1 for d in shape[1:])
