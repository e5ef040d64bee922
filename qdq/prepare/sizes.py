"""Nodes whose size shape inference gets wrong, written so that it gets it right."""

import math

from qdq.prepare.editing import Editor, Node

__all__ = ["settle_sizes"]

_POOLS = ("AveragePool", "LpPool", "MaxPool")


def settle_sizes(ed: Editor) -> bool:
    """Give nodes whose size is inferred wrongly the padding that makes it plain.

    With ``ceil_mode`` a last window may begin in the padding behind the data. Runtimes leave it
    out; shape inference, of onnx as of onnxruntime (1.32), counts it. In place of ``ceil_mode``
    the pool gets the padding at the end with which it has the right size. Of a ConvTranspose with
    ``auto_pad`` of SAME the output has stride times the input's size (less, if the window is
    narrower than that), whatever ``output_padding``, which shape inference adds. It gets the
    padding that follows from that, or from ``output_shape``, so that nobody has to work it out.

    Nodes behind one of these have to wait until shapes were inferred again.

    Returns:
        Whether there was one.
    """
    unsure: set[str] = set()  # what is behind a size that was wrong
    for node in ed.nodes():
        pads = None
        if not unsure.isdisjoint((*node.inputs, *node.captures)):
            unsure.update(node.outputs)
        elif node.op in _POOLS:
            pads = _pool_pads(ed, node)
        elif node.op == "ConvTranspose":
            pads = _transposed_pads(ed, node)
        if pads is not None:
            node.set_attr("ceil_mode", None)
            node.set_attr("auto_pad", None)
            node.set_attr("output_shape", None)
            node.set_attr("pads", pads)
            unsure.update(node.outputs)
    return bool(unsure)


def _pool_pads(ed: Editor, node: Node) -> list[int] | None:
    """Padding with which a pool has its real size without ``ceil_mode``, if it has that.

    None where it is inferred rightly, where the size of its input is not known, and where more
    padding would count into what it computes.
    """
    sizes, auto = _sizes(ed, node), node.attr("auto_pad", "NOTSET")
    if sizes is None or not node.attr("ceil_mode", 0) or auto not in ("NOTSET", "VALID"):
        return None
    rank = len(sizes)
    none = [0] * (2 * rank)
    pads = none if auto == "VALID" else list(node.attr("pads", none))
    wrong, ends = False, []
    for size, kernel, stride, dilation, begin, end in zip(
        sizes,
        node.attr("kernel_shape"),
        node.attr("strides", [1] * rank),
        node.attr("dilations", [1] * rank),
        pads[:rank],
        pads[rank:],
        strict=True,
    ):
        room = begin + size + end - (kernel - 1) * dilation - 1
        steps = math.ceil(room / stride)
        if steps * stride >= begin + size:
            wrong, steps = True, steps - 1
        ends.append(end + max(0, steps * stride - room))
    counts = node.op == "LpPool" or node.attr("count_include_pad", 0)
    wide = any(e >= k for e, k in zip(ends, node.attr("kernel_shape"), strict=True))
    more = ends != pads[rank:]
    # runtimes want less padding than the kernel has values, however far those are apart
    return None if not wrong or (more and (counts or wide)) else [*pads[:rank], *ends]


def _transposed_pads(ed: Editor, node: Node) -> list[int] | None:
    """The padding that ``output_shape``, or ``auto_pad`` of SAME, of a ConvTranspose stands for.

    From the operator's definition: all of it is ``stride (size - 1) + output_padding + window -
    output``, with ``stride size`` for the output of SAME, and its odd half is at the end
    (SAME_UPPER) or at the beginning (all others). A window that is narrower than the stride gets
    none. None where there is neither, where sizes are not known, and where the output is larger
    than what is computed.
    """
    auto, wanted = node.attr("auto_pad", "NOTSET"), node.attr("output_shape", [])
    sizes, weight = _sizes(ed, node), ed.shape(node.input(1))
    same = auto in ("SAME_UPPER", "SAME_LOWER")
    kernel = node.attr("kernel_shape", (weight or ())[2:])
    if not (same or wanted) or not kernel or None in kernel or (wanted and sizes is None):
        return None
    rank = len(kernel)
    strides, dilations = (node.attr(n, [1] * rank) for n in ("strides", "dilations"))
    added = node.attr("output_padding", [0] * rank)
    totals = [  # beside an output of stride times the size
        (k - 1) * d + 1 + a - s
        for k, d, a, s in zip(kernel, dilations, added, strides, strict=True)
    ]
    if wanted:
        rows = zip(totals, strides, sizes or (), wanted[-rank:], strict=True)
        totals = [t + s * n - w for t, s, n, w in rows]
    else:
        totals = [max(0, t) for t in totals]
    if min(totals) < 0:
        return None
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*less, *more] if auto == "SAME_UPPER" else [*more, *less]


def _sizes(ed: Editor, node: Node) -> list[int] | None:
    """Spatial sizes of the input, if they are known."""
    dims = (ed.shape(node.input(0)) or ())[2:]
    sizes = [d for d in dims if d is not None]
    return sizes if dims and len(sizes) == len(dims) else None
