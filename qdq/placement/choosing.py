"""The way back through nodes that choose, copy or mix values by their places."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import onnx

from qdq.graph import attributes
from qdq.placement.gradients import Grads, one, rule
from qdq.placement.tape import Tape, UnknownWayError

__all__: list[str] = []  # the rules register themselves

_NOT_OF_INTEGERS = ("DepthToSpace", "SpaceToDepth")  # the kernels know floating point only
_PIXEL = 2.0**-7  # of a pixel: the step of a difference quotient


@rule("MaxPool")
def _max_pool(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x = node.input[0]
    _, places = tape.nodes("MaxPool", [x], 2, **{**attributes(node), "storage_order": 0})
    return {0: tape.scattered(x, places, one(grads))}


@rule("DepthToSpace", "Expand", "Gather", "GatherElements", "GatherND", "Slice", "SpaceToDepth",
      "Tile")  # fmt: skip
def _moved(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """Where each value came from, the node itself tells: it moves the numbers of the places."""
    x = node.input[0]
    numbers = tape.numbered(x)
    if node.op_type in _NOT_OF_INTEGERS:
        numbers = tape.node("Cast", numbers, to=11)  # float64 is exact
    places = tape.node(node.op_type, numbers, *node.input[1:], **attributes(node))
    if node.op_type in _NOT_OF_INTEGERS:
        places = tape.node("Cast", places, to=7)
    return {0: tape.scattered(x, places, one(grads))}


@rule("Pad")
def _pad(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, kept = node.input[0], attributes(node)
    pads, _, axes = [*node.input[1:], "", ""][:3]
    if kept.get("mode", b"constant") == b"constant":
        # a negative pad cuts: back, it is a positive one
        return {0: tape.node("Pad", one(grads), tape.node("Neg", pads), "", axes)}
    places = tape.node("Pad", tape.numbered(x), pads, "", axes, **kept)
    return {0: tape.scattered(x, places, one(grads))}


@rule("TopK")
def _top_k(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    x, axis = node.input[0], attributes(node).get("axis", -1)
    given = tape.zeros(x), node.output[1], one(grads)
    return {0: tape.node("ScatterElements", *given, axis=axis)}


@rule("ScatterElements", "ScatterND")
def _scatter(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    (_, places, updates), kept, grad = node.input, attributes(node), one(grads)
    how = kept.pop("reduction", b"none")
    if how not in (b"none", b"add"):
        raise UnknownWayError("values that are put together otherwise than by sums")
    gather = "GatherND" if node.op_type == "ScatterND" else "GatherElements"
    found = {0: grad, 2: tape.node(gather, grad, places, **kept)}
    if how == b"none":  # what was there before is gone
        found[0] = tape.node(node.op_type, grad, places, tape.zeros(updates), **kept)
    return found


@rule("Trilu")
def _trilu(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    return {0: tape.node("Trilu", one(grads), *node.input[1:], **attributes(node))}


@rule("CumSum")
def _cum_sum(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    kept: dict[str, Any] = attributes(node)
    turned = {**kept, "reverse": 1 - kept.get("reverse", 0)}
    return {0: tape.node("CumSum", one(grads), node.input[1], **turned)}


@rule("Col2Im")
def _col2im(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    """Blocks that were added up: each is cut out again, by a convolution with a single 1."""
    kept, block, channels = attributes(node), node.input[2], tape.dims(node.output[0])[1]
    if block not in tape.graph.constants or not channels:
        raise UnknownWayError("blocks of unknown size")
    taps = [int(k) for k in tape.graph.array(block)]
    single = np.eye(int(np.prod(taps)), dtype=np.float32).reshape(-1, 1, *taps)
    kernel = tape.constant(np.tile(single, (channels, *[1] * (len(taps) + 1))))
    cut = tape.node("Conv", one(grads), kernel, group=channels, **kept)
    return {0: tape.reshaped(cut, node.input[0])}


@rule("GridSample")
def _grid_sample(tape: Tape, node: onnx.NodeProto, grads: Grads) -> Mapping[int, str]:
    kept: dict[str, Any] = attributes(node)
    mode, beyond = kept.get("mode", b"linear"), kept.get("padding_mode", b"zeros")
    known = mode in (b"linear", b"bilinear") and beyond in (b"zeros", b"border")
    if tape.rank(node.input[0]) != 4 or not known:
        raise UnknownWayError("samples that are mixed otherwise than bilinearly")
    found = {}
    if node.input[0] in tape.live:
        found[0] = _back_to_pixels(tape, node, kept, one(grads))
    if node.input[1] in tape.live:
        found[1] = _back_to_places(tape, node, one(grads))
    return found


def _back_to_pixels(tape: Tape, node: onnx.NodeProto, kept: Mapping[str, Any], grad: str) -> str:
    """Each sample gives to the four pixels around it, the nearer the more."""
    image = node.input[0]
    columns, rows = (_pixels(tape, node, kept, k) for k in (0, 1))
    width, lead = tape.sizes(image, 3, 4), tape.sizes(image, 0, 2)
    flat = tape.node("Concat", lead, tape.whole(-1), axis=0)
    total = tape.node("Reshape", tape.zeros(image), flat)
    whole = tape.shape(node.output[0])
    for (column, share), (row, share_of_row) in product(columns, rows):
        weight = tape.node("Unsqueeze", tape.times(share, share_of_row), tape.whole(1))
        place = tape.node("Add", tape.times(row, width), column)
        places = tape.node("Expand", tape.node("Unsqueeze", place, tape.whole(1)), whole)
        given = [tape.node("Reshape", v, flat) for v in (places, tape.times(grad, weight))]
        total = tape.node("ScatterElements", total, *given, axis=2, reduction="add")
    return tape.reshaped(total, image)


def _pixels(
    tape: Tape, node: onnx.NodeProto, kept: Mapping[str, Any], axis: int
) -> list[tuple[str, str]]:
    """Along an axis (0: x) the pixels before and behind each sample, and what it takes of them."""
    image, grid = node.input[:2]
    end = 3 - axis
    size = tape.node("Cast", tape.sizes(image, end, end + 1), to=1)
    last = tape.node("Sub", size, tape.real(1))
    place = tape.node("Gather", grid, tape.constant(np.int64(axis)), axis=-1)
    half = tape.times(tape.node("Add", place, tape.real(1)), tape.real(0.5))
    if kept.get("align_corners", 0):
        at = tape.times(half, last)
    else:
        at = tape.node("Sub", tape.times(half, size), tape.real(0.5))
    if kept.get("padding_mode") == b"border":
        at = tape.node("Max", tape.node("Min", at, last), tape.real(0))
    found = []
    for step in (0.0, 1.0):
        pixel = tape.node("Add", tape.node("Floor", at), tape.real(step))
        share = tape.node("Sub", tape.real(1), tape.node("Abs", tape.node("Sub", at, pixel)))
        inside = tape.node("Max", tape.node("Min", pixel, last), tape.real(0))
        known = tape.node("Equal", inside, pixel)
        found.append((tape.node("Cast", inside, to=7), tape.masked(known, share)))
    return found


def _back_to_places(tape: Tape, node: onnx.NodeProto, grad: str) -> str:
    """What moves a sample, by its difference quotient along x and y."""
    image, grid = node.input[:2]
    parts = []
    for axis in (0, 1):
        size = tape.node("Cast", tape.sizes(image, 3 - axis, 4 - axis), to=1)
        step = tape.node("Div", tape.real(2 * _PIXEL), size)
        along = tape.times(step, tape.constant(np.eye(2, dtype=np.float32)[axis]))
        around = [
            tape.node("GridSample", image, tape.node(op, grid, along), **attributes(node))
            for op in ("Add", "Sub")
        ]
        rise = tape.times(tape.node("Sub", *around), grad)
        total = tape.node("ReduceSum", rise, tape.whole(1), keepdims=0)
        slope = tape.node("Div", total, tape.times(step, tape.real(2)))
        parts.append(tape.node("Unsqueeze", slope, tape.whole(-1)))
    return tape.node("Concat", *parts, axis=-1)
