"""A read-only index of a model's main graph, and fresh names. Built once, O(nodes)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdq.facts import DEFAULT
from qdq.nested import all_graphs, captured_names
from qdq.weights import read

__all__ = [
    "SIZES",
    "Graph",
    "Use",
    "attributes",
    "declare_opset",
    "drop_attributes",
    "opset_of",
    "shape_of",
]

SIZES = frozenset({onnx.TensorProto.INT32, onnx.TensorProto.INT64})  # types that sizes come in


class Use(NamedTuple):
    """One place where a tensor is read: the node's index and its input slot.

    slot is -1 where a subgraph of the node (If, Loop, Scan) captures the tensor by name.
    """

    node: int
    slot: int


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """The node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    """Drop a node's attributes of these names, in place."""
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def shape_of(kind: onnx.TypeProto) -> tuple[int | None, ...] | None:
    """The shape that a type tells, None for unknown dimensions; None if not even the rank."""
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default operator set; 0 if the model does not import it."""
    return max((o.version for o in model.opset_import if o.domain in DEFAULT), default=0)


def declare_opset(model: onnx.ModelProto, version: int) -> None:
    """Say that a model is of that version of the default operator set, in place."""
    for entry in model.opset_import:
        if entry.domain in DEFAULT:
            entry.version = version


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
    # name → the first suffix that may be free
    _next: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes in graph order; Use.node and producer hold indices into it."""
        return list(self.model.graph.node)

    @cached_property
    def opset(self) -> int:
        """The version of the default operator set; 0 if the model does not import it."""
        return opset_of(self.model)

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
        return {o: i for i, n in enumerate(self.nodes) for o in n.output if o}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Use, ...]]:
        """Tensor name → its uses, captures by subgraphs included; graph outputs are not uses."""
        uses: dict[str, list[Use]] = {}
        for i, n in enumerate(self.nodes):
            for slot, name in enumerate(n.input):
                if name:
                    uses.setdefault(name, []).append(Use(i, slot))
            for name in sorted(captured_names(n)):
                uses.setdefault(name, []).append(Use(i, -1))
        return {k: tuple(v) for k, v in uses.items()}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for inputs and constants."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

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
        return None if info is None else shape_of(info)

    @cached_property
    def names(self) -> set[str]:
        """Every tensor and node name in the model, subgraphs included; for fresh names."""
        taken: set[str] = set()
        for g in all_graphs(self.model.graph):
            taken.update(v.name for v in (*g.input, *g.output, *g.value_info))
            taken.update(t.name for t in g.initializer)
            for n in g.node:
                taken.add(n.name)
                taken.update(n.input)
                taken.update(n.output)
        return taken

    def fresh(self, name: str) -> str:
        """``name`` if it is free, else name_2, name_3, …; the result is then taken."""
        k = self._next.get(name, 1)
        while (found := name if k == 1 else f"{name}_{k}") in self.names:
            k += 1
        self.names.add(found)
        self._next[name] = k + 1
        return found
