"""What scales and shifts the channels in front of a linear operator, folded into it."""

import numpy as np

from qdq.prepare.affine import Affine, affine_of, is_moderate
from qdq.prepare.editing import Array, Editor, Node
from qdq.prepare.linear import is_plain

__all__ = ["fold_affine_before", "precede"]


def fold_affine_before(ed: Editor) -> None:
    """Per-channel factors and offsets in front of a Conv or Gemm go into it, where exact.

    With x' = s x + t for each input channel, ``W x' + b = (W s) x + (b + sum W t)``: this
    needs a Conv without padding, because padding puts zeros beside x', not beside x. With
    padding and one s for all channels, ``W (s x + t) = (W s) (x + t / s)`` leaves an Add of
    what was a factor and an offset. (With one s per channel that is exact too, but the
    channels of x + t / s may lie in far apart ranges, which one scale then has to hold.)
    The maps are those of fold_affine; nothing else may read what lies between.
    """
    for node in ed.nodes("Conv", "Gemm"):
        if node.op == "Gemm" and not is_plain(ed, node):
            continue
        if node.input(2) and node.input(2) not in ed.constants:
            continue
        found = precede(ed, node)
        if found is None:
            continue
        chain, x, affine = found
        scale, shift = affine
        if _is_unpadded(node) or not shift.any():
            _take_in(ed, node, x, affine)
        elif len(chain) > 1 and scale[0] != 0 and (scale == scale[0]).all():
            dtype = ed.dtype(node.input(1))
            shifted = _shifted(ed, chain[0], x, (shift / scale).astype(dtype))
            _take_in(ed, node, shifted, Affine(scale, np.zeros_like(shift)))
        ed.prune(chain)


def precede(ed: Editor, node: Node) -> tuple[list[Node], str, Affine] | None:
    """The nodes before a linear node that only scale and shift; the tensor before; their sum."""
    weight = ed.constants.get(node.input(1))
    if weight is None:
        return None
    groups = node.attr("group", 1)
    channels = weight.dims[1] * groups if node.op == "Conv" else weight.dims[0]
    total = Affine(np.ones(channels), np.zeros(channels))
    chain: list[Node] = []
    x = node.input(0)
    while (step := _step(ed, x, channels, len(weight.dims))) is not None:
        maker, x, affine = step
        total = Affine(total.scale * affine.scale, total.scale * affine.shift + total.shift)
        chain.append(maker)
    if not chain or not is_moderate(total):
        return None
    return chain, x, total


def _step(ed: Editor, x: str, channels: int, rank: int) -> tuple[Node, str, Affine] | None:
    maker = ed.maker(x, "BatchNormalization", "Add", "Sub", "Mul", "Div")
    if maker is None or ed.only_user(x) is None:
        return None
    source = next((i for i in maker.inputs if i not in ed.constants), "")
    shape = ed.shape(source)
    if shape is None or len(shape) != rank or shape[1] != channels:
        return None  # of another rank, or widened by the constant
    affine = affine_of(ed, maker, source, channels, axis=1, rank=rank)
    return None if affine is None else (maker, source, affine)


def _is_unpadded(node: Node) -> bool:
    return node.attr("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(node.attr("pads", ()))


def _shifted(ed: Editor, old: Node, x: str, shift: Array) -> str:
    """An Add of a per-channel constant after x, in the place of an old node; its output."""
    rank = ed.rank(x) or 0
    one = bool((shift == shift[0]).all())
    value = shift[:1].reshape(()) if one else shift.reshape(1, -1, *(1,) * (rank - 2))
    y = ed.fresh(f"{old.output}_shifted")
    ed.set_type_like(y, x)
    addend = ed.add_constant(f"{old.name}_shift", value)
    name = ed.fresh(f"{old.name}_shifted")
    ed.add_before(old, ed.new_node("Add", [x, addend], [y], name))
    return y


def _take_in(ed: Editor, node: Node, x: str, affine: Affine) -> None:
    """Let the node read x, and its weight and bias do what the map did."""
    weight, bias = ed.array(node.input(1)), ed.array(node.input(2))
    if weight is None:
        return
    groups = node.attr("group", 1) if node.op == "Conv" else 1
    wide = weight.astype(np.float64) if node.op == "Conv" else weight.astype(np.float64).T
    rows = wide.reshape(groups, wide.shape[0] // groups, wide.shape[1], -1)
    offset = (rows.sum(-1) * affine.shift.reshape(groups, 1, -1)).sum(-1).reshape(-1)
    scaled = (rows * affine.scale.reshape(groups, 1, -1, 1)).reshape(wide.shape)
    scaled = scaled if node.op == "Conv" else scaled.T
    ed.set_input(node, 0, x)
    if (affine.scale != 1).any():
        new = ed.add_constant(f"{node.input(1)}_folded", scaled.astype(weight.dtype))
        ed.set_input(node, 1, new)
    if offset.any():
        total = offset if bias is None else offset + bias
        ed.set_input(node, 2, ed.add_constant(f"{node.name}_bias", total.astype(weight.dtype)))
