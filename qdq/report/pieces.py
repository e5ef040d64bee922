"""Nodes of a QDQ model that together are one node of the float model."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace

import onnx

from qdq.graph import Graph, attributes
from qdq.report.matched import Constant
from qdq.spec import QuantParams
from qdq.subpixel import Subpixel

__all__ = ["MOVED", "lookup", "movements", "relaid", "steps"]

MOVED = {"Conv": "ConvTranspose", "Transpose": "DepthToSpace"}
"""Operators that are written as movements, by the first node of these."""

_CODING = frozenset({"DequantizeLinear", "QuantizeLinear"})
_MOST = 32  # nodes that a float node is written as
_MOVEMENTS = _CODING | {"Mul", "Reshape", "Shape", "Slice", "Transpose"}


def steps(graph: Graph, index: int, named: Container[str], coded: Container[str]) -> list[int]:
    """The nodes before one that are one float node with it, in graph order.

    They are what makes its inputs that have no namesake in the float model.

    Args:
        graph: the quantized model.
        index: of the last of the nodes.
        named: tensors that have one.
        coded: quantized constants, which float nodes do not read.

    Returns:
        An empty list if there are none, if an input is not known even so, or a node is no float
        one.
    """
    found: set[int] = set()
    pending = [index]
    while pending:
        for name in graph.nodes[pending.pop()].input:
            if not name or name in named or name in graph.constants:
                continue
            maker = graph.producer.get(name)
            if name in coded or maker is None or graph.nodes[maker].op_type in _CODING:
                return []
            if maker not in found:
                found.add(maker)
                pending.append(maker)
        if len(found) > _MOST:
            return []
    return sorted(found)


def movements(graph: Graph, node: onnx.NodeProto, named: Container[str]) -> tuple[list[int], str]:
    """The movements behind a node up to the tensor that has a name, and that; else two empty."""
    pending, end = [node.output[0]], ""
    found: set[int] = set()
    while pending:
        name = pending.pop()
        if name in named:
            end = name
            continue
        uses = graph.uses(name)
        if not uses or any(graph.nodes[u.node].op_type not in _MOVEMENTS for u in uses):
            return [], ""
        found.update(u.node for u in uses)
        pending += [graph.nodes[u.node].output[0] for u in uses]
    return sorted(found), end


def lookup(graph: Graph, node: onnx.NodeProto, named: Container[str]) -> list[int]:
    """The nodes behind a Gather that picks codes, which are one node with it.

    They pick a scale for each row, dequantize, and multiply. An empty list if it is by itself.
    """
    if node.op_type != "Gather":
        return []
    found: list[int] = []
    name = node.output[0]
    for op_type in ("DequantizeLinear", "Mul"):
        use = graph.only_use(name)
        if name in named or use is None or graph.nodes[use.node].op_type != op_type:
            return []
        found.append(use.node)
        name = graph.nodes[use.node].output[0]
    scale = graph.producer.get(graph.nodes[found[-1]].input[1])
    if scale is None or graph.nodes[scale].op_type != "Gather" or name not in named:
        return []
    return sorted([*found, scale]) if graph.nodes[scale].input[1] == node.input[1] else []


def relaid(
    node: onnx.NodeProto,
    own: onnx.NodeProto | None,
    float_graph: Graph,
    constants: Mapping[str, Constant],
) -> Iterator[Constant]:
    """Weight and bias of a ConvTranspose, which is a Conv now, in its own layout.

    Args:
        node: the Conv.
        own: what it is in the float model.
        float_graph: that model.
        constants: by what Conv reads.
    """
    if own is None or own.op_type != "ConvTranspose":
        return
    form = Subpixel.of(float_graph.shape(own.input[1]) or (), attributes(own))
    for name, source in zip(node.input[1:], own.input[1:], strict=True):
        entry = constants.get(name)
        if entry is not None and isinstance(form, Subpixel):
            axis = 1 if source == own.input[1] else 0
            params = _first_phase(entry.params, form.channels, axis)
            yield replace(entry, params=params, source=source, form=form)


def _first_phase(params: QuantParams, channels: int, axis: int) -> QuantParams:
    """Parameters of the channels of all phases → of the channels, along another axis."""
    if params.spec.axis is None:
        return params
    spec = replace(params.spec, axis=axis)
    return QuantParams(spec, params.scale[:channels], params.zero_point[:channels])
