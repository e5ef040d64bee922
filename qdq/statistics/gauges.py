"""Nodes that read tensors inside of the runtime: ends, channel means, a share of the values.

What comes out is small, so a large tensor is neither copied nor kept until the run is over, and
the runtime reduces it with all that its kernels can do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from qdq.calibrate.reading import SAMPLED, STEPS, step_for
from qdq.graph import Graph

__all__ = ["Gauge", "Gauges", "gauges_of"]

_NEVER = 1 << 62  # above the size of any tensor
_OPSET = 18
_REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceMean")

Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Gauge:
    """Names of the outputs that make up the reading of one tensor.

    Attributes:
        low: smallest value, of each channel where there are channels.
        high: largest value.
        mean: of the same values; NaN where one is.
        values: evenly spaced values; "" if none are wanted.
        step: how many values each of them stands for, or the output that says so.
    """

    low: str
    high: str
    mean: str
    values: str
    step: int | str

    @property
    def outputs(self) -> list[str]:
        """All of them."""
        names = [self.low, self.high, self.mean, self.values]
        return [n for n in (*names, self.step) if isinstance(n, str) and n]


class Gauges(NamedTuple):
    """Gauges by tensor, and the nodes and constants that they add to a model."""

    found: Mapping[str, Gauge]
    added: onnx.GraphProto


def gauges_of(
    model: onnx.ModelProto, axes: Mapping[str, int | None], counted: frozenset[str]
) -> Gauges:
    """Gauges for tensors of a model, which does not change.

    Args:
        model: below opset 18, whose reductions read otherwise, nothing has a gauge.
        axes: tensor → axis of its channels, if they are wanted.
        counted: tensors of which values are wanted.

    Returns:
        Gauges of the tensors that are float32 and whose rank is known; the others have none.
    """
    graph = Graph(model)
    if graph.opset < _OPSET:
        return Gauges({}, onnx.GraphProto())
    build = _Builder(graph)
    found: dict[str, Gauge] = {}
    for name, axis in axes.items():
        shape = graph.shape(name)
        if shape is None or graph.elem_type(name) != onnx.TensorProto.FLOAT:
            continue
        low, high, mean = (build.reduced(op, name, shape, axis) for op in _REDUCTIONS)
        values, step = build.spread(name, shape) if name in counted else ("", 1)
        found[name] = Gauge(low, high, mean, values, step)
    return Gauges(found, build.added)


class _Builder:
    """Collects nodes, and the constants that they share."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[int, ...], str] = {}
        self.added = onnx.GraphProto()

    def reduced(self, op: str, name: str, shape: Shape, axis: int | None) -> str:
        """The name of a reduction over all axes, or all but one."""
        if axis is None:
            return self._node(op, name, keepdims=0)
        others = [i for i in range(len(shape)) if i != axis % len(shape)]
        axes = self._constant(*others)
        return self._node(op, name, axes, keepdims=0, noop_with_empty_axes=1)

    def spread(self, name: str, shape: Shape) -> tuple[str, int | str]:
        """The names of evenly spaced values and of how far apart they are, or that number."""
        entry = shape[1:]
        step: int | str = 1
        if None in entry:
            step = start = self._step(name)
        else:
            step = step_for(math.prod(d for d in entry if d is not None))
            if step == 1:
                return name, 1
            start = self._constant(step)
        flat = self._node("Reshape", name, self._constant(-1))
        begin, end = self._constant(0), self._constant(_NEVER)
        return self._node("Slice", flat, begin, end, begin, start), step

    def _step(self, name: str) -> str:
        """``step_for`` where only the runtime knows the shape: the first of STEPS that will do."""
        entry = self._node("ReduceProd", self._node("Shape", name, start=1))
        enough = self._node("LessOrEqual", entry, self._constant(*(s * SAMPLED for s in STEPS)))
        rest = self._node("Mod", entry, self._constant(_NEVER, *STEPS[1:]))
        apart = self._node("Cast", rest, to=onnx.TensorProto.BOOL)
        both = self._node("Cast", self._node("And", enough, apart), to=onnx.TensorProto.INT32)
        return self._node("Gather", self._constant(*STEPS), self._node("ArgMax", both))

    def _node(self, op: str, *inputs: str, **attributes: int) -> str:
        made = self._graph.fresh(f"{inputs[0]}_{op}")
        node = self.added.node.add(op_type=op, input=inputs, output=[made])
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        return made

    def _constant(self, *values: int) -> str:
        if values not in self._constants:
            name = self._constants[values] = self._graph.fresh("gauge_constant")
            array = np.asarray(values, np.int64)
            self.added.initializer.append(onnx.numpy_helper.from_array(array, name))
        return self._constants[values]
