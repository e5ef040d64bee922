"""What became of the nodes of the user's model, whose names rules take."""

import onnx

from qdq.facts import RUNTIME
from qdq.graph import Graph

__all__ = ["Successors"]

# nodes that prepare removes without putting anything in their place
_IDLE = frozenset({"Constant", "Dropout", "Identity", "Cast", "Shape"})


class Successors:
    """Which prepared nodes stand for a node of the user's model.

    The one that makes the same tensor; else the one of the same name; else, where the node became
    part of another (the Add inside a hard-swish), what became of the nodes behind it. A node that
    is simply gone (Identity, a folded constant) has none. Of one of the runtime's own, which may
    have been taken apart: all its parts.
    """

    def __init__(self, graph: Graph, source: Graph) -> None:
        self.graph, self.source = graph, source
        self._ops = {n.name: n.op_type for n in graph.nodes}
        self._own = {*source.inputs, *source.producer}
        self._names = {n.name for n in source.nodes}

    def of(self, index: int) -> set[str]:
        """Names of the prepared nodes that stand for the one of that index in the user's model."""
        nodes = self.source.nodes
        found: set[str] = set()
        seen, todo = {index}, [index]
        while todo:
            node = nodes[todo.pop()]
            here = {maker.name for o in node.output if (maker := self.graph.maker(o)) is not None}
            if not here and node.name in self._ops:
                here = {node.name}
            if node.domain == RUNTIME:
                here |= self._parts(node)
            found |= here
            if here or node.op_type in _IDLE:
                continue
            behind = {use.node for o in node.output for use in self.source.uses(o)}
            # a node that kept its name but not its operator took others in
            gone = {i for i in behind if self._ops.get(nodes[i].name) != nodes[i].op_type}
            todo += sorted(gone - seen)
            seen |= gone
        return found

    def _parts(self, node: onnx.NodeProto) -> set[str]:
        """What makes its results, back to the tensors and nodes that the user's model has too.

        Such a node may have taken a part in: the product before it, its bias.
        """
        found: set[str] = set()
        todo = list(node.output)
        while todo:
            part = self.graph.maker(todo.pop())
            if part is None or part.name in found:
                continue
            if part.name == node.name or part.name not in self._names:
                found.add(part.name)
                todo += [i for i in part.input if i not in self._own]
        return found
