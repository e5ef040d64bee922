"""Channels in the order in which their pixels are brought to their places fastest."""

import numpy as np
import onnx

from qdq.prepare.editing import Array, Editor, Node
from qdq.subpixel import LEAST_RUN
from qdq.weights import is_reference

__all__ = ["pixels_first", "pixels_like"]


def pixels_first(ed: Editor) -> None:
    """A Conv in front of a DepthToSpace makes the channels of one pixel side by side.

    ``CRD`` is how PyTorch's PixelShuffle is exported: the pixels of one channel are side by side.
    With the channels last, the other order, ``DCR``, is whole rows of channels to copy. The two
    differ by a permutation, which the weights take in. Rows that are short are no gain.
    """
    for node in ed.nodes("DepthToSpace"):
        conv = _maker(ed, node) if node.attr("mode", "DCR") == "CRD" else None
        if conv is None:
            continue
        side = node.attr("blocksize")
        if ed.constants[conv.input(1)].dims[0] // side >= LEAST_RUN:
            _turn(ed, conv, side**2)
            node.set_attr("mode", "DCR")


def pixels_like(model: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
    """Take that back, in place, where a quantized model was made without it.

    Args:
        model: a prepared model.
        quantized: one that was quantized, by whatever tool.
    """
    as_they_were: set[str] = set()
    for n in quantized.graph.node:
        if n.op_type == "DepthToSpace" and any(a.s == b"CRD" for a in n.attribute):
            as_they_were.update((n.name, *n.output))  # tools rename outputs of the graph
    ed = Editor(model)
    for node in ed.nodes("DepthToSpace"):
        same = not as_they_were.isdisjoint((node.name, node.output))
        conv = _maker(ed, node) if same else None
        if conv is not None and node.attr("mode", "DCR") == "DCR":
            made = ed.constants[conv.input(1)].dims[0]
            _turn(ed, conv, made // node.attr("blocksize") ** 2)
            node.set_attr("mode", "CRD")
    ed.finish()


def _maker(ed: Editor, node: Node) -> Node | None:
    """The Conv that makes what a DepthToSpace alone reads, if its constants can be turned."""
    conv = ed.maker(node.input(0), "Conv")
    if conv is None or not ed.only_user(conv.output) or conv.attr("group", 1) != 1:
        return None
    constants = [name for name in conv.inputs[1:] if name]
    known = all(n in ed.constants and not is_reference(ed.constants[n]) for n in constants)
    return conv if known else None


def _turn(ed: Editor, conv: Node, inner: int) -> None:
    """Bring channels from the order (n, inner) to (inner, n)."""
    for slot, name in enumerate(conv.inputs[1:], 1):
        value = ed.array(name) if name else None
        if value is None:
            continue
        if ed.only_user(name):
            ed.set_constant(name, _turned(value, inner))
        else:
            ed.set_input(conv, slot, ed.add_constant(f"{name}_turned", _turned(value, inner)))


def _turned(value: Array, inner: int) -> Array:
    apart = value.reshape(value.shape[0] // inner, inner, *value.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(0, 1).reshape(value.shape))
