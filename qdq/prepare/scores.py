"""The scalar factor of attention, moved to the weights that make the queries or keys."""

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import with_scalar

__all__ = ["scale_queries"]

_MOVES = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")


def scale_queries(ed: Editor) -> None:
    """A scalar factor goes back to right behind the linear node, whose weights then take it in.

    It passes what only moves values, and once a product of two activations: ``c (q k)`` is
    ``(c q) k``. onnxruntime takes a factor into a float product for nothing, but not into an
    integer one: behind that it is a node of its own, over all pairs of tokens.
    """
    for node in ed.nodes("Mul", "Div"):
        found = with_scalar(ed, node)
        if found is None or node.output in ed.outputs or ed.captured(node.output):
            continue
        source, factor = found
        linear = _linear_before(ed, source)
        dtype = ed.dtype(source)
        if linear is None or dtype is None or dtype.kind != "f" or not factor:
            continue
        ed.redirect(node.output, source)
        ed.prune([node])
        _multiply(ed, linear, factor if node.op == "Mul" else 1 / np.float64(factor), node.name)


def _linear_before(ed: Editor, name: str) -> Node | None:
    """The node whose weights can take in a factor of ``name``; None where it is right before it."""
    start = name
    product = ed.maker(name, "MatMul")
    if product is not None and ed.only_user(name) and product.input(1) not in ed.constants:
        name = product.input(0)
    while ed.only_user(name) and (before := _passed(ed, name)) is not None:
        name = before
    if name == start or not ed.only_user(name):
        return None
    return _linear(ed, name)


def _passed(ed: Editor, name: str) -> str | None:
    """What a tensor is made of by a move, or by another factor."""
    move = ed.maker(name, *_MOVES)
    if move is not None:
        return move.input(0)
    scaled = with_scalar(ed, ed.maker(name, "Mul", "Div"))
    return None if scaled is None else scaled[0]


def _linear(ed: Editor, name: str) -> Node | None:
    """A product by constants, or the Add of its bias."""
    maker = ed.maker(name, "Add", "Gemm", "MatMul")
    if maker is None or maker.op != "Add":
        return maker if maker is not None and maker.input(1) in ed.constants else None
    inner = [i for i in maker.inputs if i not in ed.constants]
    if len(inner) != 1 or not ed.only_user(inner[0]):
        return None
    product = ed.maker(inner[0], "MatMul")
    return maker if product is not None and product.input(1) in ed.constants else None


def _multiply(ed: Editor, linear: Node, factor: float, name: str) -> None:
    """Put a Mul behind a node, in front of all that read it."""
    made = linear.output
    plain = ed.fresh(f"{made}_plain")
    ed.set_output(linear, made, plain)
    dtype = ed.dtype(plain)
    constant = ed.add_constant(f"{name}_factor", np.asarray(factor, dtype))
    (reader,) = ed.users(made)
    ed.add_before(reader, ed.new_node("Mul", [plain, constant], [made], ed.fresh(f"{name}_moved")))
