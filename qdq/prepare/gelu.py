"""GELU spelled out in small nodes, put back into one operator."""

import math

import onnx

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import other_input, with_scalar

__all__ = ["gelus"]

_LOOSE = 1e-3  # exporters round constants such as sqrt(2) to float16 or to a few digits


def _is(ed: Editor, name: str, wanted: float, like: str) -> bool:
    """Whether a tensor is a one-element constant of about this value, that adds no axis to like."""
    value = ed.scalar(name)
    if value is None or len(ed.constants[name].dims) > (ed.rank(like) or 0):
        return False
    return math.isclose(value, wanted, rel_tol=_LOOSE)


def gelus(ed: Editor) -> None:
    """GELU by Erf or by Tanh becomes one Gelu.

    ``gelu(x) = x / 2 (1 + erf(x / sqrt(2)))``, and approximately
    ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3)))`` (Hendrycks and Gimpel,
    arXiv:1606.08415), with the product in any order. The operator came with opset 20; float16
    and float64 are left, for which runtimes lack it.
    """
    if ed.opset < 20:
        return
    for node in ed.nodes("Erf", "Tanh"):
        x = _erf_argument(ed, node) if node.op == "Erf" else _tanh_argument(ed, node)
        found = None if x is None else _gelu_tail(ed, node, x)
        if x is None or found is None or ed.elem_type(x) != onnx.TensorProto.FLOAT:
            continue
        name = ed.fresh(f"{found[-1].name}_gelu")
        approximate = "none" if node.op == "Erf" else "tanh"
        new = ed.new_node("Gelu", [x], [found[-1].output], name, approximate=approximate)
        ed.replace([node, *found], [new])


def _erf_argument(ed: Editor, erf: Node) -> str | None:
    """The x of erf(x / sqrt(2))."""
    node = ed.maker(erf.input(0), "Div", "Mul")
    found = with_scalar(ed, node)
    if node is None or found is None or found[1] == 0:
        return None
    divisor = found[1] if node.op == "Div" else 1 / found[1]
    return found[0] if math.isclose(divisor, math.sqrt(2), rel_tol=_LOOSE) else None


def _tanh_argument(ed: Editor, tanh: Node) -> str | None:
    """The x of tanh(sqrt(2 / pi) (x + 0.044715 x**3))."""
    found = with_scalar(ed, ed.maker(tanh.input(0), "Mul"))
    if found is None or not math.isclose(found[1], math.sqrt(2 / math.pi), rel_tol=_LOOSE):
        return None
    add = ed.maker(found[0], "Add")
    for x, cubic in () if add is None else (add.inputs, add.inputs[::-1]):
        scaled = with_scalar(ed, ed.maker(cubic, "Mul"))
        if scaled is not None and math.isclose(scaled[1], 0.044715, rel_tol=_LOOSE):
            cube = ed.maker(scaled[0], "Pow", "Mul")
            if cube is not None and _is_cube(ed, cube, x):
                return x
    return None


def _is_cube(ed: Editor, node: Node, x: str) -> bool:
    if node.op == "Pow":
        return node.input(0) == x and ed.scalar(node.input(1)) == 3
    if x not in node.inputs:
        return False
    square = ed.maker(other_input(node, x), "Mul", "Pow")
    if square is None or square.input(0) != x:
        return False
    return square.input(1) == x or (square.op == "Pow" and ed.scalar(square.input(1)) == 2)


def _gelu_tail(ed: Editor, node: Node, x: str) -> list[Node] | None:
    """The nodes that make ``x / 2 (1 + e)`` of e, in any order of the product."""
    add = ed.only_user(node.output, "Add")
    if add is None or not _is(ed, other_input(add, node.output), 1, node.output):
        return None
    first = ed.only_user(add.output, "Mul")
    if first is None:
        return None
    factor = other_input(first, add.output)
    if _halves(ed, ed.maker(factor, "Mul", "Div"), x):
        return [add, first]
    second = ed.only_user(first.output, "Mul", "Div")
    if second is None:
        return None
    if factor == x and _halves(ed, second, first.output):
        return [add, first, second]
    halved = _is(ed, factor, 0.5, add.output)
    if halved and second.op == "Mul" and other_input(second, first.output) == x:
        return [add, first, second]
    return None


def _halves(ed: Editor, node: Node | None, x: str) -> bool:
    found = with_scalar(ed, node)
    if node is None or found is None or found[0] != x:
        return False
    return found[1] == (2 if node.op == "Div" else 0.5)
