"""The way back through linear nodes: their transposes. What movement nodes move goes back.

A convolution goes back as one with mirrored kernels, which the runtime computes faster than a
ConvTranspose. Where it had strides that one would read zeros between the values, four times as many
with strides of 2; and to few channels it would make a whole block of them.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx

from qdq.equation import labelled
from qdq.graph import attributes
from qdq.placement.gradients import Grads, one, rule
from qdq.placement.tape import Tape, UnknownWayError

__all__: list[str] = []  # the rules register themselves

Ints = list[int]
_NARROW = 8  # channels; a ConvTranspose to less takes half as long (onnxruntime 1.32, AVX-512)


def _window(node: onnx.NodeProto, rank: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Strides, dilations, and the pads at the start and at the end of each spatial axis."""
    kept: dict[str, Any] = attributes(node)
    if kept.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnknownWayError("pads that depend on the size")
    pads = list(kept.get("pads", [0] * 2 * rank))
    strides, dilations = (list(kept.get(k, [1] * rank)) for k in ("strides", "dilations"))
    return strides, dilations, pads[:rank], pads[rank:]


@rule("Conv")
def _conv(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    weight = node.input[1]
    if weight not in tape.graph.constants:
        raise UnknownWayError("a kernel that is computed")
    w = tape.graph.floats(weight)
    taps, rank = w.shape[2:], w.ndim - 2
    groups = int(attributes(node).get("group", 1))  # type: ignore[call-overload]
    strides, dilations, before, after = _window(node, rank)
    reach = [d * (k - 1) for d, k in zip(dilations, taps, strict=True)]
    made, read = w.shape[0] // groups, w.shape[1]
    pads = [r - p for r, p in zip(2 * reach, before + after, strict=True)]
    if prod(strides) > 1 or groups * read < _NARROW or min(pads) < 0:
        laid = {"group": groups, "strides": strides, "dilations": dilations}
        return {0: _spread(tape, node, one(grads), reach, before, laid)}
    turned = w.reshape(groups, made, read, *taps).swapaxes(1, 2)
    mirror = (slice(None), slice(None), *[slice(None, None, -1)] * rank)
    kernel = tape.constant(turned.reshape(groups * read, made, *taps)[mirror])
    back = tape.node("Conv", one(grads), kernel, group=groups, dilations=dilations, pads=pads)
    return {0: back}


def _spread(
    tape: Tape, node: onnx.NodeProto, grad: str, reach: Ints, before: Ints, laid: dict[str, Any]
) -> str:
    """The ConvTranspose that takes a convolution's result back to the size of its input."""
    x, weight = node.input[:2]
    rank = len(reach)
    sizes = [*tape.dims(x)[2:], *tape.dims(node.output[0])[2:]]
    known = [n for n in sizes if n is not None]
    if len(known) < len(sizes):
        # with the pads it could be of size 0, which the runtime refuses
        return _cut(tape, tape.node("ConvTranspose", grad, weight, **laid), x, rank, before)
    ends = zip(known[:rank], known[rank:], reach, before, laid["strides"], strict=True)
    lacks = [n + p - s * (m - 1) - r - 1 for n, m, r, p, s in ends]
    return tape.node("ConvTranspose", grad, weight, pads=[*before, *(max(0, -k) for k in lacks)],
                     output_padding=[max(0, k) for k in lacks], **laid)  # fmt: skip


def _cut(tape: Tape, value: str, like: str, rank: int, before: Sequence[int] | None = None) -> str:
    """The spatial size of a forward tensor: what is beyond goes, what lacks is 0.

    What is ``before`` the first place of each axis goes too.
    """
    axes = tape.whole(*range(2, 2 + rank))
    size = tape.sizes(like, 2, 2 + rank)
    first = tape.whole(*(before or [0] * rank))
    end = tape.node("Add", size, first) if before else size
    lacks = tape.node("Sub", end, tape.node("Slice", tape.node("Shape", value), tape.whole(2),
                                             tape.whole(2 + rank)))  # fmt: skip
    lacks = tape.node("Max", lacks, tape.whole(*[0] * rank))
    nothing = tape.whole(*[0] * rank)
    filled = tape.node(
        "Pad", value, tape.node("Concat", nothing, lacks, axis=0), tape.real(0), axes
    )
    return tape.node("Slice", filled, first, end, axes)


@rule("ConvTranspose")
def _conv_transpose(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    kept = attributes(node)
    if "output_shape" in kept or kept.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise UnknownWayError("pads that depend on the size")
    given = {k: kept[k] for k in ("strides", "dilations", "group", "pads") if k in kept}
    back = tape.node("Conv", one(grads), node.input[1], **given)
    return {0: _cut(tape, back, node.input[0], tape.rank(node.input[0]) - 2)}


@rule("MatMul")
def _matmul(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    a, b = node.input
    made, found = node.output[0], {}

    def product(left: str, right: str, **turned: int) -> str:
        if any(tape.rank(n) < 2 for n in (left, right) if n in node.input):
            raise UnknownWayError("a product with a vector")
        return tape.product(left, right, **turned)

    if tape.rank(a) < 2 < tape.rank(b):
        raise UnknownWayError("a vector times several matrices")
    if a in tape.live:
        found[0] = tape.summed(product(one(grads), b, transB=1), a, made, batch_only=True)
    if b in tape.live:
        found[1] = tape.summed(product(a, one(grads), transA=1), b, made, batch_only=True)
    return found


@rule("Gemm")
def _gemm(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    kept: dict[str, Any] = attributes(node)
    if kept.get("transA", 0) or node.input[1] in tape.live:
        raise UnknownWayError("a turned or computed factor")
    back = tape.node("Gemm", one(grads), node.input[1], transB=1 - kept.get("transB", 0),
                     alpha=kept.get("alpha", 1.0))  # fmt: skip
    return {0: back}


@rule("Einsum")
def _einsum(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """Of each factor: a product of the result and of the other factors."""
    text = attributes(node)["equation"].decode()  # type: ignore[attr-defined]
    known = labelled(text, [tape.rank(n) for n in node.input])
    if known is None:
        raise UnknownWayError("unnamed axes that are broadcast")
    letters, made = known
    if any(len(set(own)) < len(own) for own in letters):
        raise UnknownWayError("a sum over equal axes")
    _want_one_size(tape, node.input, letters)
    found = {}
    for slot, own in enumerate(letters):
        others = [k for k in range(len(letters)) if k != slot]
        given = [made, *(letters[k] for k in others)]
        if node.input[slot] not in tape.live or set(own) - set("".join(given)):
            continue  # what was summed by itself alone has no name in the others
        back = f"{','.join(given)}->{own}"
        factors = [node.input[k] for k in others]
        found[slot] = tape.node("Einsum", one(grads), *factors, equation=back)
    return found


def _want_one_size(tape: Tape, names: Sequence[str], letters: Sequence[str]) -> None:
    """Refuse axes that have one name, but size 1 in one factor and more in another."""
    sizes: dict[str, int] = {}
    for name, own in zip(names, letters, strict=True):
        for letter, size in zip(own, tape.dims(name), strict=True):
            if size is not None and sizes.setdefault(letter, size) != size:
                raise UnknownWayError("axes that are broadcast")


@rule("GlobalAveragePool")
def _global_pool(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x = node.input[0]
    area = tape.node("ReduceProd", tape.sizes(x, 2, tape.rank(x)), keepdims=0)
    shared = tape.node("Div", one(grads), tape.node("Cast", area, to=1))
    return {0: tape.node("Expand", shared, tape.shape(x))}


@rule("AveragePool")
def _average_pool(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x = node.input[0]
    kept: dict[str, Any] = attributes(node)
    taps: Sequence[int] = kept["kernel_shape"]
    rank = len(taps)
    strides, dilations, before, after = _window(node, rank)
    if kept.get("ceil_mode") and kept.get("count_include_pad"):
        raise UnknownWayError("windows beyond the end that count pads")
    laid = {"strides": strides, "dilations": dilations}
    grad, full = one(grads), np.ones((1, 1, *taps), np.float32)
    if (any(before + after) or kept.get("ceil_mode")) and not kept.get("count_include_pad"):
        # the last window begins within the input, so it ends less than a stride behind the pads
        beyond = [p + s - 1 if kept.get("ceil_mode") else p
                  for p, s in zip(after, strides, strict=True)]  # fmt: skip
        size = tape.node("Concat", tape.whole(1, 1), tape.sizes(x, 2, 2 + rank), axis=0)
        ones = tape.node("Expand", tape.real(1), size)
        count = tape.node("Conv", ones, tape.constant(full), pads=[*before, *beyond], **laid)
        share = tape.node("Div", _cut(tape, count, node.output[0], rank), tape.real(prod(taps)))
        grad = tape.times(grad, tape.inverse(share))  # fewer values at the edges
    lead = tape.sizes(node.output[0], 2, 2 + rank)
    single = tape.node("Reshape", grad, tape.node("Concat", tape.whole(-1, 1), lead, axis=0))
    kernel = tape.constant(full / np.float32(prod(taps)))
    back = tape.node("ConvTranspose", single, kernel, pads=[*before, *[0] * rank], **laid)
    return {0: tape.reshaped(_cut(tape, back, x, rank), x)}


@rule("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.reshaped(one(grads), node.input[0])}


@rule("Transpose")
def _transpose(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    order = attributes(node).get("perm") or range(tape.rank(node.input[0]))[::-1]
    back = np.argsort(np.asarray(order)).tolist()
    return {0: tape.node("Transpose", one(grads), perm=back)}


@rule("Concat")
def _concat(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    if len(node.input) == 1:
        return {0: one(grads)}
    axis = int(attributes(node)["axis"]) % tape.rank(node.output[0])  # type: ignore[call-overload]
    sizes = tape.node("Concat", *(tape.sizes(n, axis, axis + 1) for n in node.input), axis=0)
    parts = tape.nodes("Split", [one(grads), sizes], len(node.input), axis=axis)
    return dict(enumerate(parts))


@rule("Split")
def _split(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    pairs = zip(node.output, grads, strict=True)
    parts = [g if g is not None else tape.times(o, tape.real(0)) for o, g in pairs]
    return {0: tape.node("Concat", *parts, axis=attributes(node).get("axis", 0))}


@rule("Resize")
def _resize(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """As if each value came from its nearest neighbour, whatever the mode."""
    x, kept = node.input[0], {**attributes(node), "mode": "nearest"}
    factors = _copies(tape, node)
    if factors:
        block = factors[2:]
        mean = tape.node("AveragePool", one(grads), kernel_shape=block, strides=block)
        return {0: tape.times(mean, tape.real(prod(block)))}
    kept |= {k: 0 for k in ("antialias", "exclude_outside") if k in kept}  # of other modes
    numbers = tape.node("Cast", tape.numbered(x), to=6)  # int32: the kernel has no int64
    places = tape.node("Resize", numbers, *node.input[1:], **kept)
    return {0: tape.scattered(x, tape.node("Cast", places, to=7), one(grads))}


def _copies(tape: Tape, node: onnx.NodeProto) -> Ints:
    """How many times each value stands beside itself, per axis; empty for other scales."""
    corners = attributes(node).get("coordinate_transformation_mode", b"half_pixel")
    if corners in (b"align_corners", b"tf_crop_and_resize"):
        return []
    found = _scales(tape, node)
    whole = len(found) > 2 and all(f == round(f) >= 1 for f in found)
    return [int(f) for f in found] if whole and found[0] == found[1] == 1 else []


def _scales(tape: Tape, node: onnx.NodeProto) -> list[float]:
    """By which factor each axis grows; empty where that is not known."""
    if len(node.input) == 3:
        given = node.input[2] in tape.graph.constants
        return tape.graph.floats(node.input[2]).tolist() if given else []
    pairs = zip(tape.dims(node.input[0]), tape.dims(node.output[0]), strict=True)
    return [made / given if made and given else 0.0 for given, made in pairs]
