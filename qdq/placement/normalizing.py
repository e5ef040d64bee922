"""The way back through normalizations: softmax, norms, and attention, which is made of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from qdq.graph import attributes
from qdq.placement.gradients import Grads, one, rule
from qdq.placement.tape import Tape, UnknownWayError
from qdq.spelling import neighbours

__all__: list[str] = []  # the rules register themselves

_PROBABILITIES = 3  # what the last output of Attention is to be: the weights of the values
_TO_THE_END = np.iinfo(np.int64).max


@rule("Softmax")
def _softmax(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    y, axis = node.output[0], attributes(node).get("axis", -1)
    product = tape.times(y, one(grads))
    total = tape.node("ReduceSum", product, tape.whole(int(axis)), keepdims=1)  # type: ignore[call-overload]
    return {0: tape.node("Sub", product, tape.times(y, total))}


@rule("LogSoftmax")
def _log_softmax(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    grad, axis = one(grads), attributes(node).get("axis", -1)
    total = tape.node("ReduceSum", grad, tape.whole(int(axis)), keepdims=1)  # type: ignore[call-overload]
    return {0: tape.node("Sub", grad, tape.times(tape.node("Exp", node.output[0]), total))}


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    kept, x = attributes(node), node.input[0]
    rank = tape.rank(x)
    first = int(kept.get("axis", -1)) % rank  # type: ignore[call-overload]
    axes = tape.whole(*range(first, rank))
    _, mean, scale = tape.nodes("LayerNormalization", node.input, 3, **kept)
    normal = tape.times(tape.node("Sub", x, mean), scale)
    return {0: _normalized(tape, normal, scale, axes, tape.times(one(grads), node.input[1]))}


@rule("RMSNormalization")
def _rms_norm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, kept, rank = node.input[0], attributes(node), tape.rank(node.input[0])
    axes = tape.whole(*range(int(kept.get("axis", -1)) % rank, rank))  # type: ignore[call-overload]
    square = tape.node("ReduceMean", tape.times(x, x), axes, keepdims=1)
    scale = _root_of_inverse(tape, square, kept)
    normal, grad = tape.times(x, scale), tape.times(one(grads), node.input[1])
    along = tape.node("ReduceMean", tape.times(grad, normal), axes, keepdims=1)
    return {0: tape.times(scale, tape.node("Sub", grad, tape.times(normal, along)))}


def _root_of_inverse(tape: Tape, square: str, kept: Mapping[str, object]) -> str:
    epsilon = tape.real(float(kept.get("epsilon", 1e-5)))  # type: ignore[arg-type]
    return tape.inverse(tape.node("Sqrt", tape.node("Add", square, epsilon)))


@rule("GroupNormalization")
def _group_norm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, kept, rank = node.input[0], attributes(node), tape.rank(node.input[0])
    groups, axes = tape.whole(0, int(kept["num_groups"]), -1), tape.whole(2)  # type: ignore[call-overload]
    gain = tape.node("Reshape", node.input[1], tape.whole(-1, *[1] * (rank - 2)))
    grad = tape.node("Reshape", tape.times(one(grads), gain), groups)
    normal, scale = _standard(tape, tape.node("Reshape", x, groups), axes, kept)
    return {0: tape.reshaped(_normalized(tape, normal, scale, axes, grad), x)}


@rule("InstanceNormalization")
def _instance_norm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, rank = node.input[0], tape.rank(node.input[0])
    axes = tape.whole(*range(2, rank))
    normal, scale = _standard(tape, x, axes, attributes(node))
    gain = tape.node("Reshape", node.input[1], tape.whole(-1, *[1] * (rank - 2)))
    return {0: _normalized(tape, normal, scale, axes, tape.times(one(grads), gain))}


def _standard(tape: Tape, x: str, axes: str, kept: Mapping[str, object]) -> tuple[str, str]:
    """Values with mean 0 and variance 1, and what they were scaled by."""
    centred = tape.node("Sub", x, tape.node("ReduceMean", x, axes, keepdims=1))
    variance = tape.node("ReduceMean", tape.times(centred, centred), axes, keepdims=1)
    scale = _root_of_inverse(tape, variance, kept)
    return tape.times(centred, scale), scale


def _normalized(tape: Tape, normal: str, scale: str, axes: str, grad: str) -> str:
    """The gradient of what was normalized: to mean 0, and with ``scale`` to variance 1."""

    def middle(value: str) -> str:
        return tape.node("ReduceMean", value, axes, keepdims=1)

    along = tape.times(normal, middle(tape.times(grad, normal)))
    return tape.times(scale, tape.node("Sub", tape.node("Sub", grad, middle(grad)), along))


@rule("BatchNormalization")
def _batch_norm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    if any(n not in tape.graph.constants for n in node.input[1:]):
        raise UnknownWayError("statistics that are computed")
    scale, variance = (tape.graph.floats(node.input[k]).astype(np.float64) for k in (1, 4))
    epsilon = float(attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    factor = (scale / np.sqrt(variance + epsilon)).astype(np.float32)
    beside = [1] * (tape.rank(node.input[0]) - 2)
    return {0: tape.times(one(grads), tape.constant(factor.reshape(-1, *beside)))}


@rule("LRN")
def _local_response(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """``x / t ** beta`` with ``t = bias + alpha / size * N x**2``, N the channels nearby."""
    x, channels = node.input[0], tape.dims(node.input[0])[1]
    kept: dict[str, Any] = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0, **attributes(node)}
    if channels is None:
        raise UnknownWayError("an unknown number of channels")
    size, beta = int(kept["size"]), float(kept["beta"])
    near = neighbours(channels, size).astype(np.float32) * np.float32(kept["alpha"] / size)
    taps = (channels, channels, *[1] * (tape.rank(x) - 2))
    reads, read = (tape.constant(n.reshape(taps)) for n in (near, near.T))
    bias = tape.constant(np.full(channels, kept["bias"], np.float32))
    total = tape.node("Conv", tape.times(x, x), reads, bias)
    direct = tape.times(one(grads), tape.node("Pow", total, tape.real(-beta)))
    through = tape.node("Conv", tape.node("Div", tape.times(direct, x), total), read)
    return {0: tape.node("Sub", direct, tape.times(tape.times(x, through), tape.real(2 * beta)))}


@rule("RotaryEmbedding")
def _rotary(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """A rotation goes back by the opposite angles."""
    back = tape.node("Neg", node.input[2])
    given = [node.input[1], back, *node.input[3:]]
    return {0: tape.node("RotaryEmbedding", one(grads), *given, **attributes(node))}


@rule("Attention")
def _attention(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """The weights P of the values are those that the node itself finds, whatever it masks.

    With the gradient G of the result P V: V has P' G, and the scores P (G V' - sum(P G V')).
    Where heads share keys and values, their rows are those of one head.
    """
    kept = attributes(node)
    out, *present = [*grads, None, None][:3]
    if out is None or any(g is not None for g in grads[3:]) or kept.get("softcap"):
        raise UnknownWayError("a result without weights, or capped scores")
    own = _Heads(tape, node)
    _, keys, values, weights = tape.nodes(
        "Attention", node.input, 4, **{**kept, "qk_matmul_output_mode": _PROBABILITIES}
    )
    q, grad, weights = (own.folded(v) for v in (own.apart(node.input[0]), own.apart(out), weights))
    felt = tape.times(weights, tape.product(grad, values, transB=1))
    total = tape.node("ReduceSum", felt, tape.whole(-1), keepdims=1)
    scores = tape.times(tape.node("Sub", felt, tape.times(weights, total)), tape.real(own.scale))
    back = [tape.product(scores, q, transA=1), tape.product(weights, grad, transA=1)]
    past = [*node.input, *[""] * 6][4:6]
    found = {0: own.together(tape.product(scores, keys), node.input[0], own.queries)}
    for slot, (rows, more, before) in enumerate(zip(back, present, past, strict=True), 1):
        rows = rows if more is None else tape.node("Add", rows, more)
        if before:
            found[slot + 3], rows = _parted(tape, rows, before)
        found[slot] = own.together(rows, node.input[slot], own.keys)
    return found


def _parted(tape: Tape, rows: str, before: str) -> tuple[str, str]:
    """The rows that were there before, as many as a tensor has, and the others."""
    count = tape.node("Slice", tape.shape(before), tape.whole(2), tape.whole(3))
    old = tape.node("Slice", rows, tape.whole(0), count, tape.whole(2))
    return old, tape.node("Slice", rows, count, tape.whole(_TO_THE_END), tape.whole(2))


class _Heads:
    """How an Attention node has its heads: apart (4 dimensions), or side by side (3)."""

    def __init__(self, tape: Tape, node: onnx.NodeProto) -> None:
        kept, query = attributes(node), node.input[0]
        self._tape, self._rank = tape, tape.rank(query)
        if self._rank == 4:
            sizes = [tape.dims(n)[1] for n in node.input[:2]]
            width = tape.dims(query)[3]
        else:
            sizes = [kept.get(k) for k in ("q_num_heads", "kv_num_heads")]  # type: ignore[misc]
            width = tape.dims(query)[2]
            width = width // (sizes[0] or 1) if width else width
        if None in sizes or not width:
            raise UnknownWayError("heads of unknown size")
        self.queries, self.keys = (int(s) for s in sizes if s is not None)
        self.scale = float(kept.get("scale", 0) or width**-0.5)  # type: ignore[arg-type]

    def apart(self, value: str) -> str:
        """What belongs to the queries, (N, heads, rows, ...)."""
        if self._rank == 4:
            return value
        parts = self._tape.node("Reshape", value, self._tape.whole(0, 0, self.queries, -1))
        return self._tape.node("Transpose", parts, perm=[0, 2, 1, 3])

    def folded(self, value: str) -> str:
        """The rows of all heads that share keys and values below each other."""
        if self.queries == self.keys:
            return value
        tape = self._tape
        last = tape.node("Shape", value, start=3)
        shape = tape.node("Concat", tape.whole(0, self.keys, -1), last, axis=0)
        return tape.node("Reshape", value, shape)

    def together(self, value: str, like: str, heads: int) -> str:
        """In the shape of an input, which has so many heads."""
        tape = self._tape
        if self._rank == 3:
            last = tape.node("Shape", value, start=3)
            shape = tape.node("Concat", tape.whole(0, heads, -1), last, axis=0)
            value = tape.node("Transpose", tape.node("Reshape", value, shape), perm=[0, 2, 1, 3])
        return tape.reshaped(value, like)
