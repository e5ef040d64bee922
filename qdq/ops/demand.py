"""What a node asks of its tensors when it runs on integers. Pure data, no graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = [
    "Bounded",
    "Demand",
    "Handler",
    "NodeView",
    "Output",
    "Own",
    "SameAs",
    "TensorView",
    "Weight",
]


@dataclass(frozen=True, slots=True)
class Own:
    """The output has a range of its own, observed in calibration."""


@dataclass(frozen=True, slots=True)
class SameAs:
    """The output holds only values of the input at ``slot``: both have the same parameters."""

    slot: int = 0


@dataclass(frozen=True, slots=True)
class Bounded:
    """Mathematics bounds the output to [low, high]."""

    low: float
    high: float


Output = Own | SameAs | Bounded


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant that is multiplied with the input.

    Attributes:
        slot: the input slot.
        axis: the axis of output channels, where one scale per channel can be used.
        kind: how the axes map to output channels (see ``qdq.problem.Linear``).
        groups: number of groups.
    """

    slot: int
    axis: int
    kind: Literal["conv", "conv_transpose", "matmul"]
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A node's wish.

    Attributes:
        activations: input slots that must be codes. A constant in such a slot is quantized with
            the activation type.
        output: where the parameters of the outputs come from.
        weight: the weight, if the node is linear with a constant weight.
        bias: slot of the int32 bias, if there is one.
        dynamic: slots of the weights of a kernel that rounds its activations by itself, at run
            time: it reads and hands out float, and has no Q and DQ.
        table: slot of a constant whose rows the node picks: it is kept as codes, and what is picked
            becomes float. No Q and DQ either.
    """

    activations: tuple[int, ...] = (0,)
    output: Output = field(default_factory=Own)
    weight: Weight | None = None
    bias: int | None = None
    dynamic: tuple[int, ...] = ()
    table: int | None = None

    @property
    def apart(self) -> bool:
        """Whether the node is between float tensors, and rounds by itself."""
        return bool(self.dynamic) or self.table is not None


@dataclass(frozen=True, slots=True)
class TensorView:
    """One input of a node.

    Attributes:
        name: the tensor's name, "" if the input is absent.
        shape: its shape as far as it is known.
        constant: whether its value is in the model.
        floating: whether it holds floats.
        largest: largest magnitude in a constant that could be a mask; 0 where nobody looked.
    """

    name: str
    shape: tuple[int | None, ...] | None = None
    constant: bool = False
    floating: bool = True
    largest: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node as handlers and targets see it.

    ``scalars`` holds the values of small constant inputs by slot (bounds of a Clip, say).
    """

    name: str
    op_type: str
    inputs: tuple[TensorView, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)
    scalars: Mapping[int, float] = field(default_factory=dict)
    opset: int = 21

    def has(self, slot: int) -> bool:
        """Whether the input slot is filled."""
        return slot < len(self.inputs) and bool(self.inputs[slot].name)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)


class Handler(Protocol):
    """Says what a node asks for, or a sentence on why it cannot run on integers.

    Pure: sees the node, returns data, touches nothing.
    """

    def __call__(self, node: NodeView) -> Demand | str:
        """Return the node's demand, or the reason why there is none."""
        ...
