"""Weights of next to nothing become 0: processors take a hundred times as long for them."""

import numpy as np

from qdq.prepare.editing import Array, Editor
from qdq.weights import is_reference

__all__ = ["drop_tiny_weights"]

_TINY = np.float32(1e-20)


def drop_tiny_weights(ed: Editor) -> None:
    """Weights and biases below 1e-20, and below 1e-20 of the largest one beside them, become 0.

    Weight decay shrinks the weights of channels that nothing needs, in the end to denormal numbers
    (below 1.2e-38), with which a multiplication takes some 100 cycles; what they leave of others is
    denormal in the next layer. A text detector (PP-OCRv6) of whose weights 18 % are denormal took
    0.31 of its time without them, with the same output, bit for bit: beside any other weight, and
    beside the rounding of any activation, 1e-20 is nothing.

    Behind ``split_roles``, nothing else reads these constants. Matrices that stay in their file are
    left alone: they are those of language models.
    """
    nodes = ed.nodes("Conv", "ConvTranspose", "Gemm", "MatMul")
    read = {name: node.op for node in nodes for name in node.inputs[1:3]}
    for name, op in read.items():
        if name not in ed.constants or name in ed.outputs:
            continue
        if not (op in ("Gemm", "MatMul") and is_reference(ed.constants[name])):
            _clean(ed, name)


def _clean(ed: Editor, name: str) -> None:
    value = ed.array(name) if ed.dtype(name) == np.float32 else None
    if value is None or not _any_tiny(value):
        return
    size = np.abs(value)
    tiny = (size < _TINY) & (size < _TINY * size.max())
    if value[tiny].any():
        ed.set_constant(name, np.where(tiny, np.float32(0), value))


def _any_tiny(value: Array) -> bool:
    """Whether there are numbers below 1e-20 besides 0, whatever their sign; in one look.

    Without the sign, the bits of floats are in the order of the numbers. 0 becomes the largest
    integer when 1 is taken off.
    """
    bits = value.reshape(-1).view(np.uint32) << np.uint32(1)
    limit = np.array(_TINY).view(np.uint32) << np.uint32(1)
    bits -= np.uint32(1)
    return bool((bits < limit - np.uint32(1)).any())
