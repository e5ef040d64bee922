"""A float model with a switch at each tensor that may be rounded, so that one session serves all.

Behind a tensor t stands ``If(switch, DequantizeLinear(QuantizeLinear(t)), t)``, and all readers
of t read its result. With every switch off it is the float model, exactly. Weights that may be
rounded are inputs: a run is fed the float or the rounded ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qdq.graph import Graph
from qdq.placement.wholes import softmax_input
from qdq.spec import QuantParams

__all__ = ["Probe", "logits_of", "probe_model"]

# on the way back from an output to the Softmax or Sigmoid that made its values
_PASSED = frozenset({"Cast", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Split",
                     "Squeeze", "Transpose", "Unsqueeze"})  # fmt: skip
_SATURATING = frozenset({"HardSigmoid", "LogSoftmax", "Sigmoid", "Softmax"})


@dataclass(frozen=True, slots=True)
class Probe:
    """The model with switches.

    Attributes:
        model: the model; the switches and the weights are inputs that every run has to feed.
        switches: tensor → name of its switch, a scalar bool.
        logits: tensor → its name behind its switch, for the tensors that ``logits_of`` found.
    """

    model: onnx.ModelProto
    switches: Mapping[str, str]
    logits: Mapping[str, str]


def logits_of(graph: Graph) -> tuple[str, ...]:
    """Tensors whose Softmax or Sigmoid is (a part of) a model output."""
    found: dict[str, None] = {}
    waiting, seen = sorted(graph.outputs), set(graph.outputs)
    while waiting:
        index = graph.producer.get(waiting.pop())
        if index is None:
            continue
        node = graph.nodes[index]
        made_of = node.input[0] if node.op_type in _SATURATING else softmax_input(graph, index)
        if made_of is not None and made_of not in graph.constants:
            found[made_of] = None
        elif node.op_type in _PASSED:
            behind = [n for n in node.input if n and n not in graph.constants and n not in seen]
            seen.update(behind)
            waiting.extend(behind)
    return tuple(n for n in found if graph.elem_type(n) in (0, TensorProto.FLOAT))


def probe_model(
    model: onnx.ModelProto, params: Mapping[str, QuantParams], weights: Iterable[str] = ()
) -> Probe:
    """Put a switch behind every tensor in ``params`` and make inputs of ``weights``.

    Args:
        model: the prepared float model; it is not changed.
        params: activation → its parameters, one scale for the tensor.
        weights: initializers that become inputs.
    """
    return _Builder(model, params).build(frozenset(weights))


class _Builder:
    """Lives for one call of probe_model."""

    def __init__(self, model: onnx.ModelProto, params: Mapping[str, QuantParams]) -> None:
        self.model, self.graph, self.params = model, Graph(model), params
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.switches: dict[str, str] = {}
        self.switched: dict[str, str] = {}  # tensor → what its readers read
        self.raw = {  # outputs keep their name behind the switch, and so do captured tensors
            name: self.graph.fresh(f"{name}_raw") for name in params if self._keeps_name(name)
        }

    def _keeps_name(self, name: str) -> bool:
        made = name in self.graph.producer
        captured = any(use.slot < 0 for use in self.graph.uses(name))
        return made and (name in self.graph.outputs or captured)

    def build(self, weights: frozenset[str]) -> Probe:
        for name in self.graph.inputs:
            self._switch(name)
        for original in self.graph.nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            for slot, name in enumerate(original.input):
                node.input[slot] = self.switched.get(name, name)
            for slot, name in enumerate(original.output):
                node.output[slot] = self.raw.get(name, name)
            self.nodes.append(node)
            for name in original.output:
                self._switch(name)
        result = onnx.ModelProto()
        result.ir_version = self.model.ir_version
        result.opset_import.extend(self.model.opset_import)
        result.functions.extend(self.model.functions)
        graph = result.graph
        graph.name = "probe"
        graph.input.extend([*self.model.graph.input, *self.inputs])
        graph.output.extend(self.model.graph.output)
        graph.node.extend(self.nodes)
        graph.sparse_initializer.extend(self.model.graph.sparse_initializer)
        for tensor in self.model.graph.initializer:
            if tensor.name in weights:
                graph.input.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
            else:
                graph.initializer.append(tensor)
        graph.initializer.extend(self.constants)
        logits = {n: self.switched.get(n, n) for n in logits_of(self.graph)}
        return Probe(model=result, switches=self.switches, logits=logits)

    def _switch(self, name: str) -> None:
        if name not in self.params:
            return
        params, fresh = self.params[name], self.graph.fresh
        source = self.raw.get(name, name)
        result = name if name in self.raw else fresh(f"{name}_switched")
        switch, scale, zero = (fresh(f"{name}_{s}") for s in ("switch", "scale", "zero"))
        codes, rounded, same = (fresh(f"{name}_{s}") for s in ("codes", "rounded", "same"))
        self.inputs.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
        self.constants.append(numpy_helper.from_array(np.asarray(params.scale, np.float32), scale))
        self.constants.append(numpy_helper.from_array(np.asarray(params.zero_point), zero))
        on = (
            helper.make_node("QuantizeLinear", [source, scale, zero], [codes]),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [rounded]),
        )
        off = (helper.make_node("Identity", [source], [same]),)
        self.nodes.append(
            helper.make_node(
                "If",
                [switch],
                [result],
                fresh(f"{name}_if"),
                then_branch=_branch("on", on, rounded),
                else_branch=_branch("off", off, same),
            )
        )
        self.switches[name], self.switched[name] = switch, result


def _branch(name: str, nodes: Iterable[onnx.NodeProto], output: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), name, [], [value])
