"""Nodes that do nothing, removed."""

from collections.abc import Callable

import numpy as np

from qdq.prepare.editing import Editor, Node
from qdq.prepare.node import drop_absent, drop_absent_inputs

__all__ = ["bypass", "drop_absent_slots", "drop_idle_nodes", "keeps_shape"]


def drop_absent_slots(ed: Editor) -> None:
    """Inputs and outputs that are absent at the end of a node's list are no longer told of.

    Behind an integer convolution onnxruntime (1.32) transposes all outputs of a MaxPool, the one
    that is not there too, and then misses it.
    """
    for node in ed.nodes():
        drop_absent(node.proto.output)
        drop_absent_inputs(node.proto)


def drop_idle_nodes(ed: Editor) -> None:
    """Remove nodes whose output is their input.

    Identity; Dropout (at inference it is y = x); Cast to the type that the tensor has; Concat
    and Sum of one tensor; Pad by nothing; Reshape, Transpose, Flatten and Expand that keep
    everything; Mul and Div by 1, Add and Sub of 0.
    """
    for node in ed.nodes():
        slot = _neutral_slot(ed, node)
        if slot is not None:
            bypass(ed, node, node.input(1 - slot))
        elif _is_idle(ed, node):
            bypass(ed, node, node.input(0))


def _is_idle(ed: Editor, node: Node) -> bool:
    check = _IDLE.get(node.op)
    return check is not None and check(ed, node)


def _casts_to_same(ed: Editor, node: Node) -> bool:
    return bool(ed.elem_type(node.input(0)) == node.attr("to"))


def _is_single(ed: Editor, node: Node) -> bool:
    return len(node.inputs) == 1


def _drops_nothing(ed: Editor, node: Node) -> bool:
    """A Dropout at inference whose mask is not read."""
    mode = node.input(2)
    return not (mode and ed.scalar(mode) != 0) and not any(ed.read(o) for o in node.outputs[1:])


def _pads_nothing(ed: Editor, node: Node) -> bool:
    pads = ed.array(node.input(1))
    return pads is not None and not pads.any()


def _keeps_order(ed: Editor, node: Node) -> bool:
    perm = node.attr("perm")
    return perm is not None and list(perm) == sorted(perm)


def _is_flat(ed: Editor, node: Node) -> bool:
    return ed.rank(node.input(0)) == 2 and node.attr("axis", 1) in (1, -1)


def _widens_nothing(ed: Editor, node: Node) -> bool:
    wanted = ed.array(node.input(1))
    return wanted is not None and _fits(tuple(wanted), ed.shape(node.input(0)))


def _fits(small: tuple[int | None, ...], shape: tuple[int | None, ...] | None) -> bool:
    """Whether a tensor of one shape broadcasts to another without widening that one."""
    if shape is None or len(small) > len(shape):
        return False
    return all(d in (1, whole) for d, whole in zip(small[::-1], shape[::-1], strict=False))


_NEUTRAL = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}


def _neutral_slot(ed: Editor, node: Node) -> int | None:
    """The slot of a constant that leaves the other input of the node as it is."""
    if node.op not in _NEUTRAL:
        return None
    for slot in (1,) if node.op in ("Div", "Sub") else (1, 0):
        value, shape = ed.array(node.input(slot)), ed.shape(node.input(1 - slot))
        if (
            value is not None
            and node.input(1 - slot) not in ed.constants
            and (_fits(value.shape, shape) or value.ndim == 0)
            and (value == _NEUTRAL[node.op]).all()
        ):
            return slot
    return None


def keeps_shape(ed: Editor, node: Node) -> bool:
    """Whether a Reshape does nothing."""
    shape, wanted = ed.shape(node.input(0)), ed.array(node.input(1))
    if shape is None or wanted is None or len(shape) != wanted.size:
        return False
    if node.attr("allowzero", 0) == 0:
        wanted = np.where(wanted == 0, [d if d is not None else 0 for d in shape], wanted)
    same = [d is not None and d == w for d, w in zip(shape, wanted, strict=True)]
    return all(same) or (same.count(False) == 1 and wanted[same.index(False)] == -1)


_IDLE: dict[str, Callable[[Editor, Node], bool]] = {
    "Identity": lambda ed, node: True,
    "Dropout": _drops_nothing,
    "Cast": _casts_to_same,
    "Concat": _is_single,
    "Sum": _is_single,
    "Max": _is_single,
    "Min": _is_single,
    "Mean": _is_single,
    "Pad": _pads_nothing,
    "Transpose": _keeps_order,
    "Reshape": keeps_shape,
    "Flatten": _is_flat,
    "Expand": _widens_nothing,
}


def bypass(ed: Editor, node: Node, x: str) -> None:
    """Remove a node with y = x; a graph output keeps its name, a captured tensor too."""
    y = node.output
    if y not in ed.outputs and not ed.captured(y):
        ed.redirect(y, x)
        ed.replace([node])
        return
    maker = ed.maker(x)
    if maker is None or x in ed.outputs or ed.captured(x):
        return  # an input or constant that is handed out, or two outputs of one tensor
    ed.set_output(maker, x, y)
    ed.redirect(x, y)
    ed.replace([node])
