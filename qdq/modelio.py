"""Models in and out: paths, bytes, ModelProto, onnx_ir.Model; external data; atomic files."""

import logging
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from qdq.borrowed import import_runtime
from qdq.errors import ModelError
from qdq.external import fill, fill_from_ir, find, outside
from qdq.files import replacing
from qdq.light import for_checker, weight_bytes, without_large
from qdq.nested import all_graphs, all_nodes, sort_nodes
from qdq.weights import copy_into, is_reference, load_light, raw_bytes, read, refer

__all__ = ["load", "save"]

_log = logging.getLogger(__name__)

# A protobuf message cannot exceed 2**31 - 1 bytes; leave room for what the caller adds.
_PROTO_LIMIT = 2**31 - 2**26

_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QGemm",
    }
)
_LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
_FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
)
_TENSORS = (onnx.AttributeProto.TENSOR, onnx.AttributeProto.SPARSE_TENSOR)


def load(model: Any, *, quantized: bool = False, lazy: bool = False) -> onnx.ModelProto:
    """Read a float model, check it, and return an own copy of it.

    Nodes come sorted topologically, model-local functions are inlined, external data is read
    in, and graph outputs have the types and shapes that shape inference finds for them.

    Args:
        model: path of an ONNX file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
            The caller's object or file is never changed.
        quantized: take a quantized model too.
        lazy: leave large float32 weights in their file: the model has references
            (``qdq.weights``), which only this package can read, in place of the data. The file
            must not change as long as the model is in use.

    Returns:
        A model that the caller owns; with all its data inside unless ``lazy``.

    Raises:
        ModelError: missing, truncated or invalid model, a model that is already quantized, a
            constant whose data does not fit its shape, or a weight that holds NaN or Inf.
    """
    proto, where = _read(model, lazy=lazy)
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{where} holds no graph; wanted an ONNX model")
    sort_nodes(proto.graph)
    import_runtime(proto)
    _type_outputs(proto)
    _check_valid(proto, where)
    if not quantized:
        _refuse_quantized(proto, where)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    _refuse_non_finite(proto.graph, where)
    return proto


def save(
    model: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool = False
) -> None:
    """Write a model so that the file is complete or, on any failure, not changed at all.

    A model too large for one protobuf file (2 GB) gets its large tensors in ``<name>.data``
    beside it, named after the file.

    Args:
        model: the model; not changed.
        path: the file to write; an existing file is replaced.
        external_data: write the large tensors (above 1 kB) beside a smaller model too.

    Raises:
        OSError: if the folder does not exist or cannot be written to; with external data, if the
            path is a link.
    """
    target = Path(path)
    light = without_large(model, 1024, as_inputs=False)
    large = weight_bytes(model)
    split = external_data and len(light.graph.initializer) < len(model.graph.initializer)
    if not split and light.ByteSize() + large <= _PROTO_LIMIT:
        with replacing(target) as temporary:
            temporary.write_bytes(_whole(model).SerializeToString())
        return
    if target.is_symlink():
        raise OSError(
            f"'{target}' is a link, and a model with external data is found by the folder and the "
            f"name that it has: give the path of what the link leads to, '{target.resolve()}'"
        )
    data = target.with_name(target.name + ".data")
    with replacing(data) as data_file, replacing(target) as graph_file:
        _write_external(model, light, data_file, data.name)
        graph_file.write_bytes(light.SerializeToString())


def _whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the data of all references inside; itself if it has none."""
    if not any(is_reference(t) for t in model.graph.initializer):
        return model
    whole = without_large(model, -1, as_inputs=False)
    for t in model.graph.initializer:
        copy_into(whole.graph.initializer.add(), t)
    return whole


def _write_external(
    model: onnx.ModelProto, light: onnx.ModelProto, file: Path, location: str
) -> None:
    """Write the data of the tensors that ``light`` lacks, and refer to it from ``light``."""
    present = {t.name for t in light.graph.initializer}
    offset = 0
    with file.open("wb") as stream:
        for t in model.graph.initializer:
            if t.name in present:
                continue
            raw = raw_bytes(t)
            stream.write(b"\0" * (-offset % 4096))  # pages can then be mapped
            offset += -offset % 4096
            stream.write(raw)
            out = light.graph.initializer.add(name=t.name, data_type=t.data_type, dims=t.dims)
            out.data_location = onnx.TensorProto.EXTERNAL
            entries = {"location": location, "offset": str(offset), "length": str(len(raw))}
            for key, value in entries.items():
                out.external_data.add(key=key, value=value)
            offset += len(raw)


def _read(model: Any, *, lazy: bool = False) -> tuple[onnx.ModelProto, str]:
    """An own copy of the model, and words for where it came from."""
    if isinstance(model, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(model)
        _want_data_inside(own, "the ModelProto")
        return own, "the ModelProto"
    if isinstance(model, bytes | bytearray | memoryview):
        data = bytes(model)
        where = f"the model given as {len(data)} bytes"
        own = _parse(data, where)
        _want_data_inside(own, where)
        return own, where
    if isinstance(model, str | os.PathLike):
        return _read_file(Path(os.fspath(model)), lazy=lazy)
    ir: Any = sys.modules.get("onnx_ir")  # an onnx_ir.Model can only exist if this is loaded
    if ir is not None and isinstance(model, ir.Model):
        own = onnx.ModelProto()
        own.CopyFrom(ir.to_proto(model))
        fill_from_ir(own, model)
        _want_data_inside(own, "the onnx_ir.Model")
        return own, "the onnx_ir.Model"
    raise ModelError(
        f"a model of type {type(model).__name__} cannot be read; give a path, the bytes of a "
        "model, an onnx.ModelProto or an onnx_ir.Model"
    )


def _read_file(path: Path, *, lazy: bool) -> tuple[onnx.ModelProto, str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"model file {str(path)!r} {what}; give the path of an ONNX file")
    where = f"model file {str(path)!r}"
    try:
        light = load_light(path) if lazy else None
        own = _parse(path.read_bytes(), where) if light is None else light
    except OSError as e:
        raise ModelError(f"{where} cannot be read: {e}") from e
    for t in own.graph.initializer if lazy else ():
        if t.data_location == onnx.TensorProto.EXTERNAL and not is_reference(t):
            part = find(t, path)
            if not refer(t, *part):
                fill(t, part, path)
    for t in outside(own):
        if not (lazy and is_reference(t)):
            fill(t, find(t, path), path)
    return own, where


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{where} is empty; wanted an ONNX model")
    try:
        return onnx.load_model_from_string(data)
    except Exception as e:  # protobuf's DecodeError has no public name that is the same everywhere
        raise ModelError(f"{where} is truncated or not an ONNX model ({e})") from e


def _want_data_inside(model: onnx.ModelProto, where: str) -> None:
    for t in outside(model):
        raise ModelError(
            f"{where} keeps the data of {t.name!r} in an external file, but which folder is "
            "unknown; give the path of the model instead",
            tensor=t.name,
        )


def _type_outputs(model: onnx.ModelProto) -> None:
    """Give graph outputs without a type or shape what shape inference finds, if it does."""
    untyped = {v.name: v for v in model.graph.output if not _has_shape(v)}
    if not untyped:
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(without_large(model, 1024), data_prop=True)
    except Exception as e:  # what is wrong is for the checker to say
        _log.debug("no shapes of outputs: %s", e)
        return
    for found in inferred.graph.output:
        if found.name in untyped and found.type.WhichOneof("value"):
            untyped[found.name].type.CopyFrom(found.type)


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind is not None and (kind != "tensor_type" or value.type.tensor_type.HasField("shape"))


def _check_valid(model: onnx.ModelProto, where: str) -> None:
    try:
        onnx.checker.check_model(for_checker(model))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        raise ModelError(f"{where} is not a valid ONNX model: {reason}") from e


def _refuse_quantized(model: onnx.ModelProto, where: str) -> None:
    for n in chain.from_iterable(all_nodes(x.node) for x in (model.graph, *model.functions)):
        if n.op_type in _QUANTIZED_OPS or n.op_type.startswith("QLinear"):
            name = n.name or (n.output[0] if n.output else "")
            raise ModelError(
                f"{where} is already quantized: node {name!r} is a {n.op_type}; give the float "
                "model from before quantization",
                node=name,
            )


def _refuse_non_finite(graph: onnx.GraphProto, where: str) -> None:
    """Raise if a weight holds NaN or Inf.

    An attention mask rightly holds -inf, a Clip bound +inf: -inf is refused only in what a
    linear operator reads, and +inf only in tensors of more than two values.
    """
    for g in all_graphs(graph):
        weights = {i for n in g.node if n.op_type in _LINEAR_OPS for i in n.input}
        for t in g.initializer:
            _want_finite(t, t.name, where, t.name in weights)
        for s in g.sparse_initializer:
            _want_finite(s.values, s.values.name, where, s.values.name in weights)
        for n in g.node:
            for a in n.attribute:
                if n.op_type == "Constant" and a.type in _TENSORS:
                    t = a.t if a.type == onnx.AttributeProto.TENSOR else a.sparse_tensor.values
                    _want_finite(t, n.output[0], where, n.output[0] in weights)


def _want_finite(tensor: onnx.TensorProto, name: str, where: str, is_weight: bool) -> None:
    try:
        value = read(tensor)
    except ValueError as e:
        shape = tuple(tensor.dims)
        raise ModelError(
            f"the data of tensor {name!r} of {where} does not fit its shape {shape} ({e}); export "
            "the model again",
            tensor=name,
        ) from e
    if tensor.data_type not in _FLOATS:
        return
    value = value.astype(np.float32) if value.dtype.kind == "V" else value
    bad = ~np.isfinite(value)
    if not is_weight:
        bad &= np.isnan(value) | (value.size > 2) & (value > 0)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ModelError(
            f"weight {name!r} of {where} holds {int(bad.sum())} NaN or Inf among {value.size} "
            f"values, the first at {first}; weights must be finite to be quantized: look at the "
            "checkpoint that the model was exported from, and export it again",
            tensor=name,
        )
