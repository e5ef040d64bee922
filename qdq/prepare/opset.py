"""The operator set raised, and shapes inferred, both without moving the weights around."""

import logging
from typing import Any

import onnx
import onnx.version_converter

from qdq.borrowed import give_back, lend
from qdq.errors import ModelError
from qdq.facts import RUNTIME
from qdq.graph import declare_opset, opset_of, shape_of
from qdq.light import without_large
from qdq.nested import all_graphs
from qdq.prepare.experimental import spell_out_experimental
from qdq.prepare.old import after_raising, before_raising
from qdq.prepare.oldest import SEVEN, raise_to_seven

__all__ = [
    "OPSET",
    "infer_types",
    "open_dimensions",
    "plain_constants",
    "put_stand_ins",
    "raise_opset",
]

_log = logging.getLogger(__name__)

OPSET = 21
_IR_VERSION = 10  # the first one for opset 21
_LOWEST = 13  # the first opset whose QuantizeLinear has an axis
_LARGE = 1024  # bytes; what the converter and shape inference need to read is smaller


def plain_constants(model: onnx.ModelProto) -> None:
    """Initializers that are also graph inputs (the rule before IR version 4) become constants.

    The caller of the prepared model can then no longer override them: a quantized weight is
    rounded once and for all.
    """
    own = {t.name for t in model.graph.initializer}
    kept = [v for v in model.graph.input if v.name not in own]
    if len(kept) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, _IR_VERSION)


def open_dimensions(model: onnx.ModelProto) -> None:
    """Dimensions of -1, which old exporters write for unknown ones, become unknown.

    onnxruntime takes them so. Shape inference would take them as numbers, and whatever counts
    elements would count below 0.
    """
    for graph in all_graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.Clear()


# operators that shape inference does not know → such with the same type and shape of the first
# result, the inputs that they read, and attributes; those of ai.onnx.ml give float32
_StandIn = tuple[str, tuple[int, ...], dict[str, Any]]
_SAME: _StandIn = ("Identity", (0,), {})
_STAND_INS: dict[tuple[str, str], _StandIn] = {
    ("", "GroupNormalization"): _SAME,
    ("ai.onnx", "GroupNormalization"): _SAME,
    ("", "SimplifiedLayerNormalization"): _SAME,
    ("ai.onnx.ml", "Normalizer"): ("Cast", (0,), {"to": onnx.TensorProto.FLOAT}),
    ("ai.onnx.ml", "Scaler"): ("Cast", (0,), {"to": onnx.TensorProto.FLOAT}),
    (RUNTIME, "EmbedLayerNormalization"): ("Gather", (2, 0), {}),
    (RUNTIME, "GroupQueryAttention"): ("Einsum", (0, 1), {"equation": "bsh,btk->bsh"}),
    (RUNTIME, "MultiHeadAttention"): ("Einsum", (0, 2), {"equation": "bsh,btv->bsv"}),
    (RUNTIME, "RotaryEmbedding"): _SAME,
}


def raise_opset(model: onnx.ModelProto) -> None:
    """Convert the model to opset 21, or as near below as the converter can, down to 13.

    Newer models stay as they are. Large weights are set aside while the converter runs.

    Raises:
        ModelError: if no opset from 13 to 21 can be reached.
    """
    have = opset_of(model)
    if have >= OPSET or have == 0:
        return
    light = without_large(model, _LARGE)
    spell_out_experimental(light, have)
    if have < SEVEN:
        raise_to_seven(light)
    lend(light)
    before_raising(light, have)
    failure = ""
    for wanted in range(OPSET, max(_LOWEST, have) - 1, -1):
        if wanted == have:
            break
        try:
            converted = onnx.version_converter.convert_version(light, wanted)
        except Exception as e:
            failure = failure or " ".join(str(e).split())
            continue
        if wanted < OPSET:
            _log.warning("opset %d reached in place of %d: %s", wanted, OPSET, failure)
        give_back(converted)
        after_raising(converted, have)
        _put_back(model, converted)
        return
    if have < _LOWEST:
        raise ModelError(
            f"the model's opset {have} cannot be raised to {_LOWEST} or above, which "
            f"quantization wants ({failure}); export the model with opset {OPSET}"
        )
    _log.warning("opset %d stays, it cannot be raised to %d: %s", have, OPSET, failure)


def _put_back(model: onnx.ModelProto, converted: onnx.ModelProto) -> None:
    """Take the nodes and small constants of the converted model, keep the rest of the own."""
    declare_opset(model, opset_of(converted))
    graph = model.graph
    del graph.node[:]
    graph.node.extend(converted.graph.node)
    known = {t.name for t in graph.initializer}
    graph.initializer.extend(t for t in converted.graph.initializer if t.name not in known)


def infer_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Element types and shapes of all tensors of the main graph, by name.

    Shapes that the outputs are declared with count only where the nodes tell none: exporters write
    those of one sample, and onnxruntime does not mind.

    Raises:
        ModelError: if shape inference finds the graph inconsistent.
    """
    light = without_large(model, _LARGE)
    custom = {
        o
        for n in light.graph.node
        if n.domain not in ("", "ai.onnx", "ai.onnx.ml")
        for o in n.output
    }
    known = [v for v in light.graph.value_info if v.name in custom]
    del light.graph.value_info[:]
    light.graph.value_info.extend(known)
    put_stand_ins(light.graph)
    for v in light.graph.output:
        if v.name not in custom and v.type.HasField("tensor_type"):
            v.type.tensor_type.ClearField("shape")
    graph = _inferred(light)
    infos = (*graph.value_info, *graph.input, *graph.output)
    found = {v.name: v.type for v in infos}
    for v in model.graph.output:
        if v.name not in found or shape_of(found[v.name]) is None:
            found[v.name] = v.type
    return found


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ModelError(f"shapes of the model do not fit together: {reason}") from e


def put_stand_ins(graph: onnx.GraphProto) -> None:
    """Put known operators in the place of those that inference does not know, to find shapes."""
    for n in graph.node:
        found = _STAND_INS.get((n.domain, n.op_type))
        if found is None:
            continue
        op_type, slots, kept = found
        inputs = [n.input[k] for k in slots if k < len(n.input) and n.input[k]]
        if len(inputs) == len(slots):
            n.CopyFrom(onnx.helper.make_node(op_type, inputs, n.output[:1], n.name, **kept))
