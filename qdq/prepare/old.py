"""What the converter to newer operator sets gets wrong, set right before and after it.

Each function changes the ModelProto that it is given, subgraphs included.
"""

from itertools import chain, count
from typing import Any

import onnx
from onnx import helper

from qdq.graph import attributes, drop_attributes
from qdq.nested import all_graphs

__all__ = ["after_raising", "before_raising"]


def before_raising(model: onnx.ModelProto, have: int) -> None:
    """Spell out what the converter passes over.

    Pad of any mode could have the attribute ``value`` below opset 11, of which only a constant one
    makes use, and of which newer ones do not know. Hardmax below 13 works on a matrix: all axes
    from ``axis`` on are one. BatchNormalization below 9 could have numbers for each value behind
    the first axis (``spatial`` 0), and not for each channel.
    """
    if have >= 13:
        return
    lists = [g.node for g in all_graphs(model.graph)]
    taken = {name for nodes in lists for n in nodes for name in (*n.input, *n.output)}
    for nodes in lists:
        for node in list(nodes):
            if node.op_type == "Hardmax":
                _flatten_hardmax(nodes, node, taken)
            elif node.op_type == "BatchNormalization" and attributes(node).get("spatial", 1) == 0:
                _spell_out_batchnorm(nodes, node, taken)
            elif node.op_type == "Pad" and have < 11 and not _pads_constant(node):
                drop_attributes(node, "value")


def after_raising(model: onnx.ModelProto, had: int) -> None:
    """Say what operators meant that the converter takes for newer ones.

    Resize from below opset 11, which had no attributes for how it counts, and Scan of opset 8,
    which had a batch.
    """
    if had >= 11:
        return
    lists = [g.node for g in all_graphs(model.graph)]
    constants = {t.name: t for t in model.graph.initializer}
    taken = {name for nodes in lists for n in nodes for name in (*n.input, *n.output)} | {
        *constants
    }
    for nodes in lists:
        constants |= {
            n.output[0]: attributes(n).get("value", None) for n in nodes if n.op_type == "Constant"
        }
    for nodes in lists:
        for node in list(nodes):
            if node.op_type == "Resize":
                _count_from_corner(node, constants)
            elif node.op_type == "Scan" and had == 8:
                _put(nodes, node, _without_batch(node, taken))


def _count_from_corner(node: onnx.NodeProto, constants: dict[str, Any]) -> None:
    """Position i of the output is at ``i / scale`` of the input ("asymmetric").

    The nearest value is that before it ("floor"); onnxruntime takes the one behind it ("ceil")
    along axes that shrink, which one node cannot do beside axes that grow.
    """
    drop_attributes(node, "coordinate_transformation_mode", "nearest_mode")
    mode = {"coordinate_transformation_mode": "asymmetric"}
    if attributes(node).get("mode", b"nearest") == b"nearest":
        shrinks = _shrinks(constants.get(node.input[2]))
        mode["nearest_mode"] = "ceil" if shrinks else "floor"
    node.attribute.extend(helper.make_attribute(k, v) for k, v in mode.items())


def _without_batch(node: onnx.NodeProto, taken: set[str]) -> list[onnx.NodeProto]:
    """A Scan whose first axis was a batch, of one: without that axis. More cannot be written so."""
    axes = _fresh(f"{node.output[0]}_batch", taken)
    value = helper.make_tensor(axes, onnx.TensorProto.INT64, [1], [0])
    before = [helper.make_node("Constant", [], [axes], value=value)]
    scan = onnx.NodeProto()
    scan.CopyFrom(node)
    for k, name in enumerate(node.input):
        scan.input[k] = _fresh(f"{name}_single", taken)
        before.append(helper.make_node("Squeeze", [name, axes], [scan.input[k]]))
    behind = []
    for k, name in enumerate(node.output):
        if name:
            scan.output[k] = _fresh(f"{name}_single", taken)
            behind.append(helper.make_node("Unsqueeze", [scan.output[k], axes], [name]))
    return [*before, scan, *behind]


def _pads_constant(node: onnx.NodeProto) -> bool:
    return attributes(node).get("mode", b"constant") == b"constant"


def _shrinks(scales: onnx.TensorProto | None) -> bool:
    """Whether no axis grows, and some shrink."""
    values = [] if scales is None else onnx.numpy_helper.to_array(scales).ravel().tolist()
    return bool(values) and max(values) <= 1 and min(values) < 1


def _flatten_hardmax(nodes: Any, node: onnx.NodeProto, taken: set[str]) -> None:
    axis = attributes(node).get("axis", 1)
    x, y = node.input[0], node.output[0]
    shape, flat, hard = (_fresh(f"{y}_{name}", taken) for name in ("shape", "flat", "hard"))
    made = [
        helper.make_node("Shape", [x], [shape]),
        helper.make_node("Flatten", [x], [flat], axis=axis),
        helper.make_node("Hardmax", [flat], [hard], name=node.name, axis=1),
        helper.make_node("Reshape", [hard, shape], [y]),
    ]
    _put(nodes, node, made)


def _spell_out_batchnorm(nodes: Any, node: onnx.NodeProto, taken: set[str]) -> None:
    """As ``x scale / sqrt(var + epsilon) + (bias - mean scale / sqrt(var + epsilon))``."""
    x, scale, bias, mean, var = node.input
    y = node.output[0]
    parts = ("epsilon", "above", "deviation", "factor", "moved", "shift", "scaled")
    epsilon, above, deviation, factor, moved, shift, scaled = (
        _fresh(f"{y}_{part}", taken) for part in parts
    )
    value = helper.make_tensor(epsilon, onnx.TensorProto.FLOAT, [], [_epsilon(node)])
    made = [
        helper.make_node("Constant", [], [epsilon], value=value),
        helper.make_node("Add", [var, epsilon], [above]),
        helper.make_node("Sqrt", [above], [deviation]),
        helper.make_node("Div", [scale, deviation], [factor]),
        helper.make_node("Mul", [mean, factor], [moved]),
        helper.make_node("Sub", [bias, moved], [shift]),
        helper.make_node("Mul", [x, factor], [scaled]),
        helper.make_node("Add", [scaled, shift], [y], name=node.name),
    ]
    _put(nodes, node, made)


def _epsilon(node: onnx.NodeProto) -> float:
    values: dict[str, Any] = attributes(node)
    return float(values.get("epsilon", 1e-5))


def _put(nodes: Any, node: onnx.NodeProto, made: list[onnx.NodeProto]) -> None:
    """Put nodes in the place of one."""
    at = next(i for i, n in enumerate(nodes) if n is node)
    rest = [*made, *nodes[at + 1 :]]
    del nodes[at:]
    nodes.extend(rest)


def _fresh(name: str, taken: set[str]) -> str:
    """A name that is free, and is taken then."""
    found = next(n for n in chain([name], (f"{name}_{k}" for k in count(1))) if n not in taken)
    taken.add(found)
    return found
