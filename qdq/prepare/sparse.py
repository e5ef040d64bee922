"""Sparse constants made dense, as the runtime makes them when it loads a model."""

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["dense", "dense_constants"]


def dense_constants(model: onnx.ModelProto) -> None:
    """Sparse initializers become ordinary ones; those of subgraphs stay as they are."""
    graph = model.graph
    graph.initializer.extend(dense(t, t.values.name) for t in graph.sparse_initializer)
    del graph.sparse_initializer[:]


def dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
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
