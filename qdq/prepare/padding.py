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
    """Zero padding before a Conv or AveragePool becomes the operator's own padding.

    Exact for Conv, which pads with zeros itself. AveragePool must count its padding
    (count_include_pad): it divides by the whole window, as it did over the padded tensor.
    MaxPool pads with -inf and is left. Only spatial axes, no negative padding, and only if
    nothing else reads the padded tensor. Padding wider than 3 stays a Pad: a blocked
    convolution computes what touches the padding position by position, and a kernel of 64 with
    half of it padding was measured to run at half the speed.
    """
    for node in ed.nodes("Pad"):
        user = ed.only_user(node.output, "Conv", "AveragePool")
        pads = None if user is None else _spatial_pads(ed, node)
        if user is None or pads is None or user.input(0) != node.output:
            continue
        own = _own_pads(user, len(pads))
        if (
            own is None
            or max(pads) > _WIDEST
            or (user.op == "AveragePool" and not _pool_takes(user, own, pads))
        ):
            continue
        user.set_attr("auto_pad", None)
        user.set_attr("pads", [a + b for a, b in zip(own, pads, strict=True)])
        if user.op == "AveragePool":
            user.set_attr("count_include_pad", 1)
        ed.set_input(user, 0, node.input(0))
        ed.prune([node])


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
    """Whether an AveragePool can take more padding; runtimes want it smaller than the kernel."""
    if any(own) and not node.attr("count_include_pad", 0):
        return False
    kernel = list(node.attr("kernel_shape")) * 2
    fits = all(a + b < k for a, b, k in zip(own, pads, kernel, strict=True))
    return fits and not node.attr("ceil_mode", 0)
