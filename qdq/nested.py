"""Graphs within graphs (If, Loop, Scan): walks, what they capture, an order of nodes for all."""

import heapq
from collections.abc import Iterable, Iterator, Sequence

import onnx

__all__ = [
    "all_graphs",
    "all_nodes",
    "captured_names",
    "graphs_within",
    "sort_nodes",
    "subgraphs",
    "topological_order",
]


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        elif a.type == onnx.AttributeProto.GRAPHS:
            yield from a.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that are nested in its nodes, outer ones first."""
    yield graph
    yield from graphs_within(graph.node)


def graphs_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """All graphs that are nested in the nodes, however deep, outer ones first."""
    for node in nodes:
        for graph in subgraphs(node):
            yield from all_graphs(graph)


def all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, then those of all graphs that are nested in them."""
    yield from nodes
    yield from (n for graph in graphs_within(nodes) for n in graph.node)


def captured_names(node: onnx.NodeProto) -> frozenset[str]:
    """Names that the node's subgraphs read from the scopes outside of them."""
    found: set[str] = set()
    for g in subgraphs(node):
        own = {v.name for v in g.input} | {t.name for t in g.initializer}
        own |= {t.values.name for t in g.sparse_initializer}
        inner: set[str] = {v.name for v in g.output}
        for n in g.node:
            inner.update(n.input)
            inner |= captured_names(n)
            own.update(n.output)
        found |= inner - own
    return frozenset(found - {""})


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort a graph's nodes topologically, in place, subgraphs too; sorted graphs stay as they are.

    Captures by subgraphs count as inputs. Among the nodes that are ready, the one that came
    first in the graph comes first. Nodes on a cycle stay at the end, for the checker to refuse.
    """
    for n in graph.node:
        for g in subgraphs(n):
            sort_nodes(g)
    nodes = list(graph.node)
    order = topological_order([(set(n.input) | captured_names(n), n.output) for n in nodes])
    if order != list(range(len(nodes))):
        del graph.node[:]
        graph.node.extend(nodes[i] for i in order)


def topological_order(
    nodes: Sequence[tuple[Iterable[str], Iterable[str]]],
) -> list[int]:
    """Order of nodes given as (names read, names made): makers first, else the given order."""
    maker = {name: i for i, (_, made) in enumerate(nodes) for name in made if name}
    needs = [{maker[r] for r in read if r in maker} - {i} for i, (read, _) in enumerate(nodes)]
    followers: list[list[int]] = [[] for _ in nodes]
    for i, before in enumerate(needs):
        for j in before:
            followers[j].append(i)
    missing = [len(before) for before in needs]
    ready = [i for i, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in followers[i]:
            missing[j] -= 1
            if not missing[j]:
                heapq.heappush(ready, j)
    done = set(order)
    return order + [i for i in range(len(nodes)) if i not in done]
