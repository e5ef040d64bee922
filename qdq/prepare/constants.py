"""Constants made plain: Constant nodes to initializers, and arithmetic on constants done now."""

import logging
import math

import numpy as np
import onnx
import onnx.reference

from qdq.graph import SIZES
from qdq.prepare.editing import Array, Editor, Node
from qdq.prepare.opset import infer_types
from qdq.prepare.sizes import settle_sizes

__all__ = ["constant_nodes", "fold_constants"]

_log = logging.getLogger(__name__)

_MAX_BYTES = 2**20  # results above this, and twice what they were made of, stay computed
_MAX_ROUNDS = 16

# Pure functions of their inputs, for which the reference evaluation is exact or within rounding.
# fmt: off
_FOLDABLE = frozenset({
    "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "ConstantOfShape",
    "Cos", "CumSum", "Div", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor",
    "Gather", "GatherElements", "GatherND", "Gemm", "Greater", "GreaterOrEqual", "Identity",
    "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "OneHot", "Or", "Pow", "Range",
    "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin",
    "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose",
    "Trilu", "Unsqueeze", "Where", "Xor",
})
# fmt: on


def constant_nodes(ed: Editor) -> None:
    """Constant nodes become initializers, whatever attribute holds the value."""
    for node in ed.nodes("Constant"):
        _settle(ed, node, [_constant_value(node)])


def _constant_value(node: Node) -> onnx.TensorProto:
    """The value as a tensor."""
    (a,) = node.proto.attribute
    value = onnx.helper.get_attribute_value(a)
    if a.name == "value":
        tensor: onnx.TensorProto = value
        return tensor
    if a.name in ("value_string", "value_strings"):
        array: Array = np.array(value, dtype=object)
    else:
        array = np.array(value, np.float32 if "float" in a.name else np.int64)
    return onnx.numpy_helper.from_array(array)


def fold_constants(ed: Editor) -> None:
    """Nodes whose inputs are all constant, and shapes that are known, become constants.

    Shape of a tensor folds if all its dimensions are known; Gather and Slice on a Shape fold
    if the dimensions that they pick are known. A Reshape works one dimension out by itself, where
    all others are known. Folding makes more shapes known, so inference
    and folding alternate until nothing changes. A result above 1 MB stays computed unless it
    is at most twice as large as the inputs (a Cast of float16 weights). The
    arithmetic is that of ``onnx.reference``.
    """
    for _ in range(_MAX_ROUNDS):
        ed.finish()
        ed.types = infer_types(ed.model)
        while settle_sizes(ed):
            ed.finish()
            ed.types = infer_types(ed.model)
        _name_types(ed)
        known: dict[str, list[int | None]] = {}
        changed = False
        for node in ed.nodes():
            results = _known_dims(ed, node, known) or _evaluate(ed, node)
            if results is not None:
                changed |= _settle(ed, node, results)
            elif node.op == "Reshape" and node.input(1) in known:
                changed |= _settle_reshape(ed, node, known[node.input(1)])
        if not changed:
            return


def _name_types(ed: Editor) -> None:
    """CastLike to a type that is known becomes a Cast, which does not wait for the other tensor.

    Exporters write it around constants: a bias of zeros, say, of the type that the image has.
    """
    for node in ed.nodes("CastLike"):
        to = ed.elem_type(node.input(1))
        if to:
            cast = ed.new_node("Cast", [node.input(0)], [node.output], node.name, to=to)
            cast.attribute.extend(node.proto.attribute)  # how it rounds and saturates
            ed.replace([node], [cast])


def _settle(ed: Editor, node: Node, results: list[onnx.TensorProto]) -> bool:
    """Put constants in the place of a node, unless it makes outputs."""
    if any(o in ed.outputs for o in node.outputs):
        return False
    for name, tensor in zip(node.outputs, results, strict=False):
        if name:
            ed.become_constant(name, tensor)
    ed.replace([node])
    return True


def _evaluate(ed: Editor, node: Node) -> list[onnx.TensorProto] | None:
    if node.op not in _FOLDABLE or any(o in ed.outputs for o in node.outputs):
        return None
    if not all(i in ed.constants for i in node.inputs if i):
        return None
    if node.op == "LayerNormalization" and any(node.outputs[1:]):
        return None  # whose types the reference evaluation gets wrong
    feeds = {i: v for i in node.inputs if (v := ed.array(i)) is not None}
    limit = max(_MAX_BYTES, 2 * sum(v.nbytes for v in feeds.values()))
    if sum(_expected_bytes(ed, o) for o in node.outputs if o) > limit:
        return None
    trains = node.op == "BatchNormalization" and any(node.outputs[1:])
    proto = _by_batch_statistics(ed, node) if trains else node.proto
    if proto is None:
        return None
    feeds = {i: v for i, v in feeds.items() if i in proto.input}
    try:
        session = onnx.reference.ReferenceEvaluator(proto, opsets={"": ed.opset})
        with np.errstate(all="ignore"):
            values = [np.asarray(v) for v in session.run(None, feeds)]
    except Exception:
        _log.warning("%s %r has constant inputs but stays: not computable", node.op, node.name)
        return None
    if sum(v.nbytes for v in values) > limit:
        return None
    return [onnx.numpy_helper.from_array(v) for v in values]


def _by_batch_statistics(ed: Editor, node: Node) -> onnx.NodeProto | None:
    """A BatchNormalization in training mode, as weights are standardized by (BiT), for evaluation.

    ``onnx.reference`` takes the running statistics there. With a batch of one, it normalizes each
    channel as InstanceNormalization does.
    """
    shape = ed.shape(node.input(0))
    if not shape or shape[0] != 1 or any(map(ed.read, node.outputs[1:])):
        return None
    epsilon = node.attr("epsilon", 1e-5)
    return ed.new_node(
        "InstanceNormalization", node.inputs[:3], [node.output], node.name, epsilon=epsilon
    )


def _expected_bytes(ed: Editor, name: str) -> int:
    """A lower bound of a tensor's size, from its inferred shape; small inputs can make much."""
    shape, dtype = ed.shape(name), ed.dtype(name)
    if shape is None or dtype is None:
        return 0
    return math.prod(d or 1 for d in shape) * dtype.itemsize


def _settle_reshape(ed: Editor, node: Node, target: list[int | None]) -> bool:
    """Let a Reshape work out the only dimension that is not known; whether it can."""
    others = [d for d in target if d is not None]
    if len(others) != len(target) - 1 or any(d <= 0 for d in others):
        return False
    dims = np.array([-1 if d is None else d for d in target], np.int64)
    maker = ed.maker(node.input(1))
    ed.set_input(node, 1, ed.add_constant(f"{node.output}_shape", dims))
    ed.prune([maker] if maker is not None else [])
    return True


def _known_dims(
    ed: Editor, node: Node, known: dict[str, list[int | None]]
) -> list[onnx.TensorProto] | None:
    """The result of a node on dimensions, if it is all known; else noted in ``known``."""
    if node.op == "Shape":
        shape = ed.shape(node.input(0))
        if shape is None:
            return None
        dims = list(shape)[slice(node.attr("start", 0), node.attr("end"))]
        result: Array | list[int | None] | None = np.array(dims, object)
    elif node.op in ("Gather", "Slice") and node.input(0) in known:
        result = _pick(ed, node, np.array(known[node.input(0)], object))
    else:
        result = _combined(ed, node, known)
    if result is None:
        return None
    flat = np.asarray(result, object)
    if all(d is not None for d in flat.reshape(-1)):
        return [onnx.numpy_helper.from_array(flat.astype(ed.dtype(node.output) or np.int64))]
    if flat.ndim == 1:
        known[node.output] = list(flat)
    return None


def _combined(
    ed: Editor, node: Node, known: dict[str, list[int | None]]
) -> list[int | None] | None:
    """Vectors of dimensions put together as exporters do it: TensorFlow's around a product."""
    if known.keys().isdisjoint(node.inputs):
        return None
    if node.op == "Cast":
        return known[node.input(0)] if node.attr("to") in SIZES else None
    if node.op == "ReduceProd":
        return [None] if node.attr("keepdims", 1) else None
    parts = [_dims_of(ed, name, known) for name in node.inputs]
    given = [p for p in parts if p is not None]
    if len(given) != len(parts) or node.op not in ("Concat", "Max"):
        return None
    if node.op == "Concat":
        return [d for part in given for d in part]
    if len({len(p) for p in given}) != 1:
        return None
    rows = list(zip(*given, strict=True))
    return [None if None in row else max(d or 0 for d in row) for row in rows]


def _dims_of(ed: Editor, name: str, known: dict[str, list[int | None]]) -> list[int | None] | None:
    if name in known:
        return known[name]
    value = ed.array(name)
    return value.tolist() if value is not None and value.ndim == 1 else None


def _pick(ed: Editor, node: Node, source: Array) -> Array | None:
    """Gather or Slice on a vector of dimensions."""
    numbers: dict[int, Array] = {}
    for slot, name in enumerate(node.inputs):
        if slot and name:  # what is left out in between still counts
            value = ed.array(name)
            if value is None:
                return None
            numbers[slot] = value
    if node.op == "Gather":
        if (np.abs(numbers[1] + 0.5) > source.size).any():
            return None  # out of range: the runtime says so
        picked: Array = np.asarray(source[numbers[1].astype(np.int64)], object)
        return picked
    start, end = int(numbers[1].item()), int(numbers[2].item())
    step = int(numbers[4].item()) if 4 in numbers else 1
    return np.asarray(source[slice(start, end, step)], object) if step > 0 else None
