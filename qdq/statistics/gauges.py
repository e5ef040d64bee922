"""Nodes that read tensors inside of the runtime: ends, means, peaks of rows, some of the values.

What comes out is small, so a large tensor is neither copied nor kept until the run is over, and
the runtime reduces it with all that its kernels can do.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qdq.calibrate.peaks import DENORMAL
from qdq.calibrate.reading import SAMPLED, STEPS, step_for
from qdq.graph import Graph

__all__ = ["Gauges", "gauges_of"]

_NEVER = 1 << 62  # above the size of any tensor
_OPSET = 18
_SMALL = 1 << 9
"""Values; up to here numpy is as fast, and the runtime starts earlier without nodes. Measured with
two threads, of which only one can be in Python."""
_MANY = 1 << 9
"""Tensors; with more of them the nodes count for more: to open a graph takes the square of them."""
_SMALL_OF_MANY = 1 << 13
_WIDEST = 4 * _MANY
"""Inputs of one Concat, whose time is their square; the fewer there are of these the better, since
they take from the runtime its order."""

_ENDS = ("ReduceMin", "ReduceMax", "ReduceMean")

Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What is read of some tensors, and where it is found in what the runtime hands out.

    All numbers are in one output, so that the runtime reads each tensor as soon as it is made,
    while the caches have it, and lets go of it: its order comes from walking back from the last
    node, the node that was added last first. With an output for each kind of reading it runs the
    whole model first, and keeps all that is to be read until then.

    Attributes:
        names: of the tensors, those with channels first.
        sizes: how many ends and means each has: one for each channel, or one.
        with_channels: how many of the tensors have channels.
        readings: output with all smallest values, all largest ones, all means (NaN where a value
            is), one tensor behind the other; then all lowest and highest peaks and all shares of
            ``peaked``; and then evenly spaced values of those in ``counted``.
        peaked: the tensors of whose rows there are peaks (``qdq.calibrate.peaks``).
        counted: the tensors of which there are values, in their order.
        lengths: output with the number of these values, by tensor; or "".
        steps: tensor → how many values each of them stands for, where that is known.
        found_steps: output with that of the other tensors of ``counted``, in its order; or "".
        added: the nodes and constants that make all that.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    with_channels: int
    readings: str
    peaked: tuple[str, ...]
    counted: tuple[str, ...]
    lengths: str
    steps: Mapping[str, int]
    found_steps: str
    added: onnx.GraphProto

    @property
    def outputs(self) -> list[str]:
        """Names of all outputs."""
        return [n for n in (self.readings, self.lengths, self.found_steps) if n]


def gauges_of(
    model: onnx.ModelProto,
    axes: Mapping[str, int | None],
    counted: frozenset[str],
    peaked: Iterable[str] = (),
) -> Gauges:
    """Gauges for tensors of a model, which does not change.

    Args:
        model: below opset 18, whose reductions read otherwise, nothing has a gauge.
        axes: tensor → axis of its channels, if they are wanted.
        counted: tensors of which values are wanted.
        peaked: tensors of float32 of which the peaks of rows are wanted.

    Returns:
        Gauges of the tensors that are float32, and of which the rank and the number of wanted
        channels are known. The others have none, nor have small ones. Peaks are there of
        all of ``peaked``, but of none in an old opset.
    """
    graph = Graph(model)
    sizes = _sizes(graph, axes)
    rows = tuple(peaked) if graph.opset >= _OPSET else ()
    build = _Builder(graph)
    build.add({name: axes[name] for name in sizes}, counted, frozenset(rows))
    values = tuple(n for n in sizes if n in counted)
    found_steps, lengths = build.joined_steps(values), build.lengths(values)
    readings = build.readings(tuple(sizes), rows, values)  # the last one: its order counts
    return Gauges(
        names=tuple(sizes),
        sizes=tuple(sizes.values()),
        with_channels=sum(axes[name] is not None for name in sizes),
        readings=readings,
        peaked=rows,
        counted=values,
        lengths=lengths,
        found_steps=found_steps,
        steps=build.steps,
        added=build.added,
    )


def _sizes(graph: Graph, axes: Mapping[str, int | None]) -> dict[str, int]:
    """Tensors that have a gauge, those with channels first, and how many ends each has."""
    small = _SMALL if len(axes) <= _MANY else _SMALL_OF_MANY
    return {
        name: size
        for name, axis in sorted(axes.items(), key=lambda item: item[1] is None)
        if (size := _size(graph, name, axis, small))
    }


def _size(graph: Graph, name: str, axis: int | None, small: int) -> int | None:
    """How many ends a gauge of the tensor has; neither None nor 0 where there can be one.

    ``small``: up to so many values it has none.
    """
    shape = graph.shape(name)
    real = graph.elem_type(name) == onnx.TensorProto.FLOAT
    if shape is None or not real or graph.opset < _OPSET:
        return None
    if None not in shape and math.prod(d for d in shape if d is not None) <= small:
        return None
    return 1 if axis is None else shape[axis] if shape else None


class _Builder:
    """Collects nodes, and the constants that they share."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[str, bytes], str] = {}
        self._flats: dict[str, str] = {}
        self._ends: dict[str, dict[str, str]] = {op: {} for op in _ENDS}
        self._peaks: dict[str, tuple[str, str, str]] = {}
        self._values: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self._found_steps: dict[str, str] = {}
        self.added = onnx.GraphProto()

    def add(
        self, axes: Mapping[str, int | None], counted: frozenset[str], peaked: frozenset[str]
    ) -> None:
        """Add what reads ends (of those in ``axes``), values (if also in ``counted``), peaks."""
        made = self._graph.producer
        # what is added last is run first, so the last tensors come first
        for name in sorted(peaked | axes.keys(), key=lambda n: (made.get(n, -1), n), reverse=True):
            shape = self._graph.shape(name) or ()
            if name in axes:
                self.reduce(name, shape, axes[name])
            if name in axes and name in counted:
                self.spread(name, shape)
            if name in peaked:
                self.peaks(name)

    def reduce(self, name: str, shape: Shape, axis: int | None) -> None:
        """Reduce over all axes but one, or over all values."""
        if axis is None:
            source, others, keep = self._flat(name), [0], 1
        else:
            source, keep = name, 0
            others = [i for i in range(len(shape)) if i != axis % len(shape)]
        axes = self._constant(*others)
        for op in _ENDS:
            made = self._node(op, source, axes, keepdims=keep, noop_with_empty_axes=1)
            self._ends[op][name] = made

    def spread(self, name: str, shape: Shape) -> None:
        """Take evenly spaced values."""
        entry = [d for d in shape[1:] if d is not None]
        if None in shape[1:]:
            start = self._found_steps[name] = self._step(name)
        else:
            self.steps[name] = step_for(math.prod(entry))
            if self.steps[name] == 1:
                self._values[name] = self._flat(name)
                return
            start = self._constant(self.steps[name])
        begin, end = self._constant(0), self._constant(_NEVER)
        self._values[name] = self._node("Slice", self._flat(name), begin, end, begin, start)

    def peaks(self, name: str) -> None:
        """Take the largest score of each row; and ask how far below it the smallest one is."""
        last, all_axes = self._constant(-1), self._constant(0)
        tops, bottoms = (
            self._flat(self._node(op, name, last, keepdims=0)) for op in ("ReduceMax", "ReduceMin")
        )
        deep = self._node(
            "Less", bottoms, self._node("Sub", tops, self._shared(np.array([DENORMAL], np.float32)))
        )
        flags = self._node("Cast", deep, to=onnx.TensorProto.FLOAT)
        self._peaks[name] = (
            self._node("ReduceMin", tops, all_axes, keepdims=1),
            self._node("ReduceMax", tops, all_axes, keepdims=1),
            self._node("ReduceMean", flags, all_axes, keepdims=1),
        )

    def readings(self, names: Sequence[str], peaked: Sequence[str], counted: Sequence[str]) -> str:
        """The output with everything; "" if there is nothing."""
        ends = [found[name] for found in self._ends.values() for name in names]
        peaks = [self._peaks[name][k] for k in range(3) for name in peaked]
        return self._joined([*ends, *peaks, *(self._values[name] for name in counted)])

    def lengths(self, counted: Sequence[str]) -> str:
        """The output with the numbers of values."""
        return self._joined([self._node("Shape", self._values[name]) for name in counted])

    def joined_steps(self, counted: Sequence[str]) -> str:
        """The output with the steps that only the runtime knows."""
        return self._joined([self._found_steps[n] for n in counted if n in self._found_steps])

    def _joined(self, parts: Sequence[str]) -> str:
        while len(parts) > _WIDEST:
            parts = [
                self._node("Concat", *parts[k : k + _WIDEST], axis=0)
                for k in range(0, len(parts), _WIDEST)
            ]
        return self._node("Concat", *parts, axis=0) if parts else ""

    def _step(self, name: str) -> str:
        """``step_for`` where only the runtime knows the shape: the first of STEPS that will do."""
        entry = self._node("ReduceProd", self._node("Shape", name, start=1))
        enough = self._node("LessOrEqual", entry, self._constant(*(s * SAMPLED for s in STEPS)))
        rest = self._node("Mod", entry, self._constant(_NEVER, *STEPS[1:]))
        apart = self._node("Cast", rest, to=onnx.TensorProto.BOOL)
        both = self._node("Cast", self._node("And", enough, apart), to=onnx.TensorProto.INT32)
        return self._node("Gather", self._constant(*STEPS), self._node("ArgMax", both))

    def _flat(self, name: str) -> str:
        if name not in self._flats:
            self._flats[name] = self._node("Reshape", name, self._constant(-1))
        return self._flats[name]

    def _node(self, op: str, *inputs: str, **attributes: int) -> str:
        made = self._graph.fresh(f"{inputs[0]}_{op}")
        node = self.added.node.add(op_type=op, input=inputs, output=[made])
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        return made

    def _constant(self, *values: int) -> str:
        return self._shared(np.array(values, np.int64))

    def _shared(self, value: NDArray[Any]) -> str:
        key = value.dtype.str, value.tobytes()
        if key not in self._constants:
            name = self._constants[key] = self._graph.fresh("gauge_constant")
            self.added.initializer.append(onnx.numpy_helper.from_array(value, name))
        return self._constants[key]
