"""What scales and shifts the channels behind a linear operator, folded into it."""

import numpy as np

from qdq.prepare.affine import Affine, affine_of, is_moderate
from qdq.prepare.editing import Array, Editor, Node

__all__ = ["fold_affine", "follow", "is_plain", "scaled_weight"]


def fold_affine(ed: Editor) -> None:
    """Per-channel factors and offsets behind a linear operator go into its weight and bias.

    With y = W x + b and z = s y + t for each output channel, ``z = (s W) x + (s b + t)``.
    BatchNormalization is s = scale / sqrt(var + epsilon), t = bias - mean s; Add, Sub, Mul and
    Div with a constant that is one value, or one per output channel, are the others. A whole
    chain of them folds at once, as long as nothing else reads what lies between; then what is
    behind the Transpose behind that.
    """
    for node in ed.nodes("Conv", "ConvTranspose", "Gemm"):
        last: Node | None = node
        while last is not None:
            last = _fold_next(ed, last)


def _fold_next(ed: Editor, node: Node) -> Node | None:
    """Fold the chain behind a linear node; the node that it became, if there was one."""
    weight = ed.constants.get(node.input(1))
    if weight is None or (node.op == "Gemm" and not is_plain(ed, node)):
        return None
    if node.input(2) and node.input(2) not in ed.constants:
        return None
    rank = len(weight.dims)
    chain = follow(ed, node, axis=1, rank=rank)
    if chain is not None:
        return _fold(ed, node, *chain)
    turn = _turned(ed, node, rank)
    return None if turn is None else _fold(ed, node, *turn)


def _turned(ed: Editor, node: Node, rank: int) -> tuple[list[Node], Affine, Node] | None:
    """What scales and shifts the channels behind a Transpose, which goes last: channels last."""
    turn = ed.only_user(node.output, "Transpose")
    order = turn.attr("perm") if turn is not None else None
    if turn is None or order is None or 1 not in order:
        return None
    chain = follow(ed, node, axis=list(order).index(1), rank=rank, end=turn.output)
    return (*chain, turn) if chain is not None else None


def is_plain(ed: Editor, node: Node) -> bool:
    """Whether a Gemm is alone with its weight and a bias of shape (N,)."""
    factors = (node.attr("alpha", 1.0), node.attr("beta", 1.0), node.attr("transB", 0))
    bias = ed.shape(node.input(2)) if node.input(2) else (1,)
    return factors == (1.0, 1.0, 0) and bias is not None and len(bias) == 1


def follow(
    ed: Editor, node: Node, *, axis: int, rank: int, end: str | None = None
) -> tuple[list[Node], Affine] | None:
    """The nodes behind a linear node, or ``end``, that only scale and shift its channels."""
    channels = _out_channels(ed, node)
    chain: list[Node] = []
    total = Affine(np.ones(channels), np.zeros(channels))
    end = end or node.output
    while (user := ed.only_user(end)) is not None:
        step = affine_of(ed, user, end, channels, axis=axis, rank=rank)
        if step is None:
            break
        total = Affine(total.scale * step.scale, total.shift * step.scale + step.shift)
        chain.append(user)
        end = user.output
    return (chain, total) if chain and is_moderate(total) else None


def _out_channels(ed: Editor, node: Node) -> int:
    """The number of output channels of a linear node with a constant weight."""
    shape = tuple(ed.constants[node.input(1)].dims)
    if node.op == "Conv":
        return int(shape[0])
    if node.op == "ConvTranspose":
        return int(shape[1] * node.attr("group", 1))
    return int(shape[-1])


def scaled_weight(ed: Editor, node: Node, scale: Array) -> str:
    """The name of the node's weight with each output channel times its scale, shape (M,)."""
    name = node.input(1)
    weight = None if (scale == 1).all() else ed.array(name)
    if weight is None:
        return name
    return ed.add_constant(f"{name}_folded", _scale_channels(node, weight, scale))


def _scale_channels(node: Node, weight: Array, scale: Array) -> Array:
    wide = weight.astype(np.float64)
    if node.op == "Conv":
        wide = wide * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    elif node.op == "ConvTranspose":
        groups = node.attr("group", 1)
        rows = wide.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        wide = (rows * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        wide = wide * scale
    return wide.astype(weight.dtype)


def _fold(
    ed: Editor, node: Node, nodes: list[Node], affine: Affine, turn: Node | None = None
) -> Node | None:
    bias = ed.array(node.input(2))
    shift = affine.shift if bias is None else bias * affine.scale + affine.shift
    new = node.copied()
    made = [new]
    if turn is None:
        new.output[0] = nodes[-1].output
    else:
        back = turn.copied()
        back.output[0] = nodes[-1].output
        made.append(back)
    new.input[1] = scaled_weight(ed, node, affine.scale)
    if bias is not None or shift.any():
        del new.input[2:]
        new.input.append(
            ed.add_constant(f"{node.name}_bias", shift.astype(ed.dtype(node.input(1))))
        )
    ed.replace([node, *([turn] if turn is not None else []), *nodes], made)
    return ed.maker(new.output[0])
