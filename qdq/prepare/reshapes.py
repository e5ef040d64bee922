"""Chains of reshapes shortened."""

import numpy as np

from qdq.prepare.cleanup import bypass, keeps_shape
from qdq.prepare.editing import Array, Editor, Node

__all__ = ["cancel_squeezes", "merge_reshapes", "whole_softmax"]


def whole_softmax(ed: Editor) -> None:
    """Softmax over the last axis needs no Flatten before and no Reshape behind it.

    Raising the opset from below 13 wraps Softmax so; over the last axis the rows are the same
    in both shapes.
    """
    for node in ed.nodes("Softmax", "LogSoftmax"):
        before, after = ed.maker(node.input(0), "Flatten"), ed.only_user(node.output, "Reshape")
        if before is None or after is None or node.attr("axis", -1) not in (1, -1):
            continue
        x = before.input(0)
        shape = ed.shape(x)
        if shape is None or before.attr("axis", 1) not in (len(shape) - 1, -1):
            continue
        source = ed.maker(after.input(1), "Shape")
        same = ed.shape(after.output) == shape and shape.count(None) <= 1
        if same or (source is not None and source.inputs == (x,) and not source.proto.attribute):
            new = ed.new_node(node.op, [x], [after.output], node.name, axis=-1)
            ed.replace([node, after], [new])


def merge_reshapes(ed: Editor) -> None:
    """Of two Reshape in a row only the second is needed, and none if that brings the shape back.

    The elements keep their order in both. A 0 in the second shape stands for a dimension of
    the first one's result; it is replaced by that dimension, which must be known.
    """
    for node in ed.nodes("Reshape"):
        if node not in ed:
            continue
        before = ed.maker(node.input(0), "Reshape")
        target = ed.array(node.input(1))
        if before is None or target is None:
            continue
        plain = _without_zeros(node, target, ed.shape(node.input(0)))
        if plain is None:
            continue
        if plain is not target:
            ed.set_input(node, 1, ed.add_constant(f"{node.name}_shape", plain))
        ed.set_input(node, 0, before.input(0))
        ed.prune([before])
        if keeps_shape(ed, node):
            bypass(ed, node, node.input(0))


def cancel_squeezes(ed: Editor) -> None:
    """Axes that a Squeeze drops and an Unsqueeze right behind it brings back, or the other way."""
    opposite = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}
    for node in ed.nodes(*opposite):
        before = ed.maker(node.input(0), opposite[node.op]) if node in ed else None
        if before is None:
            continue
        x = before.input(0)
        # the axes of both are those of the wider tensor
        rank = ed.rank(x if before.op == "Squeeze" else before.output)
        dropped, added = (ed.array(n.input(1)) for n in (before, node))
        if rank is None or dropped is None or added is None:
            continue
        if sorted(dropped % rank) == sorted(added % rank):
            bypass(ed, node, x)
            ed.prune([before])


def _without_zeros(node: Node, target: Array, shape: tuple[int | None, ...] | None) -> Array | None:
    """The target shape with its zeros made numbers; None if that cannot be done."""
    if (target != 0).all():
        return target
    if node.attr("allowzero", 0) or shape is None:
        return None
    dims = [shape[i] if d == 0 and i < len(shape) else int(d) for i, d in enumerate(target)]
    return None if None in dims else np.array(dims, np.int64)
