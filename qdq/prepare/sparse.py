"""Sparse constants made dense, as the runtime makes them when it loads a model."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qdq.nested import all_graphs

__all__ = ["dense_constants"]


def dense_constants(model: onnx.ModelProto) -> None:
    """Sparse initializers, and Constant nodes with sparse values, become ordinary ones.

    Before the opset is raised: the converter knows none.
    """
    for graph in all_graphs(model.graph):
        graph.initializer.extend(_dense(t, t.values.name) for t in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        for a in (a for n in graph.node if n.op_type == "Constant" for a in n.attribute):
            if a.type == onnx.AttributeProto.SPARSE_TENSOR:
                a.CopyFrom(helper.make_attribute("value", _dense(a.sparse_tensor, "")))


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    """All values of a sparse tensor, zeros included.

    The index of a value is one number, into the values in order, or has one number per axis.
    """
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 2:
        array[tuple(places.T)] = values
    else:
        array.reshape(-1)[places] = values
    return numpy_helper.from_array(array, name)
