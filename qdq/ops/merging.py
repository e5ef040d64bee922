"""Operators that put several tensors into one: each input and the output with its own range."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["ROWS"]


def every_input(node: NodeView) -> Demand:
    """Own range; every input is data."""
    return Demand(activations=tuple(i for i, t in enumerate(node.inputs) if t.name))


ROWS: Mapping[str, Demand | Handler] = {
    "Concat": every_input,
    "Max": every_input,
    "Min": every_input,
    "Sum": every_input,
    "Where": Demand(activations=(1, 2)),
}
