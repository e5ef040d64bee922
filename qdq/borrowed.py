"""Operators that onnxruntime has in the default domain, and the standard has not, or not yet.

Its tools write them: a LayerNormalization below opset 17 stands in most transformers that
``onnxruntime.transformers`` has optimized, a SimplifiedLayerNormalization in language models of
its model builder; and it still has kernels for experimental operators of old models. The checker
and the converter of onnx refuse what they do not know, but take what is of another domain as it is.
"""

import onnx

from qdq.facts import DEFAULT, RUNTIME
from qdq.graph import Graph
from qdq.nested import all_nodes

__all__ = ["give_back", "import_runtime", "lend"]

_NEVER = 1 << 30
_SINCE = {  # opset of onnx
    "LayerNormalization": 17,
    "MeanVarianceNormalization": 9,
    "SimplifiedLayerNormalization": _NEVER,
    "ThresholdedRelu": 10,
    # experimental ones, up to opset 9 (``prepare.experimental``)
    **dict.fromkeys(
        ("Affine", "Crop", "ImageScaler", "ParametricSoftplus", "Scale", "ScaledTanh"), _NEVER
    ),
}


def import_runtime(model: onnx.ModelProto) -> None:
    """Import the runtime's own domain, if a node is of it and it is not yet imported."""
    known = {o.domain for o in model.opset_import}
    if RUNTIME not in known and any(n.domain == RUNTIME for n in all_nodes(model.graph.node)):
        model.opset_import.add(domain=RUNTIME, version=1)


def lend(model: onnx.ModelProto) -> None:
    """Put the operators into the runtime's own domain, in place; no runtime would load that."""
    opset = Graph(model).opset
    for node in all_nodes(model.graph.node):
        if node.domain in DEFAULT and opset < _SINCE.get(node.op_type, 0):
            node.domain = RUNTIME
    import_runtime(model)


def give_back(model: onnx.ModelProto) -> None:
    """Undo ``lend``, in place."""
    for node in all_nodes(model.graph.node):
        if node.domain == RUNTIME and node.op_type in _SINCE:
            node.domain = ""
