"""Gates in one shape: swish as Sigmoid and Mul, hard-swish as HardSigmoid and Mul."""

import math
from typing import NamedTuple

import numpy as np
import onnx

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import other_input, with_scalar

__all__ = ["hard_activations", "split_swishes"]


def split_swishes(ed: Editor) -> None:
    """Swish and HardSwish become a gate and Mul.

    ``y = x * sigmoid(alpha * x)`` and ``y = x * max(0, min(1, x / 6 + 1 / 2))``. onnxruntime
    (1.32) has a kernel for neither operator, but fuses these.
    """
    for node in ed.nodes("Swish", "HardSwish"):
        x, y = node.input(0), node.output
        gate, name = ed.fresh(f"{y}_gate"), ed.fresh(f"{node.name}_gate")
        ed.set_type_like(gate, y)
        alpha = float(node.attr("alpha", 1.0))
        new: list[onnx.NodeProto] = []
        if node.op == "HardSwish":
            new.append(ed.new_node("HardSigmoid", [x], [gate], name, alpha=1 / 6, beta=0.5))
        else:
            if alpha != 1:
                new.append(_scaled(ed, node, alpha))
            new.append(ed.new_node("Sigmoid", [new[0].output[0] if new else x], [gate], name))
        ed.replace([node], [*new, ed.new_node("Mul", [x, gate], [y], node.name)])


def _scaled(ed: Editor, node: Node, alpha: float) -> onnx.NodeProto:
    """The node's input times alpha."""
    made, kind = ed.fresh(f"{node.output}_scaled"), ed.dtype(node.output)
    ed.set_type_like(made, node.output)
    factor = ed.add_constant(f"{node.output}_alpha", np.asarray(alpha, kind or np.float32))
    name = ed.fresh(f"{node.name}_scaled")
    return ed.new_node("Mul", [node.input(0), factor], [made], name)


class _Gate(NamedTuple):
    """``HardSigmoid(x; alpha, beta)``, times z where there is one.

    Attributes:
        nodes: the nodes that it replaces, the last of them makes the result.
        x: the tensor that the gate is made of.
        alpha: slope.
        beta: value at 0.
        z: the tensor that the gate multiplies; empty if none.
    """

    nodes: list[Node]
    x: str
    alpha: float
    beta: float
    z: str = ""


def hard_activations(ed: Editor) -> None:
    """Add, Clip and a factor become HardSigmoid; with the Mul by x that is hard-swish.

    ``clip(x + c, 0, h) / h = clip(x / h + c / h, 0, 1) = HardSigmoid(x; 1 / h, c / h)``, and
    ``z clip(x + c, 0, h) / h = z HardSigmoid(x; 1 / h, c / h)`` for any z; hard-sigmoid and
    hard-swish have c = 3, h = 6. ``clip(a x + b, 0, 1) = HardSigmoid(x; a, b)``.
    """
    for clip in ed.nodes("Clip"):
        gate = _gate(ed, clip)
        if gate is None or ed.elem_type(gate.x) != onnx.TensorProto.FLOAT:
            continue
        last = gate.nodes[-1]
        y = ed.fresh(f"{last.output}_gate") if gate.z else last.output
        ed.set_type_like(y, clip.output)
        name = ed.fresh(f"{clip.name}_gate")
        attrs = {"alpha": gate.alpha, "beta": gate.beta}
        new = [ed.new_node("HardSigmoid", [gate.x], [y], name, **attrs)]
        if gate.z:
            new.append(ed.new_node("Mul", [gate.z, y], [last.output], last.name))
        ed.replace(gate.nodes, new)


def _gate(ed: Editor, clip: Node) -> _Gate | None:
    """What a Clip and the nodes around it are, if they are a gate."""
    added = with_scalar(ed, ed.maker(clip.input(0), "Add"))
    low, high = ed.scalar(clip.input(1)), ed.scalar(clip.input(2))
    if added is None or low != 0 or high is None or high <= 0:
        return None
    x, offset = added
    if high == 1:
        maker = ed.maker(x, "Mul", "Div")
        scaled = with_scalar(ed, maker)
        if maker is None or scaled is None or scaled[1] == 0:
            return None
        alpha = 1 / scaled[1] if maker.op == "Div" else scaled[1]
        return _Gate([clip], scaled[0], alpha, offset)
    first = ed.only_user(clip.output, "Mul", "Div")
    if first is None:
        return None
    if _divides(ed, first, clip.output, high):
        return _Gate([clip, first], x, 1 / high, offset / high)
    second = ed.only_user(first.output, "Mul", "Div") if first.op == "Mul" else None
    if second is None or not _divides(ed, second, first.output, high):
        return None
    z = other_input(first, clip.output)
    return _Gate([clip, first, second], x, 1 / high, offset / high, z)


def _divides(ed: Editor, node: Node, x: str, by: float) -> bool:
    found = with_scalar(ed, node)
    if found is None or found[0] != x or found[1] == 0:
        return False
    return math.isclose(found[1] if node.op == "Div" else 1 / found[1], by, rel_tol=1e-5)
