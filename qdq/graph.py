"""A read-only index of a model's main graph, and fresh names. Built once, O(nodes)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = ["Graph", "Use", "attributes", "captured_names", "subgraphs"]


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


@dataclass(frozen=True)
class Graph:
    """Index of ``model.graph``; the model must not change while the index is in use.

    ``types``, where given, is a second model to read shapes from (after shape inference).
    """

    model: onnx.ModelProto
    types: onnx.ModelProto | None = field(default=None)

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
        value: NDArray[np.generic] = onnx.numpy_helper.to_array(self.constants[name])
        return value

    @cached_property
    def _infos(self) -> Mapping[str, onnx.TypeProto]:
        graph = (self.types or self.model).graph
        return {v.name: v.type for v in (*graph.value_info, *graph.input, *graph.output)}

    def elem_type(self, name: str) -> int:
        """onnx element type number of a tensor; 0 if unknown."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        info = self._infos.get(name)
        return int(info.tensor_type.elem_type) if info is not None else 0

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape with None for unknown dimensions; None if the rank is unknown."""
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
