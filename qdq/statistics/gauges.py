"""Nodes that read tensors inside of the runtime: ends, channel means, a share of the values.

What comes out is small, so a large tensor is neither copied nor kept until the run is over, and
the runtime reduces it with all that its kernels can do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from qdq.calibrate.reading import SAMPLED, STEPS, step_for
from qdq.graph import Graph

__all__ = ["Gauges", "gauges_of"]

_NEVER = 1 << 62  # above the size of any tensor
_OPSET = 18
_SMALL = (
    1 << 13
)  # values; up to here numpy is as fast, and the runtime starts earlier without nodes

Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """What is read of some tensors, and where it is found in what the runtime hands out.

    All ends, means and steps are in one output each, one tensor behind the other: a runtime that
    hands out thousands of small outputs takes long for that.

    Attributes:
        names: of the tensors, those with channels first.
        sizes: how many ends and means each has: one for each channel, or one.
        with_channels: how many of the tensors have channels.
        low: output with the smallest values.
        high: with the largest values.
        mean: with the means of the same values; NaN where one is.
        values: tensor → output with evenly spaced values of it.
        steps: tensor → how many values each of them stands for, where that is known.
        found_steps: output with that of the other tensors of ``values``, in its order; or "".
        added: the nodes and constants that make all that.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    with_channels: int
    low: str
    high: str
    mean: str
    values: Mapping[str, str]
    steps: Mapping[str, int]
    found_steps: str
    added: onnx.GraphProto

    @property
    def outputs(self) -> list[str]:
        """Names of all outputs."""
        ends = (self.low, self.high, self.mean, self.found_steps)
        return [n for n in (*ends, *self.values.values()) if n]


def gauges_of(
    model: onnx.ModelProto, axes: Mapping[str, int | None], counted: frozenset[str]
) -> Gauges:
    """Gauges for tensors of a model, which does not change.

    Args:
        model: below opset 18, whose reductions read otherwise, nothing has a gauge.
        axes: tensor → axis of its channels, if they are wanted.
        counted: tensors of which values are wanted.

    Returns:
        Gauges of the tensors that are float32, and of which the rank and the number of wanted
        channels are known. The others have none, nor have small ones.
    """
    graph = Graph(model)
    build = _Builder(graph)
    sizes: dict[str, int] = {}
    for name, axis in sorted(axes.items(), key=lambda item: item[1] is None):
        shape = graph.shape(name)
        real = graph.elem_type(name) == onnx.TensorProto.FLOAT
        if shape is None or not real or graph.opset < _OPSET or _is_small(shape):
            continue
        size = 1 if axis is None else shape[axis] if shape else None
        if size:  # neither unknown nor 0
            sizes[name] = size
            build.reduce(name, shape, axis)
            if name in counted:
                build.spread(name, shape)
    return Gauges(
        names=tuple(sizes),
        sizes=tuple(sizes.values()),
        with_channels=sum(axes[name] is not None for name in sizes),
        low=build.joined("ReduceMin"),
        high=build.joined("ReduceMax"),
        mean=build.joined("ReduceMean"),
        values=build.values,
        steps=build.steps,
        found_steps=build.joined("Gather"),
        added=build.added,
    )


def _is_small(shape: Shape) -> bool:
    return None not in shape and math.prod(d for d in shape if d is not None) <= _SMALL


class _Builder:
    """Collects nodes, and the constants that they share."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[int, ...], str] = {}
        self._results: dict[str, list[str]] = {}  # operator → what is to be joined
        self._flats: dict[str, str] = {}
        self.values: dict[str, str] = {}
        self.steps: dict[str, int] = {}
        self.added = onnx.GraphProto()

    def reduce(self, name: str, shape: Shape, axis: int | None) -> None:
        """Reduce over all axes but one, or over all values."""
        if axis is None:
            source, others, keep = self._flat(name), [0], 1
        else:
            source, keep = name, 0
            others = [i for i in range(len(shape)) if i != axis % len(shape)]
        for op in ("ReduceMin", "ReduceMax", "ReduceMean"):
            axes = self._constant(*others)
            made = self._node(op, source, axes, keepdims=keep, noop_with_empty_axes=1)
            self._results.setdefault(op, []).append(made)

    def spread(self, name: str, shape: Shape) -> None:
        """Take evenly spaced values."""
        entry = [d for d in shape[1:] if d is not None]
        if None in shape[1:]:
            start = self._step(name)
            self._results.setdefault("Gather", []).append(start)
        else:
            self.steps[name] = step_for(math.prod(entry))
            if self.steps[name] == 1:
                self.values[name] = name
                return
            start = self._constant(self.steps[name])
        begin, end = self._constant(0), self._constant(_NEVER)
        self.values[name] = self._node("Slice", self._flat(name), begin, end, begin, start)

    def joined(self, op: str) -> str:
        """The output with all results of an operator; "" if there are none."""
        parts = self._results.get(op)
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
        if values not in self._constants:
            name = self._constants[values] = self._graph.fresh("gauge_constant")
            array = np.asarray(values, np.int64)
            self.added.initializer.append(onnx.numpy_helper.from_array(array, name))
        return self._constants[values]
