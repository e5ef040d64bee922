"""Hard-sigmoid and hard-swish in one shape: HardSigmoid, and HardSigmoid with Mul."""

import math
from typing import NamedTuple

import onnx

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import other_input, with_scalar

__all__ = ["hard_activations", "split_hard_swish"]


def split_hard_swish(ed: Editor) -> None:
    """HardSwish becomes HardSigmoid and Mul: ``y = x * max(0, min(1, x / 6 + 1 / 2))``."""
    for node in ed.nodes("HardSwish"):
        x, y = node.input(0), node.output
        gate = ed.fresh(f"{y}_gate")
        ed.set_type_like(gate, y)
        name = ed.fresh(f"{node.name}_gate")
        hard = ed.new_node("HardSigmoid", [x], [gate], name, alpha=1 / 6, beta=0.5)
        ed.replace([node], [hard, ed.new_node("Mul", [x, gate], [y], node.name)])


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
