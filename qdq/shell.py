"""All of an emitted model but its nodes and initializers."""

import json
from collections.abc import Mapping

import onnx
from onnx import helper

__all__ = ["shell", "stamp"]


def shell(model: onnx.ModelProto) -> onnx.ModelProto:
    """All of the model but nodes and initializers."""
    made = onnx.ModelProto()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.metadata_props.extend(model.metadata_props)
    for field in ("model_version", "domain", "doc_string"):
        setattr(made, field, getattr(model, field))
    made.graph.name = model.graph.name or "graph"
    made.graph.doc_string = model.graph.doc_string
    made.graph.input.extend(model.graph.input)
    made.graph.output.extend(model.graph.output)
    made.graph.value_info.extend(model.graph.value_info)
    return made


def stamp(result: onnx.ModelProto, source: onnx.ModelProto, metadata: Mapping[str, object]) -> None:
    """Give an emitted model its metadata, in place, instead of those that it has.

    Args:
        result: the emitted model.
        source: the float model, whose own metadata it gets too.
        metadata: written to ``metadata_props`` as ``qdq.<key>``, JSON where it is not a string.
    """
    props = {p.key: p.value for p in source.metadata_props}
    if source.producer_name:
        props["qdq.source_producer"] = source.producer_name
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        props[f"qdq.{key}"] = text
    del result.metadata_props[:]
    helper.set_model_props(result, props)
    result.producer_name = "qdq"
    result.producer_version = str(metadata.get("version", ""))
