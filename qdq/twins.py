"""Tables that a model also multiplies with, transposed: a language model's words, tied to its head.

In the given model both are one matrix. ``prepare`` makes a matrix of its own of what a product
reads, so that its codes can lie as its kernel wants them. Where both stay float, that would be
in the file twice.
"""

from collections.abc import Set
from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdq.graph import Graph
from qdq.weights import is_turned

__all__ = ["turned_back", "turned_twins"]

_LEAST = 1 << 16  # values: as of tables that may become codes
_ROWS = 1 << 10  # rows that are compared at a time; most matrices differ in the first


def turned_twins(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Table from which rows are picked → the constants that are its transpose."""
    matrices: dict[tuple[int, ...], list[str]] = {}
    for name, t in graph.constants.items():
        if _is_large_matrix(t):
            matrices.setdefault(tuple(t.dims), []).append(name)
    picked = {n.input[0] for n in graph.nodes if n.op_type == "Gather"} if matrices else set()
    found = {}
    for dims, names in matrices.items():
        others = matrices.get(dims[::-1], [])
        for table in (n for n in names if n in picked):
            twins = tuple(n for n in others if n != table and _is_twin(graph, table, n))
            if twins:
                found[table] = twins
    return found


def _is_large_matrix(t: onnx.TensorProto) -> bool:
    return t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and prod(t.dims) >= _LEAST


def _is_twin(graph: Graph, table: str, other: str) -> bool:
    if is_turned(graph.constants[table], graph.constants[other]):
        return True
    return _are_equal(graph.floats(table), graph.floats(other).T)


def _are_equal(a: NDArray[np.floating], b: NDArray[np.floating]) -> bool:
    starts = range(0, len(a), _ROWS)
    return all(np.array_equal(a[k : k + _ROWS], b[k : k + _ROWS]) for k in starts)


def turned_back(graph: Graph, read: Set[str]) -> dict[str, onnx.NodeProto]:
    """Constants that need not be in a file → the node that makes them of their float twin.

    onnxruntime computes it once, when it loads the model.

    Args:
        graph: of the float model; has the names.
        read: the constants that are read in float.
    """
    made = {}
    for table, others in turned_twins(graph).items():
        for other in others if table in read and table not in made else ():
            if other in read and other not in graph.outputs:
                label = graph.fresh(f"{other}_Transpose")
                made[other] = helper.make_node("Transpose", [table], [other], label, perm=[1, 0])
    return made
