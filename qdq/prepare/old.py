"""What the converter to newer operator sets gets wrong, set right before and after it.

Each function changes the ModelProto that it is given, subgraphs included.
"""

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper

from qdq.graph import subgraphs

__all__ = ["after_raising", "before_raising"]


def before_raising(model: onnx.ModelProto, have: int) -> None:
    """Spell out what the converter passes over.

    Pad of any mode could have the attribute ``value`` below opset 11, of which only a constant one
    makes use, and of which newer ones do not know. Hardmax below 13 works on a matrix: all axes
    from ``axis`` on are one.
    """
    for nodes in _node_lists(model.graph):
        for node in list(nodes):
            constant = _attr(node, "mode", b"constant") == b"constant"
            if node.op_type == "Pad" and have < 11 and not constant:
                _drop(node, "value")
            elif node.op_type == "Hardmax" and have < 13:
                _flatten_hardmax(nodes, node)


def after_raising(model: onnx.ModelProto, had: int) -> None:
    """Say how a Resize from below opset 11 counts, which had no attributes for it then.

    Position i of the output is at ``i / scale`` of the input ("asymmetric"), the nearest value is
    that before it ("floor").
    """
    if had >= 11:
        return
    for nodes in _node_lists(model.graph):
        for node in nodes:
            if node.op_type == "Resize":
                _drop(node, "coordinate_transformation_mode", "nearest_mode")
                mode = {"coordinate_transformation_mode": "asymmetric"}
                if _attr(node, "mode", b"nearest") == b"nearest":
                    mode["nearest_mode"] = "floor"
                node.attribute.extend(helper.make_attribute(k, v) for k, v in mode.items())


def _flatten_hardmax(nodes: Any, node: onnx.NodeProto) -> None:
    axis = _attr(node, "axis", 1)
    x, y = node.input[0], node.output[0]
    at = next(i for i, n in enumerate(nodes) if n is node)
    shape, flat, hard = (f"{y}_{name}" for name in ("shape", "flat", "hard"))
    made = [
        helper.make_node("Shape", [x], [shape]),
        helper.make_node("Flatten", [x], [flat], axis=axis),
        helper.make_node("Hardmax", [flat], [hard], name=node.name, axis=1),
        helper.make_node("Reshape", [hard, shape], [y]),
    ]
    rest = [*made, *nodes[at + 1 :]]
    del nodes[at:]
    nodes.extend(rest)


def _node_lists(graph: onnx.GraphProto) -> Iterator[Any]:
    """The nodes of a graph and of all graphs within."""
    yield graph.node
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _node_lists(inner)


def _attr(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _drop(node: onnx.NodeProto, *names: str) -> None:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)
