"""Operator sets 1 to 6 written as opset 7, from where the converter can go on.

The converter itself fails below opset 6, and forgets the axis along which an operand is widened.
Each function changes the ModelProto that it is given, subgraphs included.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qdq.errors import ModelError
from qdq.graph import Graph, attributes, declare_opset, drop_attributes
from qdq.nested import all_graphs

__all__ = ["SEVEN", "raise_to_seven"]

SEVEN = 7

# Whose second operand could be narrower, widened from ``axis`` on; these give truth values, or not.
_TRUTHS = frozenset({"And", "Equal", "Greater", "Less", "Or", "Xor"})
_WIDENING = _TRUTHS | {"Add", "Div", "Mul", "Pow", "Sub"}

# What opset 7 has no more, and what it takes without a word: a kernel's wish to write in place; a
# dropout that is one only in training; an output that is made where something reads it.
_GONE = ("consumed_inputs", "is_test", "output_sequence")

# Values that opset 6 or 7 has another default for, or none.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Concat": {"axis": 1},
    "Selu": {"alpha": 1.6732, "gamma": 1.0507},
}


def raise_to_seven(model: onnx.ModelProto) -> None:
    """Write a model of opset 1 to 6 in opset 7.

    What an operand is widened by is known from the ranks of both; the result always has the
    shape of the first one.

    Raises:
        ModelError: an operand is widened, and the rank of it or of the other is not known.
    """
    graph = Graph(model)
    for own in all_graphs(model.graph):
        for node in own.node:
            _rename(node)
    ranks = _ranks(model)
    for own in all_graphs(model.graph):
        made: list[onnx.NodeProto] = []
        for node in own.node:
            made += [*_before(graph, node, ranks), node]
        del own.node[:]
        own.node.extend(made)
    declare_opset(model, SEVEN)


def _rename(node: onnx.NodeProto) -> None:
    """Give attributes the names, types and defaults that they have in opset 7."""
    values: dict[str, Any] = attributes(node)
    changed = {k: v for k, v in _DEFAULTS.get(node.op_type, {}).items() if k not in values}
    dropped = list(_GONE)
    match node.op_type:
        case "Cast" if isinstance(values.get("to"), bytes):
            changed["to"] = onnx.TensorProto.DataType.Value(values["to"].decode().upper())
        case "Gemm":
            dropped.append("broadcast")
        case "LpPool" | "GlobalLpPool" if isinstance(values.get("p"), float):
            changed["p"] = int(values["p"])
        case "Pad" if "paddings" in values:
            changed["pads"] = values["paddings"]
            dropped.append("paddings")
        case "Upsample" if "height_scale" in values:
            changed["scales"] = [1.0, 1.0, values["height_scale"], values["width_scale"]]
            dropped += ["height_scale", "width_scale"]
    drop_attributes(node, *dropped, *changed)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in changed.items())


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Ranks of tensors by name; what widens an operand stands as what its result looks like."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    declare_opset(plain, SEVEN)
    for own in all_graphs(plain.graph):
        for node in own.node:
            _stand_in(plain, node)
    inferred = onnx.shape_inference.infer_shapes(plain, data_prop=True)
    found = {t.name: len(t.dims) for t in inferred.graph.initializer}
    for own in all_graphs(inferred.graph):
        for v in (*own.value_info, *own.input, *own.output):
            if v.type.tensor_type.HasField("shape"):
                found[v.name] = len(v.type.tensor_type.shape.dim)
    return found


def _stand_in(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Put a node of opset 7 with a result of the same rank in the place of one that is not."""
    values: dict[str, Any] = attributes(node)
    if node.op_type in _TRUTHS:
        kind = onnx.TensorProto.BOOL
        node.CopyFrom(helper.make_node("Cast", node.input[:1], node.output[:1], to=kind))
    elif node.op_type in _WIDENING or node.op_type == "PRelu":
        node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    elif node.op_type == "Reshape" and "shape" in values:
        shape = np.array(values["shape"], np.int64)
        value = onnx.numpy_helper.from_array(shape, f"{node.output[0]}_shape")
        del node.attribute[:]
        node.input.append(value.name)
        model.graph.initializer.append(value)


def _before(graph: Graph, node: onnx.NodeProto, ranks: Mapping[str, int]) -> list[onnx.NodeProto]:
    """Nodes that make a node's inputs what opset 7 wants of them; the node reads these."""
    change = _CHANGES.get(node.op_type) or (_widen if node.op_type in _WIDENING else None)
    return change(graph, node, ranks) if change is not None else []


def _widen(graph: Graph, node: onnx.NodeProto, ranks: Mapping[str, int]) -> list[onnx.NodeProto]:
    """The second operand gets the axes that follow the ones that it has, from ``axis`` on."""
    values = attributes(node)
    drop_attributes(node, "axis", "broadcast")
    if not values.get("broadcast", 0) or "axis" not in values:
        return []  # equal shapes, or the last axes, as numpy has it
    own, other = _rank(node, 0, ranks), _rank(node, 1, ranks)
    axis: Any = values["axis"]
    return _with_axes(graph, node, list(range(other, own - axis % own)) if own else [])


def _slopes(graph: Graph, node: onnx.NodeProto, ranks: Mapping[str, int]) -> list[onnx.NodeProto]:
    """A PRelu's slopes, one for each channel, are along the second axis."""
    if _rank(node, 1, ranks) != 1:
        return []
    return _with_axes(graph, node, list(range(1, _rank(node, 0, ranks) - 1)))


def _with_axes(graph: Graph, node: onnx.NodeProto, axes: list[int]) -> list[onnx.NodeProto]:
    if not axes:
        return []
    wide = graph.fresh(f"{node.output[0]}_wide")
    made = helper.make_node("Unsqueeze", [node.input[1]], [wide], axes=axes)
    node.input[1] = wide
    return [made]


def _shape_input(
    graph: Graph, node: onnx.NodeProto, _ranks: Mapping[str, int]
) -> list[onnx.NodeProto]:
    """The shape that a Reshape makes is an input."""
    values = attributes(node)
    if "shape" not in values:
        return []
    del node.attribute[:]
    return _constant_input(graph, node, "shape", values["shape"])


def _repeats(graph: Graph, node: onnx.NodeProto, ranks: Mapping[str, int]) -> list[onnx.NodeProto]:
    """A Tile of one axis, so and so often, has a number for each axis: an input for another two."""
    if len(node.input) != 3:
        return []
    tiles, axis = (_integers(graph, node, slot) for slot in (1, 2))
    repeats = [1] * _rank(node, 0, ranks)
    repeats[axis[0]] = tiles[0]
    del node.input[1:]
    return _constant_input(graph, node, "repeats", repeats)


def _parts(graph: Graph, node: onnx.NodeProto, _ranks: Mapping[str, int]) -> list[onnx.NodeProto]:
    """The lengths of a Split are an attribute, and no input."""
    if len(node.input) == 2:
        lengths = _integers(graph, node, 1)
        del node.input[1:]
        node.attribute.append(helper.make_attribute("split", lengths))
    return []


_CHANGES: Mapping[str, Callable[..., list[onnx.NodeProto]]] = {
    "PRelu": _slopes,
    "Reshape": _shape_input,
    "Split": _parts,
    "Tile": _repeats,
}


def _constant_input(
    graph: Graph, node: onnx.NodeProto, what: str, values: Any
) -> list[onnx.NodeProto]:
    name = graph.fresh(f"{node.output[0]}_{what}")
    value = onnx.numpy_helper.from_array(np.array(values, np.int64), name)
    node.input.append(name)
    return [helper.make_node("Constant", [], [name], value=value)]


def _integers(graph: Graph, node: onnx.NodeProto, slot: int) -> list[int]:
    name = node.input[slot]
    if name in graph.constants:
        return [int(v) for v in graph.array(name).reshape(-1)]
    maker = graph.maker(name)
    value: Any = attributes(maker).get("value") if maker is not None else None
    if value is None:
        raise _not_known(node, f"the values of '{name}' are")
    return [int(v) for v in onnx.numpy_helper.to_array(value).reshape(-1)]


def _rank(node: onnx.NodeProto, slot: int, ranks: Mapping[str, int]) -> int:
    name = node.input[slot]
    if name not in ranks:
        raise _not_known(node, f"the rank of '{name}' is")
    return ranks[name]


def _not_known(node: onnx.NodeProto, what: str) -> ModelError:
    return ModelError(
        f"{node.op_type} that makes '{node.output[0]}' cannot be written in opset {SEVEN}, as "
        f"{what} not known; give the model's inputs shapes, or export it with a newer opset",
        node=node.name,
    )
