"""Binary nodes with a scalar constant, as the units are spelled with them."""

from qdq.prepare.editing import Editor, Node

__all__ = ["other_input", "with_scalar"]


def with_scalar(ed: Editor, node: Node | None) -> tuple[str, float] | None:
    """A binary node's other input and the constant's value, if one input is a scalar constant.

    For Sub and Div only where the constant comes second.
    """
    if node is None:
        return None
    for slot in (1,) if node.op in ("Sub", "Div") else (1, 0):
        value = ed.scalar(node.input(slot))
        other = node.input(1 - slot)
        if value is not None and len(ed.constants[node.input(slot)].dims) <= (ed.rank(other) or 0):
            return other, value
    return None


def other_input(node: Node, name: str) -> str:
    """The other input of a binary node."""
    return node.input(1) if node.input(0) == name else node.input(0)
