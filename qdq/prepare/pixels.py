"""Channels in the order in which their pixels are brought to their places fastest."""

import numpy as np

from qdq.prepare.editing import Array, Editor
from qdq.weights import is_reference

__all__ = ["pixels_first"]


def pixels_first(ed: Editor) -> None:
    """A Conv in front of a DepthToSpace makes the channels of one pixel side by side.

    ``CRD`` is how PyTorch's PixelShuffle is exported: the pixels of one channel are side by side.
    With the channels last, the other order, ``DCR``, is whole rows of channels to copy. The two
    differ by a permutation, which the weights take in.
    """
    for node in ed.nodes("DepthToSpace"):
        conv = ed.maker(node.input(0), "Conv")
        if conv is None or node.attr("mode", "DCR") != "CRD" or not ed.only_user(conv.output):
            continue
        constants = [name for name in conv.inputs[1:] if name]
        known = all(n in ed.constants and not is_reference(ed.constants[n]) for n in constants)
        if conv.attr("group", 1) != 1 or not known:
            continue
        pixels = node.attr("blocksize") ** 2
        for slot, name in enumerate(conv.inputs[1:], 1):
            value = ed.array(name) if name else None
            if value is not None:
                turned = ed.add_constant(f"{name}_turned", _turned(value, pixels))
                ed.set_input(conv, slot, turned)
        node.set_attr("mode", "DCR")


def _turned(value: Array, pixels: int) -> Array:
    """(M * pixels, ...) to (pixels * M, ...)."""
    rest = value.shape[1:]
    apart = value.reshape(value.shape[0] // pixels, pixels, *rest)
    return np.ascontiguousarray(apart.swapaxes(0, 1).reshape(value.shape))
