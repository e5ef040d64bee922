"""Excerpts of a model for one session: other outputs, only what they need, nodes beside its own.

All functions change the ModelProto that they are given, which is the session's own copy.
"""

from collections.abc import Container, Iterable, Sequence

import onnx

from qdq.borrowed import import_runtime
from qdq.nested import captured_names

__all__ = ["add_nodes", "make_inputs", "reduce_to"]


def add_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Add nodes, and import what they need."""
    model.graph.node.extend(nodes)
    import_runtime(model)


def make_inputs(model: onnx.ModelProto, names: Container[str]) -> None:
    """Turn initializers into inputs."""
    graph = model.graph
    given = {v.name for v in graph.input}
    for i in reversed(range(len(graph.initializer))):
        t = graph.initializer[i]
        if t.name not in names:
            continue
        if t.name not in given:
            graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        del graph.initializer[i]


def reduce_to(model: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Make the named tensors the model's outputs, and drop what they do not need.

    Their types are left to the runtime's inference.
    """
    own = {v.name: v for v in model.graph.output}
    values = [own.get(n, onnx.ValueInfoProto(name=n)) for n in dict.fromkeys(outputs)]
    del model.graph.output[:]
    model.graph.output.extend(values)
    _prune(model)


def _prune(model: onnx.ModelProto) -> None:
    """Drop the nodes that no output needs, and the initializers that only they read."""
    graph = model.graph
    wanted = {v.name for v in graph.output}
    unused = []
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if wanted.isdisjoint(node.output):
            unused.append(i)
        else:
            wanted.update(n for n in node.input if n)
            wanted |= captured_names(node)
    for i in unused:
        del graph.node[i]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in wanted:
            del graph.initializer[i]
