"""The way back through elementwise nodes and reductions (the chain rule).

A rule takes the gradients of a node's outputs and writes those of its inputs. Rounding noise is
small, so what it does to an output is its gradient times it; kinks have the slope of one side.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from qdq.graph import attributes
from qdq.placement.tape import Tape, UnknownWayError

__all__ = ["RULES", "Grads", "Rule", "one", "rule", "sigmoid_slope", "tanh_slope"]

Grads = Sequence[str | None]
Rule = Callable[[Tape, onnx.NodeProto, Grads], Mapping[int, str]]
RULES: dict[str, Rule] = {}  #: operator → writes the gradients of its inputs, slot → name

_STEP = 2.0**-7  # of the difference quotient


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def one(grads: Grads) -> str:
    """The gradient of a node's first output, the only one that has one."""
    first = grads[0] if grads else None
    if first is None or any(g is not None for g in grads[1:]):
        raise UnknownWayError("a later output leads on")
    return first


@rule("Identity", "Dropout", "Cast", "CastLike")
def _same(_tape: Tape, _node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: one(grads)}


@rule("Neg")
def _neg(tape: Tape, _node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.node("Neg", one(grads))}


@rule("Relu")
def _relu(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    on = tape.node("Greater", node.output[0], tape.real(0))
    return {0: tape.masked(on, one(grads))}


@rule("LeakyRelu", "PRelu")
def _leaky(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    slope = node.input[1] if len(node.input) > 1 else ""
    if not slope:
        alpha = attributes(node).get("alpha", 0.01)
        slope = tape.real(float(alpha))  # type: ignore[arg-type]
    on = tape.node("Greater", node.input[0], tape.real(0))
    more = tape.masked(on, tape.node("Sub", tape.real(1), slope))
    return {0: tape.times(one(grads), tape.node("Add", slope, more))}


@rule("Clip")
def _clip(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    bounds = [*node.input, "", ""][1:3]
    return {0: _between(tape, node.output[0], bounds, one(grads))}


def _between(tape: Tape, value: str, bounds: Sequence[str], grad: str) -> str:
    """The gradient where a value is above the first bound and below the second; "" is none."""
    tests = zip(("Greater", "Less"), bounds, strict=True)
    masks = [tape.node(test, value, bound) for test, bound in tests if bound]
    if not masks:
        return grad
    return tape.masked(masks[0] if len(masks) == 1 else tape.node("And", *masks), grad)


@rule("HardSigmoid")
def _hard_sigmoid(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    alpha = float(attributes(node).get("alpha", 0.2))  # type: ignore[arg-type]
    result = tape.times(one(grads), tape.real(alpha))
    return {0: _between(tape, node.output[0], (tape.real(0), tape.real(1)), result)}


@rule("Sigmoid")
def _sigmoid(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.times(one(grads), sigmoid_slope(tape, node.output[0]))}


def sigmoid_slope(tape: Tape, y: str) -> str:
    """The slope of a Sigmoid, from its values."""
    return tape.node("Sub", y, tape.times(y, y))


@rule("Tanh")
def _tanh(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.times(one(grads), tanh_slope(tape, node.output[0]))}


def tanh_slope(tape: Tape, y: str) -> str:
    """The slope of a Tanh, from its values."""
    return tape.node("Sub", tape.real(1), tape.times(y, y))


@rule("Exp")
def _exp(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.times(one(grads), node.output[0])}


@rule("Log")
def _log(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.times(one(grads), tape.inverse(node.input[0]))}


@rule("Sqrt")
def _sqrt(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    half = tape.times(one(grads), tape.real(0.5))
    return {0: tape.times(half, tape.inverse(node.output[0]))}


@rule("Reciprocal")
def _reciprocal(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    y = node.output[0]
    return {0: tape.times(one(grads), tape.node("Neg", tape.times(y, y)))}


@rule("Abs")
def _abs(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.times(one(grads), tape.node("Sign", node.input[0]))}


@rule("Pow")
def _pow(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    base, exponent = node.input
    if exponent not in tape.graph.constants or exponent in tape.live:
        raise UnknownWayError("a power that is computed")
    p = tape.graph.array(exponent).astype(np.float32)
    if p.size != 1:
        raise UnknownWayError("several powers")
    value = float(p.reshape(()))
    if value < 1:  # the slope at 0 is not finite, but what a Relu cuts off must not become NaN
        power = tape.times(node.output[0], tape.inverse(base))
    else:
        power = tape.node("Pow", base, tape.real(value - 1))
    return {0: tape.times(one(grads), tape.times(tape.real(value), power))}


@rule("Asinh", "Atan", "Celu", "Cos", "Cosh", "Elu", "Erf", "Gelu", "HardSwish", "Mish", "Selu",
      "Shrink", "Sin", "Sinh", "Softplus", "Softsign", "Swish", "ThresholdedRelu")  # fmt: skip
def _smooth(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """Any function of single elements, by its difference quotient."""
    kept = attributes(node)
    around = [
        tape.node(node.op_type, tape.node(op, node.input[0], tape.real(_STEP)), **kept)
        for op in ("Add", "Sub")
    ]
    rise = tape.times(tape.node("Sub", *around), tape.real(1 / (2 * _STEP)))
    return {0: tape.times(one(grads), rise)}


@rule("Add", "Sum")
def _add(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    made = node.output[0]
    return {
        k: tape.summed(one(grads), name, made)
        for k, name in enumerate(node.input)
        if name in tape.live
    }


@rule("Mean")
def _mean(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    share = tape.times(one(grads), tape.real(1 / len(node.input)))
    return _add(tape, node, [share])


@rule("Sub")
def _sub(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    found = dict(_add(tape, node, grads))
    if 1 in found:
        found[1] = tape.node("Neg", found[1])
    return found


@rule("Mul")
def _mul(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {
        k: tape.summed(tape.times(one(grads), node.input[1 - k]), name, node.output[0])
        for k, name in enumerate(node.input)
        if name in tape.live
    }


@rule("Div")
def _div(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    a, b = node.input
    found, over = {}, tape.times(one(grads), tape.inverse(b))
    if a in tape.live:
        found[0] = tape.summed(over, a, node.output[0])
    if b in tape.live:
        down = tape.node("Neg", tape.times(over, node.output[0]))
        found[1] = tape.summed(down, b, node.output[0])
    return found


@rule("Max", "Min")
def _extreme(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    made, found = node.output[0], {}
    for k, name in enumerate(node.input):
        if name in tape.live:
            chosen = tape.masked(tape.node("Equal", name, made), one(grads))
            found[k] = tape.summed(chosen, name, made)
    return found


@rule("Where")
def _where(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    mask, found = node.input[0], {}
    for slot in (1, 2):
        if node.input[slot] in tape.live:
            on = mask if slot == 1 else tape.node("Not", mask)
            grad = tape.masked(on, one(grads))
            found[slot] = tape.summed(grad, node.input[slot], node.output[0])
    return found


def _kept(tape: Tape, node: onnx.NodeProto) -> str:
    """The result of a reduction with its reduced axes kept, as size 1."""
    kept = attributes(node)
    if kept.get("keepdims", 1):
        return str(node.output[0])
    return tape.node(node.op_type, *node.input, **{**kept, "keepdims": 1})


def _beside(tape: Tape, grads: Grads, whole: str) -> str:
    return tape.node("Reshape", one(grads), tape.node("Shape", whole))


@rule("ReduceSum", "ReduceMean")
def _reduce_sum(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, whole = node.input[0], _kept(tape, node)
    grad = _beside(tape, grads, whole)
    if node.op_type == "ReduceMean":
        sizes = [tape.node("Cast", tape.node("Size", n), to=1) for n in (whole, x)]
        grad = tape.times(grad, tape.node("Div", *sizes))
    return {0: tape.node("Expand", grad, tape.shape(x))}


@rule("ReduceMax", "ReduceMin")
def _reduce_extreme(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    whole = _kept(tape, node)
    grad = _beside(tape, grads, whole)
    return {0: tape.masked(tape.node("Equal", node.input[0], whole), grad)}


@rule("GlobalMaxPool")
def _global_max(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.masked(tape.node("Equal", node.input[0], node.output[0]), one(grads))}


@rule("ReduceL1")
def _reduce_l1(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    grad = _beside(tape, grads, _kept(tape, node))
    return {0: tape.times(tape.node("Sign", node.input[0]), grad)}


@rule("ReduceLogSumExp")
def _reduce_log_sum_exp(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    # of a row that is -inf everywhere nothing has a share: -inf - -inf would be NaN
    whole = tape.node("Max", _kept(tape, node), tape.real(float(np.finfo(np.float32).min)))
    share = tape.node("Exp", tape.node("Sub", node.input[0], whole))
    return {0: tape.times(share, _beside(tape, grads, whole))}


@rule("ReduceL2")
def _reduce_l2(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    whole = _kept(tape, node)
    grad = tape.times(_beside(tape, grads, whole), tape.inverse(whole))
    return {0: tape.times(node.input[0], grad)}


@rule("ReduceSumSquare")
def _reduce_squares(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    grad = tape.times(_beside(tape, grads, _kept(tape, node)), tape.real(2))
    return {0: tape.times(node.input[0], grad)}
