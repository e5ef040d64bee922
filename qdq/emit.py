"""Plan + solution → QDQ model.

What the graph looks like around an integer kernel K with input x, weight w, bias b, output y::

    x ─Q─DQ──────────┐
    w_quantized ─DQ──K──(Relu)── y ─Q─DQ── readers
    b_quantized ─DQ──┘

A float tensor that integer nodes read gets Q → DQ beside it, and only those nodes read the DQ. A
tensor that an integer kernel makes is read by everybody through its DQ, since a second reader of
the raw tensor would keep the runtime from fusing the kernel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qdq.absorbed import clamps_to_drop
from qdq.affine import quantize
from qdq.bias_scale import quantize_bias
from qdq.borrowed import import_runtime
from qdq.dynamic import make_dynamic
from qdq.forms import IDENTITY, Follower, Rewrite, in_steps
from qdq.graph import Graph
from qdq.lookups import Lookups
from qdq.lowering import lower_for_pools, lower_to_usual
from qdq.nested import captured_names
from qdq.placement import Unit
from qdq.plan import Plan
from qdq.problem import Derived
from qdq.shell import shell
from qdq.solve import Solution
from qdq.spec import INT8, QuantParams
from qdq.subpixel import Subpixel
from qdq.twins import turned_back
from qdq.upsampling import Writer
from qdq.weights import copy_into
from qdq.wiring import wire

__all__ = ["emit"]


def emit(
    model: onnx.ModelProto,
    plan: Plan,
    solution: Solution,
    *,
    floors: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """Build the QDQ model; ``model`` (prepared, float) is not changed.

    Args:
        model: the prepared float model that the plan was made for.
        plan: what is integer.
        solution: parameters of every planned tensor, and the nodes that the solver left float.
        floors: Softmax → the score that all lower ones can be raised to (``qdq.placement.scores``).
    """
    return _Emitter(model, plan, solution, floors or {}).build()


class _Emitter:
    """Lives for one call of emit: writes nodes and initializers in order."""

    def __init__(
        self, model: onnx.ModelProto, plan: Plan, solution: Solution, floors: Mapping[str, float]
    ) -> None:
        self.model, self.solution, self.plan = model, solution, plan
        self.graph = Graph(model)
        self.wiring = wire(self.graph, plan, solution.floats, floors)
        self.behind = clamps_to_drop(plan, solution.params, self.wiring.made)
        self.lookups = Lookups(self.graph, self.graph.fresh)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dequantized: dict[str, str] = {}  # tensor → the name that carries its DQ's output
        self.stored: dict[tuple[str, Subpixel | None], str] = {}  # the same of constants
        self.scales: dict[tuple[str, int], tuple[str, str]] = {}
        self.signed: dict[str, str] = {}  # the same in int8
        self.raw: dict[str, str] = {}  # tensor → new name of the float tensor before its Q

    def build(self) -> onnx.ModelProto:
        for name in self.graph.inputs:
            self._after(name)
        for node in self.graph.nodes:
            self._node(node)
        read = {name for node in self.nodes for name in node.input}
        read |= {name for node in self.graph.nodes for name in captured_names(node)}
        read |= self.graph.outputs
        turned = turned_back(self.graph, read)
        result = onnx.ModelProto()
        result.CopyFrom(shell(self.model))
        result.graph.node.extend((*turned.values(), *self.nodes))
        import_runtime(result)
        read.difference_update(turned)
        kept = [t for t in self.model.graph.initializer if t.name in read]
        for tensor in (*kept, *self.constants, *self.lookups.constants):
            # extend() would serialize and parse each one
            copy_into(result.graph.initializer.add(), tensor)
        lower_to_usual(result)
        if self.plan.target.tunes_float:
            lower_for_pools(result, self.graph, self.wiring.units)
        return result

    # -- nodes ------------------------------------------------------------------------------

    def _node(self, original: onnx.NodeProto) -> None:
        if original.input and original.input[0] in self.behind:  # the clamp, its only reader
            self._after(original.output[0])
            return
        if original.name in self.wiring.merged:
            return
        node = onnx.NodeProto()
        node.CopyFrom(original)
        unit = self.wiring.units.get(node.name)
        form = self.wiring.subpixel.get(node.name)
        for slot, name in enumerate(original.input):
            node.input[slot] = self._input(unit, slot, name, form)
        for k, name in enumerate(original.output):
            node.output[k] = self._raw_name(self.behind.get(name, name))
        self._prefix(original, node)
        if unit is not None and form is not None:
            self._upsampling(original, node, unit, form)
        elif node.name in self.wiring.lookups:
            self.nodes += self.lookups.written(node)
        else:
            steps = self.wiring.split.get(node.name, ())
            nodes, constants = in_steps(node, steps, self.graph.fresh)
            self.nodes += nodes
            self.constants += constants
            self._form(original, node)
        for name in original.output:
            self._after(name)

    def _prefix(self, original: onnx.NodeProto, node: onnx.NodeProto) -> None:
        """Write what belongs in front of a node: an identity, or what raises scores to a floor."""
        source, name = node.input[0] if node.input else "", original.name
        if name in self.wiring.shielded:
            node.input[0] = self.graph.fresh(f"{original.input[0]}_unmoved")
            label = f"{name}_stays_in_front"
            self._write(IDENTITY.op_type, [source], node.input[0], label, alpha=IDENTITY.alpha)
        if name in self.wiring.floors:
            low = self.graph.fresh(f"{name}_floor")
            node.input[0] = self.graph.fresh(f"{original.input[0]}_clipped")
            self._initializer(low, np.array(self.wiring.floors[name], np.float32))
            self._write("Clip", [source, low], node.input[0], f"{name}_Clip")

    def _form(self, original: onnx.NodeProto, node: onnx.NodeProto) -> None:
        """Write a node as another operator, or one behind it, where that is planned."""
        if node.name in self.wiring.dynamic:
            self.constants += make_dynamic(node, self.graph)
        if node.name in self.wiring.rewritten:
            _rewrite(node, self.wiring.rewritten[node.name])
        if node.name in self.wiring.followed:
            self._follow(original, node, self.wiring.followed[node.name])

    def _upsampling(
        self, original: onnx.NodeProto, node: onnx.NodeProto, unit: Unit, form: Subpixel
    ) -> None:
        """Write movements, behind a convolution if the node is one."""
        tensor = unit.outputs[0]
        codes = self._params(tensor, self.solution.params[tensor])
        writer = Writer(node, codes, self.graph.fresh)
        writer.write(form, self.graph.shape(original.input[0]))
        self.nodes += writer.nodes
        self.constants += writer.constants

    def _input(self, unit: Unit | None, slot: int, name: str, form: Subpixel | None) -> str:
        if unit is not None and slot == 1 and unit.view.name in self.plan.signed:
            return self._signed(name)
        if name in self.wiring.made:
            return self.dequantized[name]
        if unit is None:
            return name
        if name in unit.reads:
            return self.dequantized[name]
        demand = unit.demand
        if demand is None or name not in self.graph.constants:
            return name
        if slot in demand.activations or slot == demand.bias:
            return self._constant(name, form)
        if demand.weight is not None and slot == demand.weight.slot:
            return self._constant(name, form)
        return name

    def _follow(self, original: onnx.NodeProto, node: onnx.NodeProto, follower: Follower) -> None:
        """Put another node between a node and its readers."""
        inner = self.graph.fresh(f"{original.output[0]}_{follower.before}")
        outer = node.output[0]
        node.output[0] = inner
        label = f"{original.name}_{follower.label}"
        self._write(follower.op_type, [inner], outer, label, alpha=follower.alpha)

    def _write(
        self, op_type: str, inputs: Sequence[str], output: str, label: str, **attributes: Any
    ) -> None:
        """Write a node, named by the label or what is free next to it; None is no attribute."""
        name = self.graph.fresh(label)
        self.nodes.append(helper.make_node(op_type, inputs, [output], name, **attributes))

    # -- activations ------------------------------------------------------------------------

    def _raw_name(self, name: str) -> str:
        """The name of the float tensor before its Q.

        Outputs of the graph, and names that subgraphs capture, must mean the dequantized tensor;
        all others keep their name.
        """
        if name not in self.wiring.made:
            return name
        captured = any(use.slot < 0 for use in self.graph.uses(name))
        if name in self.graph.outputs or captured:
            self.raw[name] = self.graph.fresh(f"{name}_float")
        return self.raw.get(name, name)

    def _after(self, name: str) -> None:
        """Q and DQ behind a tensor, where it has codes."""
        if name not in self.wiring.made and name not in self.wiring.read:
            return
        params = self.solution.params[name]
        raw = self.raw.get(name, name)
        codes = self.graph.fresh(f"{name}_QuantizeLinear_Output")
        real = name if raw != name else self.graph.fresh(f"{name}_DequantizeLinear_Output")
        scale, zero = self._params(name, params)
        self._write("QuantizeLinear", [raw, scale, zero], codes, f"{name}_QuantizeLinear")
        self._write("DequantizeLinear", [codes, scale, zero], real, f"{name}_DequantizeLinear")
        self.dequantized[name] = real

    def _signed(self, name: str) -> str:
        """The DQ of a tensor in int8, made once; the values are the same.

        onnxruntime makes uint8 of int8 wherever a DQ follows right behind the Q, so there is a
        Reshape between, which changes nothing and takes no time.
        """
        if name in self.signed:
            return self.signed[name]
        params = self.solution.params[name]
        scale, _ = self._params(name, params)
        zero = self.graph.fresh(f"{name}_signed_zero_point")
        shape = self.graph.fresh(f"{name}_signed_shape")
        self._initializer(zero, (params.zero_point.astype(np.int16) + INT8.min).astype(np.int8))
        self._initializer(shape, np.zeros(len(self.graph.shape(name) or ()), np.int64))
        last = self.dequantized[name]
        for op_type, more in (
            ("QuantizeLinear", (scale, zero)),
            ("Reshape", (shape,)),
            ("DequantizeLinear", (scale, zero)),
        ):
            label = f"{name}_signed_{op_type}"
            made = self.graph.fresh(f"{label}_Output")
            self._write(op_type, [last, *more], made, label)
            last = made
        self.signed[name] = last
        return last

    # -- constants --------------------------------------------------------------------------

    def _constant(self, name: str, form: Subpixel | None = None) -> str:
        """The DQ of a constant, made once; in another form for a subpixel unit."""
        if (name, form) in self.stored:
            return self.stored[name, form]
        params = self.solution.params[name]
        plan = self.plan.tensors[name]
        value = self.solution.constants.get(name)
        if value is None:
            value = self.graph.floats(name)
        derived = isinstance(plan.source, Derived)
        codes = quantize_bias(value, params) if derived else quantize(value, params)
        if form is not None:
            codes, params = _in_form(form, codes, params)
        stored = self.graph.fresh(f"{name}_quantized")
        self._initializer(stored, codes)
        scale, zero = self._params(name, params)
        real = self.graph.fresh(f"{name}_DequantizeLinear_Output")
        label, axis = f"{name}_DequantizeLinear", params.spec.axis
        self._write("DequantizeLinear", [stored, scale, zero], real, label, axis=axis)
        self.stored[name, form] = real
        return real

    def _params(self, name: str, params: QuantParams) -> tuple[str, str]:
        """Scale and zero point of a tensor, made once in each form."""
        key = (name, params.scale.size)
        if key not in self.scales:
            scale, zero = self.graph.fresh(f"{name}_scale"), self.graph.fresh(f"{name}_zero_point")
            self._initializer(scale, params.scale)
            self._initializer(zero, params.zero_point)
            self.scales[key] = scale, zero
        return self.scales[key]

    def _initializer(self, name: str, value: NDArray[np.generic]) -> None:
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))


def _in_form(
    form: Subpixel, codes: NDArray[np.integer], params: QuantParams
) -> tuple[NDArray[np.integer], QuantParams]:
    """Codes and parameters of a weight or bias of a ConvTranspose, for the plain convolution."""
    spec = params.spec if params.spec.axis is None else replace(params.spec, axis=0)
    scale = form.tiled(params.scale) if params.scale.ndim else params.scale
    zero = form.tiled(params.zero_point) if params.zero_point.ndim else params.zero_point
    laid = form.tiled(codes) if codes.ndim == 1 else form.weight(codes, params.zero_point)
    return laid, QuantParams(spec, scale, zero)


def _rewrite(node: onnx.NodeProto, rewrite: Rewrite) -> None:
    """Make it another operator, in place."""
    node.op_type, node.domain = rewrite.op_type, rewrite.domain
    if rewrite.slots is not None:
        kept = [node.input[slot] for slot in rewrite.slots]
        del node.input[:]
        node.input.extend(kept)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in rewrite.attributes.items())
