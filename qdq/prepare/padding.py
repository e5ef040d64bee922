"""Pad nodes folded into the operator behind them."""

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scatter import scattered

__all__ = ["fold_pads", "whole_pads"]


_WIDEST = 3


def whole_pads(ed: Editor) -> None:
    """Pad names every axis, as it did before opset 18 brought ``axes``; the others have 0.

    onnxruntime loses count of the axes where it moves such a Pad to channels-last. A Pad whose
    axes or rank are not known stays.
    """
    for node in ed.nodes("Pad"):
        rank = ed.rank(node.input(0))
        axes = ed.array(node.input(3)) if node.input(3) else None
        if rank is None or axes is None:
            continue
        index = axes.astype(np.int64).reshape(-1) % rank
        both = np.concatenate([index, index + rank])
        none = np.zeros(2 * rank, np.int64)
        ed.set_input(node, 1, scattered(ed, node, 1, none, both, f"{node.name}_pads"))
        ed.set_input(node, 3, "")


def fold_pads(ed: Editor) -> None:
    """Zero padding before a Conv or a pool becomes the operator's own padding.

    Exact for Conv, which pads with zeros itself. AveragePool must count its padding
    (count_include_pad): it divides by the whole window, as it did over the padded tensor.
    MaxPool pads with -inf, which is as good as 0 behind a Relu, as in TensorFlow's ResNets: each
    window must have a value of the image in it. Only spatial axes, and no negative padding. Each
    reader takes the padding by itself; for what cannot, the Pad stays. Padding wider than 3 stays
    a Pad: a blocked convolution computes what touches the padding position by position, and a
    kernel of 64 with half of it padding was measured to run at half the speed.
    """
    for node in ed.nodes("Pad"):
        pads = _spatial_pads(ed, node)
        if pads is None or max(pads) > _WIDEST:
            continue
        for user in ed.users(node.output):
            _fold(ed, node, user, pads)
        ed.prune([node])


def _fold(ed: Editor, node: Node, user: Node, pads: list[int]) -> None:
    """Let a reader of a Pad do its work, if it can."""
    if user.op not in ("Conv", "AveragePool", "MaxPool") or user.input(0) != node.output:
        return
    own = _own_pads(user, len(pads))
    if own is None or (user.op != "Conv" and not _pool_takes(user, own, pads)):
        return
    if user.op == "MaxPool" and not _is_above_zero(ed, node.input(0)):
        return
    user.set_attr("auto_pad", None)
    user.set_attr("pads", [a + b for a, b in zip(own, pads, strict=True)])
    if user.op == "AveragePool":
        user.set_attr("count_include_pad", 1)
    ed.set_input(user, 0, node.input(0))


def _spatial_pads(ed: Editor, node: Node) -> list[int] | None:
    """Padding per spatial axis, all begins and then all ends; None if the Pad is another kind."""
    rank, given = ed.rank(node.input(0)), ed.array(node.input(1))
    if rank is None or given is None or (given < 0).any():
        return None
    if node.attr("mode", "constant") != "constant":
        return None
    if node.input(2) and ed.scalar(node.input(2)) != 0:
        return None
    if node.input(3):
        return None
    pads = given.reshape(2, -1)
    return None if rank < 3 or pads[:, :2].any() else [int(p) for p in pads[:, 2:].reshape(-1)]


def _own_pads(node: Node, count: int) -> list[int] | None:
    if node.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    return list(node.attr("pads", [0] * count))


def _pool_takes(node: Node, own: list[int], pads: list[int]) -> bool:
    """Whether a pool can take more padding; runtimes want it smaller than the kernel."""
    if node.op == "AveragePool" and any(own) and not node.attr("count_include_pad", 0):
        return False
    if node.op == "MaxPool" and (len(node.outputs) > 1 or set(node.attr("dilations", [1])) != {1}):
        return False  # where in the image its values come from; windows with gaps
    kernel = list(node.attr("kernel_shape")) * 2
    fits = all(a + b < k for a, b, k in zip(own, pads, kernel, strict=True))
    return fits and not node.attr("ceil_mode", 0)


def _is_above_zero(ed: Editor, x: str) -> bool:
    """Whether no value of a tensor is below 0, because of what makes it."""
    maker = ed.maker(x, "Clip", "Relu", "Sigmoid")
    if maker is None or maker.op != "Clip":
        return maker is not None
    low = ed.scalar(maker.input(1)) if maker.input(1) else None
    return low is not None and low >= 0
