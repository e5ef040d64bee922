"""An editable graph: nodes, constants and their uses, kept up to date by every edit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.graph import Graph, shape_of
from qdq.nested import topological_order
from qdq.prepare.node import Node, drop_absent_inputs
from qdq.weights import read, turned

__all__ = ["Array", "Editor", "Node"]

Array = NDArray[Any]


class Editor:
    """Holds a model while passes edit it; ``finish`` writes the edits back.

    Every method is O(1) in the size of the graph (``replace`` is linear in what it removes).

    Args:
        model: to edit.
        borrowed: initializers that ``model`` has without their data, as another model has them:
            what a protobuf message has once held takes memory until the whole message goes, so
            data that passes replace had better never be copied. ``fill`` copies the rest.

    Attributes:
        model: the model that is edited, in place.
        constants: initializers by name.
        outputs: names of the graph outputs.
        inputs: names of the graph inputs.
        types: element type and shape by tensor name, from shape inference.
        derived: constants made from another one by a pass: (source, what) → name.
    """

    def __init__(
        self, model: onnx.ModelProto, borrowed: Mapping[str, onnx.TensorProto] | None = None
    ) -> None:
        graph = model.graph
        self.model = model
        self.constants: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self._borrowed = dict(borrowed or {})
        self.constants.update(self._borrowed)
        self.outputs: set[str] = {v.name for v in graph.output}
        self.inputs: set[str] = {v.name for v in graph.input}
        self.types: dict[str, onnx.TypeProto] = {}
        self.derived: dict[tuple[str, str], str] = {}
        self._names = Graph(model)
        self._slots: list[list[Node]] = []
        self._slot_of: dict[Node, int] = {}
        self._maker: dict[str, Node] = {}
        self._users: dict[str, dict[Node, int]] = {}
        for proto in graph.node:
            self._slots.append([])
            self._insert(Node(proto), len(self._slots) - 1)

    # Reading

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self._names.opset

    def nodes(self, *ops: str) -> list[Node]:
        """The nodes in order, of the given operators (all if none); a snapshot."""
        return [n for slot in self._slots for n in slot if not ops or n.op in ops]

    def __contains__(self, node: Node) -> bool:
        return node in self._slot_of

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes a tensor, if it is one of ``ops`` (of any operator if none)."""
        node = self._maker.get(name)
        return node if node is not None and (not ops or node.op in ops) else None

    def users(self, name: str) -> list[Node]:
        """The nodes that read a tensor, once each; subgraph captures included."""
        return list(self._users.get(name, ()))

    def only_user(self, name: str, *ops: str) -> Node | None:
        """The node that alone reads the tensor, in one slot; None for a graph output."""
        users = self._users.get(name, {})
        if len(users) != 1 or name in self.outputs:
            return None
        ((node, count),) = users.items()
        return node if count == 1 and name in node.inputs and (not ops or node.op in ops) else None

    def captured(self, name: str) -> bool:
        """Whether a subgraph reads the tensor by name."""
        return any(name in n.captures for n in self._users.get(name, ()))

    def read(self, name: str) -> bool:
        """Whether anything reads the tensor, the caller of the model included."""
        return bool(self._users.get(name)) or name in self.outputs

    def array(self, name: str) -> Array | None:
        """The value of a constant; None for anything else. Read-only."""
        if name not in self.constants:
            return None
        value = read(self.constants[name])
        value.setflags(write=False)
        return value

    def scalar(self, name: str) -> float | None:
        """The value of a constant with a single element; None for anything else."""
        if name not in self.constants or np.prod(self.constants[name].dims, dtype=np.int64) != 1:
            return None
        value = self.array(name)
        return None if value is None else float(value.reshape(-1)[0])

    def elem_type(self, name: str) -> int:
        """The onnx element type of a tensor; 0 if unknown."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        t = self.types.get(name)
        return int(t.tensor_type.elem_type) if t is not None else 0

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """The numpy type of a tensor; None if unknown."""
        elem_type = self.elem_type(name)
        return onnx.helper.tensor_dtype_to_np_dtype(elem_type) if elem_type else None

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape with None for unknown dimensions; None if the rank is unknown."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        t = self.types.get(name)
        return None if t is None else shape_of(t)

    def rank(self, name: str) -> int | None:
        """The rank of a tensor; None if unknown."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    # Editing

    def set_type(self, name: str, elem_type: int, shape: Sequence[int | None] | None) -> None:
        """Note the element type and shape of a new tensor."""
        self.types[name] = onnx.helper.make_tensor_type_proto(elem_type, shape)

    def fresh(self, name: str) -> str:
        """A name that nothing in the model has: ``name``, else name_2, name_3, …."""
        return self._names.fresh(name)

    def add_constant(self, name: str, value: Array) -> str:
        """Add an initializer under a fresh name like ``name``; returns its name."""
        name = self.fresh(name)
        plain = np.asarray(value, order="C")  # ascontiguousarray would give a scalar an axis
        self.constants[name] = onnx.numpy_helper.from_array(plain, name)
        return name

    def set_constant(self, name: str, value: Array) -> None:
        """Give an initializer another value of the same type, for all that read it."""
        changed = onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        if name in self._borrowed:  # another model's: ``fill`` will copy this one
            self.constants[name] = self._borrowed[name] = changed
        else:
            self.constants[name].CopyFrom(changed)

    def add_turned(self, name: str, source: str) -> str:
        """Add the transpose of a matrix that stays in its file, without reading it."""
        name = self.fresh(name)
        self.constants[name] = turned(self.constants[source], name)
        return name

    def become_constant(self, name: str, tensor: onnx.TensorProto) -> None:
        """Make the tensor of that name an initializer; the caller removes the node making it."""
        own = onnx.TensorProto()
        own.CopyFrom(tensor)
        own.name = name
        own.doc_string = ""
        self.constants[name] = own

    def new_node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attrs: Any
    ) -> onnx.NodeProto:
        """A node proto of the default domain, for ``replace``; the name must be fresh."""
        return onnx.helper.make_node(op, list(inputs), list(outputs), name=name, **attrs)

    def add_before(self, node: Node, proto: onnx.NodeProto) -> Node:
        """Add a node directly before another."""
        slot = self._slot_of[node]
        return self._insert(Node(proto), slot, self._slots[slot].index(node))

    def add_after(self, node: Node, proto: onnx.NodeProto) -> Node:
        """Add a node directly behind another."""
        slot = self._slot_of[node]
        return self._insert(Node(proto), slot, self._slots[slot].index(node) + 1)

    def replace(self, old: Iterable[Node], new: Sequence[onnx.NodeProto] = ()) -> None:
        """Put new nodes in the place of old ones, and drop makers that nothing reads any more.

        The new nodes stand where the last of the old ones stood. The caller sees to it that
        every tensor still read has a maker.
        """
        gone = list(old)
        slot = max(self._slot_of[n] for n in gone)
        at = max(self._slots[slot].index(n) for n in gone if self._slot_of[n] == slot)
        for i, proto in enumerate(new):
            self._insert(Node(proto), slot, at + 1 + i)
        for n in gone:
            self._remove(n)
        self.prune(m for g in gone for i in g.inputs if (m := self._maker.get(i)) is not None)

    def prune(self, nodes: Iterable[Node]) -> None:
        """Remove those of the nodes that nothing reads, and then their makers likewise."""
        stack = list(nodes)
        while stack:
            n = stack.pop()
            if n not in self._slot_of or any(self.read(o) for o in n.outputs if o):
                continue
            self._remove(n)
            makers = (self._maker.get(i) for i in (*n.inputs, *n.captures))
            stack.extend(m for m in makers if m is not None)

    def set_input(self, node: Node, slot: int, name: str) -> None:
        """Let a node read another tensor at a slot; later optional slots are filled up."""
        self._count(node, [node.input(slot)], -1)
        while len(node.proto.input) <= slot:
            node.proto.input.append("")
        node.proto.input[slot] = name
        drop_absent_inputs(node.proto)
        self._count(node, [name], 1)

    def set_output(self, node: Node, old: str, new: str) -> None:
        """Let a node make ``new`` in place of ``old``."""
        del self._maker[old]
        for i, o in enumerate(node.outputs):
            if o == old:
                node.proto.output[i] = new
        self._maker[new] = node
        if old in self.types:
            self.types[new] = self.types[old]

    def redirect(self, old: str, new: str) -> None:
        """Let every node that reads ``old`` read ``new``; ``old`` must not be captured."""
        for node in self.users(old):
            for slot, name in enumerate(node.inputs):
                if name == old:
                    self.set_input(node, slot, new)

    def set_type_like(self, name: str, like: str) -> None:
        """Give a new tensor the element type and shape of another."""
        if like in self.types:
            self.types[name] = self.types[like]

    def finish(self) -> None:
        """Write the nodes and constants back to the model: sorted, nothing unread among them."""
        nodes = self.nodes()
        self.prune(reversed(nodes))
        nodes = self.nodes()
        order = topological_order([((*n.inputs, *n.captures), n.outputs) for n in nodes])
        graph = self.model.graph
        protos = [nodes[i].proto for i in order]
        del graph.node[:]
        graph.node.extend(protos)
        self._finish_constants()

    def fill(self) -> None:
        """Copy the borrowed data that is still read into the model, behind the last ``finish``."""
        for t in self.model.graph.initializer:
            if t.name in self._borrowed:
                t.CopyFrom(self._borrowed[t.name])

    def _finish_constants(self) -> None:
        """Drop unread initializers and append new ones; the data of the others stays in place."""
        tensors = self.model.graph.initializer
        self.constants = {n: t for n, t in self.constants.items() if self.read(n)}
        for i in reversed(range(len(tensors))):
            if tensors[i].name not in self.constants:
                del tensors[i]
        present = {t.name for t in tensors}
        for name, t in self.constants.items():
            if name not in present:
                self.constants[name] = tensors.add()
                self.constants[name].CopyFrom(t)  # append would serialize and parse it

    def _insert(self, node: Node, slot: int, at: int | None = None) -> Node:
        here = self._slots[slot]
        here.insert(len(here) if at is None else at, node)
        self._slot_of[node] = slot
        self._maker.update({o: node for o in node.outputs if o})
        self._count(node, (*node.inputs, *node.captures), 1)
        return node

    def _remove(self, node: Node) -> None:
        self._slots[self._slot_of.pop(node)].remove(node)
        self._count(node, (*node.inputs, *node.captures), -1)
        for o in node.outputs:
            if self._maker.get(o) is node:
                del self._maker[o]

    def _count(self, node: Node, names: Iterable[str], step: int) -> None:
        for name in names:
            if not name:
                continue
            users = self._users.setdefault(name, {})
            users[node] = users.get(node, 0) + step
            if not users[node]:
                del users[node]
