"""Nodes for the way back through a graph, written one after the other."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.facts import RUNTIME
from qdq.graph import Graph

__all__ = ["Tape", "UnknownWayError"]

_SHARED_BELOW = 64  # elements; equal constants of up to this size are one


class UnknownWayError(Exception):
    """There is no rule for the way back through a node as it is."""


class Tape:
    """Writes nodes and constants beside a graph; each value has a fresh name.

    Args:
        graph: the forward graph.
        live: tensors whose gradient is wanted, or that a wanted one leads to.

    Attributes:
        graph: the forward graph.
        live: tensors whose gradient is wanted, or that a wanted one leads to.
        added: what was written.
    """

    def __init__(self, graph: Graph, live: Iterable[str]) -> None:
        self.graph = graph
        self.live: frozenset[str] = frozenset(live)
        self.added: onnx.GraphProto = onnx.GraphProto()
        self._count = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Write a node with one output and return the output's name."""
        return self.nodes(op, inputs, 1, **attributes)[0]

    def nodes(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Write a node and return its outputs' names."""
        name = self._fresh(f"_{op}")
        made = [self._fresh() for _ in range(outputs)]
        self.added.node.append(helper.make_node(op, list(inputs), made, name=name, **attributes))
        return made

    def _fresh(self, end: str = "") -> str:
        self._count += 1  # a number of its own: to look for a free one takes long in a large graph
        return self.graph.fresh(f"back_{self._count}{end}")

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """The name of a constant."""
        array = np.asarray(value, order="C")
        small = array.size <= _SHARED_BELOW
        key = (array.dtype.str, array.shape, array.tobytes() if small else b"")
        if small and key in self._known:
            return self._known[key]
        name = self._fresh()
        self.added.initializer.append(numpy_helper.from_array(array, name))
        if small:
            self._known[key] = name
        return name

    def real(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.float32(value))

    def whole(self, *values: int) -> str:
        """A list of int64."""
        return self.constant(np.array(values, np.int64))

    def rank(self, name: str) -> int:
        """The number of dimensions of a forward tensor.

        Raises:
            UnknownWayError: it is not known.
        """
        return len(self.dims(name))

    def dims(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a forward tensor; None for those that are open.

        Raises:
            UnknownWayError: not even their number is known.
        """
        shape = self.graph.shape(name)
        if shape is None:
            raise UnknownWayError(f"rank of '{name}'")
        return shape

    def shape(self, name: str) -> str:
        """The shape of a forward tensor: a constant where all its sizes are known."""
        shape = self.graph.shape(name)
        known = [d for d in shape or () if d is not None]
        if shape is not None and len(known) == len(shape):
            return self.whole(*known)
        return self.node("Shape", name)

    def sizes(self, name: str, first: int, last: int) -> str:
        """A part of the shape of a forward tensor."""
        return self.node("Slice", self.shape(name), self.whole(first), self.whole(last))

    def size(self, name: str) -> str:
        """The number of elements of a forward tensor, a scalar int64."""
        return self.node("ReduceProd", self.shape(name), keepdims=0)

    def flat(self, value: str) -> str:
        """All elements in one dimension."""
        return self.node("Reshape", value, self.whole(-1))

    def reshaped(self, value: str, like: str) -> str:
        """The elements in the shape of a forward tensor."""
        return self.node("Reshape", value, self.shape(like))

    def times(self, a: str, b: str) -> str:
        """The product."""
        return self.node("Mul", a, b)

    def finite(self, name: str) -> str:
        """Whether each element of a forward tensor is a finite number."""
        return self.node("Equal", self.node("Sub", name, name), self.real(0))

    def where(self, mask: str, value: str) -> str:
        """The value where the mask is true, 0 elsewhere."""
        return self.node("Where", mask, value, self.real(0))

    def masked(self, mask: str, value: str) -> str:
        """As ``where``, ten times as fast; where the mask is false the value has to be finite."""
        return self.times(value, self.node("Cast", mask, to=1))

    def product(self, left: str, right: str, **turns: int) -> str:
        """The product of matrices, either of them turned (``transA``, ``transB``).

        The runtime's own operator reads them so, where a Transpose would write them first.
        """
        return self.node("FusedMatMul", left, right, domain=RUNTIME, **turns)

    def inverse(self, value: str) -> str:
        """1 / value, and 0 where that is not a number."""
        some = self.node("Greater", self.node("Abs", value), self.real(1e-30))
        safe = self.node("Where", some, value, self.real(1))
        return self.where(some, self.node("Reciprocal", safe))

    def summed(self, value: str, like: str, of: str, *, batch_only: bool = False) -> str:
        """What was broadcast from ``like`` to ``of``, added up again.

        Args:
            value: in the shape of the forward tensor ``of``.
            like: a forward tensor.
            of: made of it by broadcasting.
            batch_only: but for the last two dimensions, which are those of matrices.
        """
        small, large = self.dims(like), self.dims(of)
        full = (1,) * (len(large) - len(small)) + small
        last = len(large) - (2 if batch_only else 0)
        axes = [k for k in range(last) if full[k] == 1 and large[k] != 1]
        if axes:
            value = self.node("ReduceSum", value, self.whole(*axes), keepdims=1)
        return self.reshaped(value, like) if len(small) != len(large) else value

    def zeros(self, like: str) -> str:
        """0 in the shape of a forward tensor."""
        return self.node("Expand", self.real(0), self.shape(like))

    def scattered(self, like: str, places: str, values: str) -> str:
        """Values added up at places (flat indices) of a forward tensor."""
        size = self.node("Reshape", self.size(like), self.whole(1))
        found = [self.node("Expand", self.real(0), size), self.flat(places), self.flat(values)]
        total = self.node("ScatterElements", *found, axis=0, reduction="add")
        return self.reshaped(total, like)

    def numbered(self, name: str) -> str:
        """0, 1, 2, … in the shape of a forward tensor."""
        ends = (self.constant(np.int64(0)), self.size(name), self.constant(np.int64(1)))
        return self.reshaped(self.node("Range", *ends), name)
