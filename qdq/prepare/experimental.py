"""Operators that were experimental in opsets 1 to 9, written in those of the standard.

onnxruntime still has kernels for them. Converters from CoreML wrote an ImageScaler in front of
many networks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qdq.facts import DEFAULT
from qdq.graph import Graph, attributes
from qdq.nested import all_graphs

__all__ = ["spell_out_experimental"]

_LAST = 9  # the last opset that had them
_STANDARD = {"MeanVarianceNormalization": 9}  # since then of the standard, with other attributes


def spell_out_experimental(model: onnx.ModelProto, have: int) -> None:
    """Write a model's experimental operators, subgraphs included, in opset 7; changes the model."""
    if have > _LAST:
        return
    graph = Graph(model)
    for own in all_graphs(model.graph):
        made: list[onnx.NodeProto] = []
        for node in own.node:
            known = node.domain not in DEFAULT or have >= _STANDARD.get(node.op_type, have + 1)
            form = None if known else _FORMS.get(node.op_type)
            made += [node] if form is None else _written(graph, node, form)
        del own.node[:]
        own.node.extend(made)


class _Writer:
    """Collects nodes that compute what one node did; the last one has its name and result."""

    def __init__(self, graph: Graph, node: onnx.NodeProto) -> None:
        self.graph, self.node = graph, node
        self.x: str = node.input[0]
        self.made: list[onnx.NodeProto] = []

    def put(self, op: str, *others: str, **attrs: Any) -> None:
        """Let an operator read what there is so far, and the others."""
        name = self.graph.fresh(f"{self.node.output[0]}_{op}")
        self.made.append(helper.make_node(op, [self.x, *others], [name], **attrs))
        self.x = name

    def constant(self, value: Any) -> str:
        name = self.graph.fresh(f"{self.node.output[0]}_constant")
        tensor = onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        self.made.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def affine(self, scale: Any, shift: Any = None) -> None:
        self.put("Mul", self.constant(scale))
        if shift is not None:
            self.put("Add", self.constant(shift))

    def done(self) -> list[onnx.NodeProto]:
        self.made[-1].output[0] = self.node.output[0]
        self.made[-1].name = self.node.name
        return self.made


_Form = Callable[[_Writer, dict[str, Any]], None]


def _written(graph: Graph, node: onnx.NodeProto, form: _Form) -> list[onnx.NodeProto]:
    writer = _Writer(graph, node)
    form(writer, attributes(node))
    return writer.done()


def _affine(w: _Writer, given: dict[str, Any]) -> None:
    w.affine(given.get("alpha", 1.0), given.get("beta", 0.0))


def _crop(w: _Writer, given: dict[str, Any]) -> None:
    left, top, right, bottom = given["border"]
    height, width = given.get("scale", (0, 0))
    ends = [top + height, left + width] if "scale" in given else [-bottom, -right]
    far = np.iinfo(np.int64).max
    w.put("Slice", axes=[2, 3], starts=[top, left], ends=[e or far for e in ends])


def _image_scaler(w: _Writer, given: dict[str, Any]) -> None:
    w.affine(given.get("scale", 1.0), np.reshape(given["bias"], (-1, 1, 1)))


def _mean_variance(w: _Writer, given: dict[str, Any]) -> None:
    axes = [0, 1, 2, 3] if given.get("across_channels", 0) else [0, 2, 3]
    x = w.x
    w.put("ReduceMean", axes=axes)
    mean, w.x = w.x, x
    w.put("Sub", mean)
    if given.get("normalize_variance", 1):
        shifted = w.x
        w.put("Mul", shifted)
        w.put("ReduceMean", axes=axes)
        w.put("Sqrt")
        deviation, w.x = w.x, shifted
        w.put("Div", deviation)


def _between_factors(op: str, w: _Writer, given: dict[str, Any]) -> None:
    w.affine(given["beta"])
    w.put(op)
    w.affine(given["alpha"])


_FORMS: Mapping[str, _Form] = {
    "Affine": _affine,
    "Crop": _crop,
    "ImageScaler": _image_scaler,
    "MeanVarianceNormalization": _mean_variance,
    "ParametricSoftplus": partial(_between_factors, "Softplus"),
    "Scale": lambda w, given: w.affine(given.get("scale", 1.0)),
    "ScaledTanh": partial(_between_factors, "Tanh"),
}
