"""One node of a graph that is being edited."""

from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from qdq.facts import DEFAULT
from qdq.graph import drop_attributes
from qdq.nested import captured_names

__all__ = ["Node", "drop_absent", "drop_absent_inputs"]


def drop_absent(names: MutableSequence[str]) -> None:
    """Drop what is absent at the end of a node's inputs or outputs, in place."""
    while names and not names[-1]:
        del names[-1]


def drop_absent_inputs(node: onnx.NodeProto) -> None:
    """Drop what is absent at the end of a node's inputs, where that leaves the node what it is."""
    if node.op_type != "Loop":  # whose first two have their places even where they are absent
        drop_absent(node.input)


@dataclass(eq=False, slots=True)
class Node:
    """One node of the main graph; equal only to itself.

    Attributes:
        proto: the node. Its inputs are changed through the Editor only.
        captures: names that its subgraphs read from the main graph.
    """

    proto: onnx.NodeProto
    captures: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.captures = captured_names(self.proto)

    @property
    def op(self) -> str:
        """Operator type; ``domain::type`` outside of the default domain."""
        domain = self.proto.domain
        op: str = self.proto.op_type
        return op if domain in DEFAULT else f"{domain}::{op}"

    @property
    def name(self) -> str:
        """The node's name."""
        name: str = self.proto.name
        return name

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input names; absent optional ones are empty."""
        return tuple(self.proto.input)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Output names; absent optional ones are empty."""
        return tuple(self.proto.output)

    @property
    def output(self) -> str:
        """The first output."""
        name: str = self.proto.output[0]
        return name

    def input(self, slot: int) -> str:
        """The name at an input slot; empty if absent."""
        name: str = self.proto.input[slot] if slot < len(self.proto.input) else ""
        return name

    def copied(self) -> onnx.NodeProto:
        """A copy, to be changed and put in its place."""
        made = onnx.NodeProto()
        made.CopyFrom(self.proto)
        return made

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or the default."""
        for a in self.proto.attribute:
            if a.name == name:
                value = onnx.helper.get_attribute_value(a)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute; None removes it."""
        drop_attributes(self.proto, name)
        if value is not None:
            self.proto.attribute.append(onnx.helper.make_attribute(name, value))
