"""An input about some axes spelled out over all of them."""

import numpy as np

from qdq.prepare.editing import Array, Editor, Node

__all__ = ["scattered"]


def scattered(
    ed: Editor, node: Node, slot: int, whole: Array | None, index: Array, label: str
) -> str:
    """``whole`` (None: the shape of the node's data) with the values of an input at ``index``.

    Args:
        ed: the graph.
        node: gets a node or two before it where the values are not constant.
        slot: of the input.
        whole: what the other axes have.
        index: where in it the input's values go.
        label: for the name of the result.

    Returns:
        The name of the tensor.
    """
    values = ed.array(node.input(slot))
    if values is not None and whole is not None:
        value = np.array(whole, values.dtype)
        value[index] = values
        return ed.add_constant(label, value)
    if whole is not None:
        base = ed.add_constant(f"{label}_whole", whole)
    else:
        base = ed.fresh(f"{label}_whole")
        ed.add_before(node, ed.new_node("Shape", [node.input(0)], [base], ed.fresh(base)))
    where, made = ed.add_constant(f"{label}_axes", index), ed.fresh(label)
    inputs = [base, where, node.input(slot)]
    ed.add_before(node, ed.new_node("ScatterElements", inputs, [made], ed.fresh(label), axis=0))
    return made
