"""Biases and clamps behind a Reshape, brought to the product that they are for."""

import math

import numpy as np

from qdq.prepare.editing import Array, Editor, Node

__all__ = ["arithmetic_before_views"]

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_ARITHMETIC = ("Add", "Div", "Mul", "Sub")
_CLAMPS = ("Clip", "LeakyRelu", "Relu")

Shape = tuple[int | None, ...]


def arithmetic_before_views(ed: Editor) -> None:
    """What scales, shifts or clamps a product behind a Reshape comes right behind the product.

    There it becomes part of the product, or its codes do the work of the clamp. TensorFlow has a
    one-dimensional convolution between an Unsqueeze and a Squeeze, a product of matrices between
    two Reshapes, and the bias and the activation behind them; attention adds its biases behind the
    split into heads. Constants are one value, or one for each channel of the product. It comes
    before products become Gemms, which want the bias, and after, for what is behind their Reshapes.
    """
    for node in ed.nodes(*_ARITHMETIC, *_CLAMPS):
        slot = _data_slot(ed, node)
        views = _views_before(ed, node, node.input(slot))
        axis = _channel_axis(ed, views[0].input(0)) if views else None
        if axis is None:
            continue
        if node.op in _CLAMPS:
            _move(ed, node, slot, views)
        elif (value := _before(ed, node.input(1 - slot), views, axis)) is not None:
            _move(ed, node, slot, views, value)


def _views_before(ed: Editor, node: Node, x: str) -> list[Node]:
    """The views that a node's input comes through, the first one first; nothing else reads them."""
    found: list[Node] = []
    reader = node
    while (view := ed.maker(x, *_VIEWS)) is not None and ed.only_user(x) is reader:
        found.insert(0, view)
        reader, x = view, view.input(0)
    return found if ed.only_user(x) is reader else found[1:]


def _move(ed: Editor, node: Node, slot: int, views: list[Node], value: Array | None = None) -> None:
    """Put a node in front of the views that it is behind, with another constant if there is one."""
    x = views[0].input(0)
    first, *behind = (n.copied() for n in (node, *views))
    made = ed.fresh(f"{node.output}_before")
    ed.set_type_like(made, x)
    first.input[slot], first.output[0] = x, made
    if value is not None and value.shape != ed.shape(node.input(1 - slot)):
        first.input[1 - slot] = ed.add_constant(f"{node.input(1 - slot)}_viewed", value)
    behind[0].input[0], behind[-1].output[0] = made, node.output
    ed.replace([*views, node], [first, *behind])


def _data_slot(ed: Editor, node: Node) -> int:
    return 1 if node.op in ("Add", "Mul") and node.input(0) in ed.constants else 0


def _channel_axis(ed: Editor, x: str) -> int | None:
    """The axis of the channels of a product, with nothing but arithmetic and clamps behind it."""
    rank = ed.rank(x)
    maker = ed.maker(x, *_PRODUCTS, *_ARITHMETIC, *_CLAMPS)
    while maker is not None and maker.op not in _PRODUCTS:
        x = maker.input(_data_slot(ed, maker))
        others = [i for i in maker.inputs if i and i != x]
        alone = ed.only_user(x) is maker and all(i in ed.constants for i in others)
        same = rank is not None and ed.rank(x) == rank
        maker = ed.maker(x, *_PRODUCTS, *_ARITHMETIC, *_CLAMPS) if alone and same else None
    if maker is None or rank is None or rank < 2:
        return None
    return 1 if maker.op in ("Conv", "ConvTranspose") else rank - 1


def _before(ed: Editor, name: str, views: list[Node], axis: int) -> Array | None:
    """A constant behind views as it is in front of them, where it is of channels there."""
    value, seen, source = ed.array(name), ed.shape(views[-1].output), ed.shape(views[0].input(0))
    if value is None or seen is None or source is None or value.ndim > len(seen):
        return None
    if value.size == 1:
        return value.reshape(())
    dims = (1,) * (len(seen) - value.ndim) + value.shape
    alike = all(n.op in ("Squeeze", "Unsqueeze") for n in views)
    behind = source[axis + 1 :]
    for first, last in _spans(dims):
        span = seen[first:last]
        if None in span or math.prod(d or 0 for d in span) != source[axis]:
            continue
        if any(d not in (1, s) for d, s in zip(dims[first:last], span, strict=True)):
            return None  # it widens what it meets
        if _same_size(seen[last:], behind, alike):
            whole = np.broadcast_to(value.reshape(dims[first:last]), [d or 0 for d in span])
            return whole.reshape(-1, *(1,) * len(behind))
    return None


def _spans(dims: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of axes, as first and end, that have in them all axes along which a constant varies."""
    at = [i for i, d in enumerate(dims) if d != 1]
    return [(i, j) for i in range(at[0] + 1) for j in range(at[-1] + 1, len(dims) + 1)]


def _same_size(seen: Shape, source: Shape, alike: bool) -> bool:
    """Whether as many values lie behind an axis, in both shapes; alike but for axes of length 1."""
    if None in seen or None in source:
        plain = [tuple(d for d in s if d != 1) for s in (seen, source)]
        return alike and plain[0] == plain[1]
    return math.prod(d or 0 for d in seen) == math.prod(d or 0 for d in source)
