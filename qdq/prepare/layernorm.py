"""Layer normalization spelled out in small nodes, put back into one operator."""

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import other_input

__all__ = ["layer_norms"]


def layer_norms(ed: Editor) -> None:
    """Layer normalization over the last axis, spelled out, becomes LayerNormalization.

    ``y = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + epsilon) * scale + bias`` (Ba et al.,
    arXiv:1607.06450), scale and bias constants of shape (N,). The operator came with opset 17.
    """
    if ed.opset < 17:
        return
    for sub in ed.nodes("Sub"):
        found = sub in ed and _layer_norm(ed, sub)
        if not found:
            continue
        old, epsilon, scale, bias = found
        x, y = sub.input(0), old[-1].output
        name = ed.fresh(f"{old[-1].name}_layer_norm")
        inputs = [x, scale, bias]
        new = ed.new_node("LayerNormalization", inputs, [y], name, axis=-1, epsilon=epsilon)
        ed.replace(old, [new])


def _layer_norm(ed: Editor, sub: Node) -> tuple[list[Node], float, str, str] | None:
    """From ``x - mean(x)``: the nodes up to the result, epsilon, scale and bias."""
    x, centred = sub.input(0), sub.output
    mean = ed.maker(sub.input(1), "ReduceMean")
    if mean is None or mean.input(0) != x or not _over_last(ed, mean, x):
        return None
    readers = ed.users(centred)
    square = next((n for n in readers if _is_square(ed, n, centred)), None)
    div = next((n for n in readers if n.op == "Div" and n.input(0) == centred), None)
    if square is None or div is None or len(readers) != 2 or centred in ed.outputs:
        return None
    variance = ed.only_user(square.output, "ReduceMean")
    if variance is None or not _over_last(ed, variance, x):
        return None
    add = ed.only_user(variance.output, "Add")
    epsilon = None if add is None else ed.scalar(other_input(add, variance.output))
    root = None if add is None else ed.only_user(add.output, "Sqrt")
    if add is None or epsilon is None or root is None or div.input(1) != root.output:
        return None
    mul = ed.only_user(div.output, "Mul") if ed.only_user(root.output) is div else None
    shift = None if mul is None else ed.only_user(mul.output, "Add")
    if mul is None or shift is None:
        return None
    scale, bias = other_input(mul, div.output), other_input(shift, mul.output)
    width = (ed.shape(x) or (None,))[-1]
    if width is None or not ed.shape(scale) == ed.shape(bias) == (width,):
        return None
    if scale not in ed.constants or bias not in ed.constants:
        return None
    return [sub, square, variance, add, root, div, mul, shift], epsilon, scale, bias


def _is_square(ed: Editor, node: Node, x: str) -> bool:
    if node.op == "Pow":
        return node.input(0) == x and ed.scalar(node.input(1)) == 2
    return node.op == "Mul" and node.inputs == (x, x)


def _over_last(ed: Editor, node: Node, x: str) -> bool:
    """Whether a reduction is over the last axis alone, which it keeps."""
    axes = ed.array(node.input(1)) if node.input(1) else np.array(node.attr("axes", []))
    rank = ed.rank(x)
    if axes is None or rank is None or axes.size != 1 or not node.attr("keepdims", 1):
        return False
    return int(axes.item()) in (-1, rank - 1)
