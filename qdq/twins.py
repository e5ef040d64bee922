"""Tables that a model also multiplies with, transposed: a language model's words, tied to its head.

In the given model both are one matrix. ``prepare`` makes a matrix of its own of what a product
reads, so that its codes can lie as its kernel wants them. Where both stay float, that would be
in the file twice.
"""

from collections.abc import Iterable, Set
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper

from qdq.graph import Graph
from qdq.ops.movement import LEAST_TABLE
from qdq.weights import is_turned

__all__ = ["turned_back", "turned_twins"]

_ROWS = 1 << 10  # rows that are compared at a time; most matrices differ in the first


def turned_twins(
    graph: Graph, tables: Iterable[str], others: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Table → the constants among ``others`` that are its transpose, where there are any."""
    matrices: dict[tuple[int, ...], list[str]] = {}
    for name in others:
        if _is_large_matrix(graph.constants[name]):
            matrices.setdefault(tuple(graph.constants[name].dims), []).append(name)
    found = {}
    for table in tables:
        alike = matrices.get(tuple(graph.constants[table].dims)[::-1], [])
        twins = tuple(n for n in alike if n != table and _is_twin(graph, table, n))
        if twins:
            found[table] = twins
    return found


def _is_large_matrix(t: onnx.TensorProto) -> bool:
    return t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and prod(t.dims) >= LEAST_TABLE


def _is_twin(graph: Graph, table: str, other: str) -> bool:
    if is_turned(graph.constants[table], graph.constants[other]):
        return True
    a, b = graph.floats(table), graph.floats(other).T
    return all(np.array_equal(a[k : k + _ROWS], b[k : k + _ROWS]) for k in range(0, len(a), _ROWS))


def turned_back(graph: Graph, read: Set[str]) -> dict[str, onnx.NodeProto]:
    """Constants that need not be in a file → the node that makes them of their float twin.

    onnxruntime computes it once, when it loads the model.

    Args:
        graph: of the float model; has the names.
        read: the tensors that are read in float.
    """
    picked = dict.fromkeys(n.input[0] for n in graph.nodes if n.op_type == "Gather")
    tables = [name for name in picked if name in read and name in graph.constants]
    others = [name for name in graph.constants if name in read and name not in graph.outputs]
    made: dict[str, onnx.NodeProto] = {}
    for table, twins in turned_twins(graph, tables, others).items():
        for twin in twins if table not in made else ():
            label = graph.fresh(f"{twin}_Transpose")
            made[twin] = helper.make_node("Transpose", [table], [twin], label, perm=[1, 0])
    return made
