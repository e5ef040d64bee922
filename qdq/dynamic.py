"""Nodes whose kernels round their activations by themselves, written as onnxruntime's operators."""

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qdq.borrowed import import_runtime
from qdq.facts import RUNTIME
from qdq.graph import Graph, drop_attributes
from qdq.tables import codes_of

__all__ = ["FLOAT_FORMS", "make_dynamic", "with_dynamic"]

_FORMS = {"LSTM": "DynamicQuantizeLSTM"}
FLOAT_FORMS = {dynamic: float_form for float_form, dynamic in _FORMS.items()}
"""Operator that rounds by itself → the float one, whose inputs it has, and more behind them."""

_PLAIN_INPUTS = 8  # of an LSTM; scales and zero points of its two weights come behind them


def make_dynamic(node: onnx.NodeProto, graph: Graph) -> list[onnx.TensorProto]:
    """Turn a float LSTM into a ``DynamicQuantizeLSTM``, in place.

    W (D, 4H, I) and R (D, 4H, H) become int8 codes (D, I, 4H) and (D, H, 4H) with a scale for each
    gate of each hidden value, (D, 4H), which is ``max(abs(w)) / 127`` over its row: as an
    activation has a rounding of its own in each step, a finer scale that cuts weights gains
    nothing. The kernel finds the uint8 parameters of the input in each run, those of its last
    result in each step.

    Args:
        node: of the main graph; its weights are constants.
        graph: the model's index, for values and names.

    Returns:
        The codes, scales and zero points.
    """
    made: list[onnx.TensorProto] = []
    inputs = [*node.input, *[""] * (_PLAIN_INPUTS - len(node.input))]
    for slot in (1, 2):
        name = inputs[slot]
        codes, scale = _codes(graph.floats(name))
        parts = {"quantized": codes, "scale": scale, "zero_point": np.zeros(scale.shape, np.int8)}
        for label, value in parts.items():
            fresh = graph.fresh(f"{name}_{label}")
            made.append(numpy_helper.from_array(np.ascontiguousarray(value), fresh))
        inputs[slot] = made[-3].name
        inputs += [made[-2].name, made[-1].name]
    del node.input[:]
    node.input.extend(inputs)
    node.op_type, node.domain = _FORMS[node.op_type], RUNTIME
    drop_attributes(node, "layout")  # 0, which this one does not know
    return made


def _codes(weight: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Of a weight (D, 4H, K): codes (D, K, 4H), scales (D, 4H)."""
    codes, scale = codes_of(weight.reshape(-1, weight.shape[2]))
    return codes.reshape(weight.shape).transpose(0, 2, 1), scale.reshape(weight.shape[:2])


def with_dynamic(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of a float model with some nodes turned by ``make_dynamic``."""
    graph = Graph(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.name in names:
            result.graph.initializer.extend(make_dynamic(node, graph))
    import_runtime(result)
    return result
