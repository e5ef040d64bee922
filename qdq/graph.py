"""A read-only index of a model's main graph, and fresh names. Built once, O(nodes)."""

import heapq
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.weights import read

__all__ = [
    "Graph",
    "Use",
    "attributes",
    "captured_names",
    "detached",
    "for_checker",
    "sort_nodes",
    "subgraphs",
    "tensor_bytes",
    "topological_order",
    "without_large",
]


class Use(NamedTuple):
    """One place where a tensor is read: the node's index and its input slot.

    slot is -1 where a subgraph of the node (If, Loop, Scan) captures the tensor by name.
    """

    node: int
    slot: int


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        elif a.type == onnx.AttributeProto.GRAPHS:
            yield from a.graphs


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


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """The node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


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


def without_large(model: onnx.ModelProto, limit: int, *, as_inputs: bool = True) -> onnx.ModelProto:
    """A copy of the model without the data of initializers above ``limit`` bytes.

    With ``as_inputs`` these become graph inputs of the same type and shape, so the copy is a
    valid small model: for the checker, shape inference and the version converter, which cannot
    take more than 2 GB and are slow long before.
    """
    light = onnx.ModelProto()
    graph = model.graph
    _copy_fields(model, light, "graph")
    _copy_fields(graph, light.graph, "initializer")
    given = {v.name for v in graph.input}
    for t in graph.initializer:
        if tensor_bytes(t) <= limit:
            light.graph.initializer.add().CopyFrom(t)
        elif as_inputs and t.name not in given:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            )
    return light


def for_checker(model: onnx.ModelProto) -> onnx.ModelProto:
    """A small copy that onnx's checker judges as it would judge the model.

    The checker wants shapes of the graph's inputs and outputs, and types of its outputs; runtimes
    do not. Where they are missing, the copy has some.
    """
    light = without_large(model, 1024)
    for v in light.graph.output:
        if v.type.WhichOneof("value") in (None, "tensor_type") and not v.type.tensor_type.elem_type:
            v.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for v in (*light.graph.input, *light.graph.output):
        if v.type.HasField("tensor_type"):
            v.type.tensor_type.shape.SetInParent()
    return light


def detached(
    model: onnx.ModelProto, limit: int, kinds: Container[np.dtype[Any]]
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """A copy of the model that names its large initializers as external data, and their values.

    Initializers of up to ``limit`` bytes, and of types that are not in ``kinds``, stay inside.
    There is no external file; whoever loads the copy gives the values by name. Large ones that
    nothing reads are left out: runtimes drop them first and then miss them.
    """
    light = without_large(model, limit, as_inputs=False)
    inside = {t.name for t in light.graph.initializer}
    graph = Graph(model)
    values: dict[str, NDArray[Any]] = {}
    for t in model.graph.initializer:
        if t.name in inside or not (graph.uses(t.name) or t.name in graph.outputs):
            continue
        if onnx.helper.tensor_dtype_to_np_dtype(t.data_type) not in kinds:
            light.graph.initializer.add().CopyFrom(t)
            continue
        note = light.graph.initializer.add(name=t.name, data_type=t.data_type, dims=t.dims)
        note.data_location = onnx.TensorProto.EXTERNAL
        note.external_data.add(key="location", value="none")
        values[t.name] = read(t)
    return light, values


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's data, from its type and shape; the data is not touched."""
    if tensor.data_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return int(tensor.ByteSize())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * dtype.itemsize)


def _copy_fields(source: Any, target: Any, left_out: str) -> None:
    """Copy all fields of a protobuf message but one."""
    for descriptor, value in source.ListFields():
        if descriptor.name == left_out:
            continue
        mine = getattr(target, descriptor.name)
        if hasattr(mine, "add"):  # of messages; extend would serialize and parse each
            for message in value:
                mine.add().CopyFrom(message)
        elif hasattr(mine, "extend"):
            mine.extend(value)
        elif hasattr(mine, "CopyFrom"):
            mine.CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)


@dataclass(frozen=True)
class Graph:
    """Index of ``model.graph``; the model must not change while the index is in use.

    ``types``, where given, is a second model to read shapes from (after shape inference).
    ``views`` has what ``qdq.views`` has made of nodes so far, by index.
    """

    model: onnx.ModelProto
    types: onnx.ModelProto | None = field(default=None)
    views: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _shapes: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes in graph order; Use.node and producer hold indices into it."""
        return self._nodes

    @cached_property
    def _nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.graph.node)

    @cached_property
    def opset(self) -> int:
        """The version of the default operator set."""
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    @cached_property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        """Initializers that no caller can override (a graph input of that name is none)."""
        given = {v.name for v in self.model.graph.input}
        return {t.name: t for t in self.model.graph.initializer if t.name not in given}

    @cached_property
    def inputs(self) -> Mapping[str, onnx.ValueInfoProto]:
        """Graph inputs that the caller must or can feed (initializers' default inputs left out)."""
        own = {t.name for t in self.model.graph.initializer}
        return {v.name: v for v in self.model.graph.input if v.name not in own}

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of the graph outputs."""
        return frozenset(v.name for v in self.model.graph.output)

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Tensor name → index of the node that makes it."""
        return {o: i for i, n in enumerate(self._nodes) for o in n.output if o}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Use, ...]]:
        """Tensor name → its uses, captures by subgraphs included; graph outputs are not uses."""
        uses: dict[str, list[Use]] = {}
        for i, n in enumerate(self._nodes):
            for slot, name in enumerate(n.input):
                if name:
                    uses.setdefault(name, []).append(Use(i, slot))
            for name in sorted(captured_names(n)):
                uses.setdefault(name, []).append(Use(i, -1))
        return {k: tuple(v) for k, v in uses.items()}

    def uses(self, name: str) -> tuple[Use, ...]:
        """The uses of a tensor; empty if nothing reads it."""
        return self.consumers.get(name, ())

    def only_use(self, name: str) -> Use | None:
        """The single use of a tensor that is not a graph output, else None."""
        uses = self.uses(name)
        return (
            uses[0] if len(uses) == 1 and uses[0].slot >= 0 and name not in self.outputs else None
        )

    def array(self, name: str) -> NDArray[np.generic]:
        """The value of a constant."""
        return read(self.constants[name])

    def floats(self, name: str) -> NDArray[np.floating]:
        """The value of a constant that holds real numbers."""
        return read(self.constants[name])

    @cached_property
    def _infos(self) -> Mapping[str, onnx.TypeProto]:
        graph = (self.types or self.model).graph
        return {v.name: v.type for v in (*graph.value_info, *graph.input, *graph.output)}

    def elem_type(self, name: str) -> int:
        """Return the onnx element type number of a tensor; 0 if unknown."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        info = self._infos.get(name)
        return int(info.tensor_type.elem_type) if info is not None else 0

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape with None for unknown dimensions; None if the rank is unknown."""
        if name not in self._shapes:
            self._shapes[name] = self._shape(name)
        found: tuple[int | None, ...] | None = self._shapes[name]
        return found

    def _shape(self, name: str) -> tuple[int | None, ...] | None:
        if name in self.constants:
            return tuple(self.constants[name].dims)
        info = self._infos.get(name)
        if info is None or not info.tensor_type.HasField("shape"):
            return None
        dims = info.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)

    @cached_property
    def names(self) -> set[str]:
        """Every tensor and node name in the model, subgraphs included; for fresh names."""
        taken: set[str] = set()
        stack = [self.model.graph]
        while stack:
            g = stack.pop()
            taken.update(v.name for v in (*g.input, *g.output, *g.value_info))
            taken.update(t.name for t in g.initializer)
            for n in g.node:
                taken.add(n.name)
                taken.update(n.input)
                taken.update(n.output)
                stack.extend(subgraphs(n))
        return taken

    def fresh(self, name: str) -> str:
        """``name`` if it is free, else name_2, name_3, …; the result is then taken."""
        found, k = name, 1
        while found in self.names:
            k += 1
            found = f"{name}_{k}"
        self.names.add(found)
        return found
