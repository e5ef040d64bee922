"""Layer normalization spelled out in small nodes, put back into one operator."""

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.scalars import other_input

__all__ = ["layer_norms"]

_MEANS = ("GlobalAveragePool", "ReduceMean")


def layer_norms(ed: Editor) -> None:
    """Layer normalization over the last axis, spelled out, becomes LayerNormalization.

    ``y = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + epsilon) * scale + bias`` (Ba et al.,
    arXiv:1607.06450), scale and bias constants of shape (N,). TensorFlow has it as
    ``x r + (bias - mean(x) r)`` with ``r = scale / sqrt(…)``. The operator came with opset 17.
    """
    if ed.opset < 17:
        return
    for sub in ed.nodes("Sub"):
        found = (_layer_norm(ed, sub) or _by_factor(ed, sub)) if sub in ed else None
        if not found:
            continue
        old, epsilon, scale, bias = found
        x, y = sub.input(0), old[-1].output
        name = ed.fresh(f"{old[-1].name}_layer_norm")
        inputs = [x, scale, bias] if bias else [x, scale]
        new = ed.new_node("LayerNormalization", inputs, [y], name, axis=-1, epsilon=epsilon)
        ed.replace(old, [new])


def _layer_norm(ed: Editor, sub: Node) -> tuple[list[Node], float, str, str] | None:
    """From ``x - mean(x)``: the nodes up to the result, epsilon, scale and bias."""
    readers = ed.users(sub.output)
    div = next((n for n in readers if n.op == "Div" and n.input(0) == sub.output), None)
    found = None if div is None or len(readers) != 2 else _deviation(ed, sub)
    if div is None or found is None:
        return None
    x, (old, epsilon) = sub.input(0), found
    root = old[-1]
    if div.input(1) != root.output:
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
    return [*old, div, mul, shift], epsilon, scale, bias


def _deviation(ed: Editor, sub: Node) -> tuple[list[Node], float] | None:
    """From ``x - mean(x)``: the nodes up to ``sqrt(mean((x - mean(x))**2) + epsilon)``, epsilon."""
    x, centred = sub.input(0), sub.output
    mean = ed.maker(sub.input(1), *_MEANS)
    if mean is None or mean.input(0) != x or not _over_last(ed, mean, x):
        return None
    square = next((n for n in ed.users(centred) if _is_square(ed, n, centred)), None)
    variance = None if square is None else ed.only_user(square.output, *_MEANS)
    if square is None or variance is None or not _over_last(ed, variance, x):
        return None
    add = ed.only_user(variance.output, "Add")
    epsilon = None if add is None else ed.scalar(other_input(add, variance.output))
    root = None if add is None else ed.only_user(add.output, "Sqrt")
    if add is None or root is None or epsilon is None or centred in ed.outputs:
        return None
    return [sub, square, variance, add, root], epsilon


def _by_factor(ed: Editor, sub: Node) -> tuple[list[Node], float, str, str] | None:
    """As ``_layer_norm``, where the factor is computed first."""
    found = _deviation(ed, sub) if len(ed.users(sub.output)) == 1 else None
    inverse = None if found is None else ed.only_user(found[0][-1].output, "Reciprocal")
    if found is None or inverse is None:
        return None
    x, mean, (old, epsilon) = sub.input(0), sub.input(1), found
    mul = ed.only_user(inverse.output, "Mul")
    factor = inverse if mul is None else mul
    readers = ed.users(factor.output)
    whole = next((n for n in readers if n.op == "Mul" and x in n.inputs), None)
    means = next((n for n in readers if n.op == "Mul" and n is not whole), None)
    if whole is None or means is None or len(readers) != 2 or factor.output in ed.outputs:
        return None
    shifted = _shifted(ed, whole, means, mean, factor.output)
    scale = "" if mul is None else _of_last(ed, other_input(mul, inverse.output), x)
    bias = None if shifted is None else _of_last(ed, shifted[1], x)
    if shifted is None or scale is None or bias is None:
        return None
    middle = [inverse] if mul is None else [inverse, mul]
    old += [*middle, whole, means, *shifted[0]]
    return old, epsilon, scale or _ones(ed, x), bias


def _shifted(
    ed: Editor, whole: Node, means: Node, mean: str, factor: str
) -> tuple[list[Node], str] | None:
    """The nodes of ``whole + (bias - mean factor)`` behind the two products; the bias, or ""."""
    of = other_input(means, factor)
    neg = ed.maker(of, "Neg")
    if mean not in ((of,) if neg is None else neg.inputs):
        return None
    last, after = ed.only_user(whole.output), ed.only_user(means.output)
    if last is None or after is None:
        return None
    less = after.op == "Sub" and neg is None and after.input(1) == means.output
    if not less and (after.op != "Add" or neg is None):
        return None
    if after is last:
        return [last], ""
    if last.op != "Add" or ed.only_user(after.output) is not last:
        return None
    return [after, last], other_input(after, means.output)


def _of_last(ed: Editor, name: str, x: str) -> str | None:
    """A constant along the last axis of x alone, as a vector; "" stays, None for what is none."""
    value, width = ed.array(name), (ed.shape(x) or (None,))[-1]
    if not name:
        return name
    if value is None or value.size != width or (value.shape or (1,))[-1] != width:
        return None
    if value.ndim > (ed.rank(x) or 0):
        return None
    return name if value.ndim == 1 else ed.add_constant(f"{name}_vector", value.reshape(-1))


def _ones(ed: Editor, x: str) -> str:
    width = (ed.shape(x) or (1,))[-1] or 1
    return ed.add_constant(f"{x}_ones", np.ones(width, ed.dtype(x) or np.float32))


def _is_square(ed: Editor, node: Node, x: str) -> bool:
    if node.op == "Pow":
        return node.input(0) == x and ed.scalar(node.input(1)) == 2
    return node.op == "Mul" and node.inputs == (x, x)


def _over_last(ed: Editor, node: Node, x: str) -> bool:
    """Whether a reduction is over the last axis alone, which it keeps."""
    if node.op == "GlobalAveragePool":
        return ed.rank(x) == 3
    axes = ed.array(node.input(1)) if node.input(1) else np.array(node.attr("axes", []))
    rank = ed.rank(x)
    if axes is None or rank is None or axes.size != 1 or not node.attr("keepdims", 1):
        return False
    return int(axes.item()) in (-1, rank - 1)
