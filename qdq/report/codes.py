"""Scale and zero point of a DequantizeLinear, whatever tool wrote it."""

from typing import Any

import numpy as np
import onnx

from qdq.errors import ConfigError
from qdq.graph import Graph, attributes
from qdq.spec import INT8, INT16, INT32, UINT8, UINT16, QuantParams, QuantSpec

__all__ = ["params_of"]

TYPES = {t.name: t for t in (UINT8, INT8, UINT16, INT16, INT32)}


def params_of(graph: Graph, node: onnx.NodeProto) -> QuantParams:
    """Parameters of a DequantizeLinear.

    Raises:
        ConfigError: if they are not constants, or of a kind that qdq has no arithmetic for.
    """
    given: dict[str, Any] = attributes(node)
    if given.get("block_size"):
        raise ConfigError("it is quantized in blocks")
    names = [n for n in node.input[1:] if n]
    if not all(n in graph.constants for n in names):
        raise ConfigError("its scale or zero point is not a constant")
    scale = graph.floats(names[0]).astype(np.float32)
    if len(names) > 1:
        zero = graph.array(names[1])
    else:
        kind = graph.elem_type(node.input[0]) or onnx.TensorProto.UINT8
        zero = np.zeros(scale.shape, onnx.helper.tensor_dtype_to_np_dtype(kind))
    if zero.dtype.name not in TYPES:
        raise ConfigError(f"codes of type {zero.dtype.name} are not known")
    axis: int | None = given.get("axis", 1)
    if scale.size == 1:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), None
    return QuantParams(QuantSpec(dtype=TYPES[zero.dtype.name], axis=axis), scale, zero.astype(int))
