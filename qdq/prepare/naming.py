"""Node names, and one role for each constant."""

from qdq.prepare.editing import Editor, Node

__all__ = ["name_nodes", "split_roles"]

_FLOATS = (1, 10, 11, 16)


def name_nodes(ed: Editor) -> None:
    """Every node gets a name of its own: ``{op_type}_{k}`` if it has none, ``{name}_{k}`` if
    another node before it has the name.
    """  # noqa: D205
    seen: set[str] = set()
    count: dict[str, int] = {}
    for node in ed.nodes():
        name = node.name
        if not name:
            op = node.proto.op_type
            count[op] = count.get(op, -1) + 1
            name = ed.fresh(f"{op}_{count[op]}")
        elif name in seen:
            name = ed.fresh(name)
        node.proto.name = name
        seen.add(name)


def split_roles(ed: Editor) -> None:
    """A constant that is read in two roles is copied, so that each has one role.

    A role is what decides the constant's quantization: the kind of operator, the input slot,
    the channel axis. Two Conv with one weight go on sharing it; Gather and Gemm with one
    weight do not. A bias has the scale of one node's input and weight, so each linear node
    gets a bias of its own. The first role keeps the name; what a subgraph captures, too.
    """
    roles: dict[str, dict[tuple[object, ...], str]] = {}
    for node in ed.nodes():
        for slot, name in enumerate(node.inputs):
            if name not in ed.constants or ed.constants[name].data_type not in _FLOATS:
                continue
            taken = roles.setdefault(name, {("captured",): name} if ed.captured(name) else {})
            role = _role(node, slot)
            if role not in taken:
                taken[role] = name if not taken else _copy(ed, name, node)
            if taken[role] != name:
                ed.set_input(node, slot, taken[role])


def _role(node: Node, slot: int) -> tuple[object, ...]:
    if node.op in ("Conv", "ConvTranspose", "Gemm") and slot == 2:
        return ("bias", node.name)
    if node.op in ("Conv", "ConvTranspose") and slot == 1:
        return (node.op, node.attr("group", 1))
    if node.op in ("Gemm", "MatMul") and slot == 1:
        return ("matmul", bool(node.attr("transB", 0)))
    return (node.op, slot)


def _copy(ed: Editor, name: str, node: Node) -> str:
    value = ed.array(name)
    if value is None:
        return name
    return ed.add_constant(f"{name}_{node.name}", value)
