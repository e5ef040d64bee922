"""Copies of a model without its large weights: for tools that cannot take them, or need not."""

import math
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.borrowed import lend
from qdq.graph import Graph
from qdq.weights import read

__all__ = ["detached", "for_checker", "tensor_bytes", "weight_bytes", "without_large"]


def without_large(model: onnx.ModelProto, limit: int, *, as_inputs: bool = True) -> onnx.ModelProto:
    """A copy of the model without the data of initializers above ``limit`` bytes.

    With ``as_inputs`` these become graph inputs of the same type and shape, so the copy is a
    valid small model: for the checker, shape inference and the version converter, which cannot
    take more than 2 GB and are slow long before.
    """
    light = onnx.ModelProto()
    graph = model.graph
    _copy_fields(model, light, "graph")
    _copy_fields(graph, light.graph, "initializer")
    given = {v.name for v in graph.input}
    for t in graph.initializer:
        if tensor_bytes(t) <= limit:
            light.graph.initializer.add().CopyFrom(t)
        elif as_inputs and t.name not in given:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            )
    return light


def for_checker(model: onnx.ModelProto) -> onnx.ModelProto:
    """A small copy that onnx's checker judges as it would judge the model.

    The checker wants shapes of the graph's inputs and outputs, and types of its outputs; runtimes
    do not. Where they are missing, the copy has some. Operators that the standard does not know are
    of the runtime's own domain.
    """
    light = without_large(model, 1024)
    lend(light)
    for v in light.graph.output:
        if v.type.WhichOneof("value") in (None, "tensor_type") and not v.type.tensor_type.elem_type:
            v.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for v in (*light.graph.input, *light.graph.output):
        if v.type.HasField("tensor_type"):
            v.type.tensor_type.shape.SetInParent()
    return light


def detached(
    model: onnx.ModelProto,
    limit: int,
    kinds: Container[np.dtype[Any]],
    more: Iterable[onnx.TensorProto],
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """A copy of the model that names its large initializers as external data, and their values.

    ``more`` are initializers that the copy gets besides the model's own.
    Initializers of up to ``limit`` bytes, and of types that are not in ``kinds``, stay inside.
    There is no external file; whoever loads the copy gives the values by name. Large ones that
    nothing reads are left out: runtimes drop them first and then miss them.
    """
    light = without_large(model, limit, as_inputs=False)
    graph = Graph(model)
    read_ones = (
        t
        for t in model.graph.initializer
        if tensor_bytes(t) > limit and (graph.uses(t.name) or t.name in graph.outputs)
    )
    values: dict[str, NDArray[Any]] = {}
    for t in (*read_ones, *more):
        known = onnx.helper.tensor_dtype_to_np_dtype(t.data_type) in kinds
        if tensor_bytes(t) <= limit or not known:
            light.graph.initializer.add().CopyFrom(t)
            continue
        note = light.graph.initializer.add(name=t.name, data_type=t.data_type, dims=t.dims)
        note.data_location = onnx.TensorProto.EXTERNAL
        note.external_data.add(key="location", value="none")
        values[t.name] = read(t)
    return light, values


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data, from its type and shape; the data is not touched."""
    if tensor.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return int(tensor.ByteSize())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * dtype.itemsize)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Size of the data of all initializers."""
    return sum(map(tensor_bytes, model.graph.initializer))


def _copy_fields(source: Any, target: Any, left_out: str) -> None:
    """Copy all fields of a protobuf message but one."""
    for descriptor, value in source.ListFields():
        if descriptor.name == left_out:
            continue
        mine = getattr(target, descriptor.name)
        if hasattr(mine, "add"):  # of messages; extend would serialize and parse each
            for message in value:
                mine.add().CopyFrom(message)
        elif hasattr(mine, "extend"):
            mine.extend(value)
        elif hasattr(mine, "CopyFrom"):
            mine.CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)
