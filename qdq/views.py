"""From the graph to the records that handlers, targets and costs see; nominal shapes."""

import math
from collections.abc import Mapping

import numpy as np
import onnx

from qdq.errors import ModelError
from qdq.facts import DEFAULT
from qdq.graph import Graph, attributes
from qdq.light import without_large
from qdq.ops.demand import NodeView, TensorView
from qdq.prepare.constants import fold_constants
from qdq.prepare.editing import Editor
from qdq.prepare.opset import put_stand_ins

__all__ = ["node_view", "nominal_graph"]

BATCH, IMAGE, SEQUENCE = 1, 224, 64  # what an unknown dimension is taken to be, for costs only
# operators that may hold the values of an attention mask; weights are not looked through
MASKED = frozenset({"Add", "Expand", "Max", "Min", "Mul", "Sub", "Sum", "Tile", "Where"})
BIG = 1 << 12  # bytes; larger constants travel without their data through shape inference


def node_view(graph: Graph, index: int) -> NodeView:
    """What handlers and targets may know of a node."""
    found = graph.views.get(index)
    if found is None:
        found = graph.views[index] = _new_view(graph, graph.nodes[index])
    return found


def _new_view(graph: Graph, node: onnx.NodeProto) -> NodeView:
    return NodeView(
        name=node.name,
        op_type=node.op_type if node.domain in DEFAULT else f"{node.domain}.{node.op_type}",
        inputs=tuple(_tensor_view(graph, name, node.op_type in MASKED) for name in node.input),
        outputs=tuple(node.output),
        attributes=attributes(node),
        scalars=_scalars(graph, node),
        opset=graph.opset,
    )


def _tensor_view(graph: Graph, name: str, measured: bool) -> TensorView:
    elem = graph.elem_type(name)
    # an unknown type is taken as float32: models without full shape inference are mostly that
    floating = elem in (0, onnx.TensorProto.FLOAT)
    constant = name in graph.constants
    largest = 0.0
    if measured and floating and constant:
        largest = float(np.abs(graph.array(name)).max(initial=0))
    return TensorView(name, graph.shape(name), constant, floating, largest)


def _scalars(graph: Graph, node: onnx.NodeProto) -> Mapping[int, float]:
    found = {}
    for slot, name in enumerate(node.input):
        tensor = graph.constants.get(name)
        if tensor is not None and math.prod(tensor.dims) == 1:
            value = graph.array(name)
            if value.dtype.kind in "fiub":
                found[slot] = float(value.reshape(()))
    return found


def nominal_graph(
    model: onnx.ModelProto, seen: Mapping[str, tuple[int, ...]] | None = None
) -> Graph:
    """An index of ``model`` whose every shape is a number, as far as inference can tell.

    Costs need sizes before any run. Unknown dimensions of graph inputs are those of ``seen`` (the
    shapes of one sample), rounded to a power of two, so that samples of about the same size give
    the same plan; without that 1 (the first), 224 (the last two of rank 4 and 5) or 64 (others).
    The shapes behind them follow.
    """
    seen = seen or {}
    scratch = without_large(model, BIG)
    for value in scratch.graph.input:
        dims = value.type.tensor_type.shape.dim
        sample = seen.get(value.name, ())
        for axis, dim in enumerate(dims):
            if dim.HasField("dim_value"):
                continue
            if len(sample) == len(dims):
                dim.dim_value = 1 << round(float(np.log2(max(sample[axis], 1))))
            else:
                image = len(dims) >= 4 and axis >= 2
                dim.dim_value = BATCH if axis == 0 else IMAGE if image else SEQUENCE
    del scratch.graph.value_info[:]
    put_stand_ins(scratch.graph)
    for value in scratch.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(scratch, data_prop=True)
        if any(map(_is_open, inferred.graph.value_info)):
            inferred = _computed(scratch)
    except (onnx.shape_inference.InferenceError, RuntimeError, ModelError):
        return Graph(model)
    return Graph(model, types=inferred)


def _is_open(value: onnx.ValueInfoProto) -> bool:
    """Whether shape inference left a dimension of the tensor, or its rank, unknown."""
    kind = value.type.tensor_type
    dims = kind.shape.dim
    return not kind.HasField("shape") or any(not d.HasField("dim_value") for d in dims)


def _computed(scratch: onnx.ModelProto) -> onnx.ModelProto:
    """``scratch``, whose inputs have numbers for shapes, with what is computed from these.

    Shape inference follows few operators on shapes: not the division by which exporters find the
    length behind a strided convolution. All of that is constant here, so it is folded, and with it
    the targets of reshapes are known.
    """
    ed = Editor(scratch)
    fold_constants(ed)
    ed.finish()
    given = {v.name: v for v in (*scratch.graph.input, *scratch.graph.output)}
    del scratch.graph.value_info[:]
    for name, kind in ed.types.items():
        value = given[name] if name in given else scratch.graph.value_info.add(name=name)
        value.type.CopyFrom(kind)
    return scratch
