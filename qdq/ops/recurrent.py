"""Operators that loop over time, with kernels that round what they read step by step."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["ROWS"]

_WEIGHTS = (1, 2)  # of the input and of the last step's result


def lstm(node: NodeView) -> Demand | str:
    """Float; its weights are int8, and the kernel rounds its input and its last result itself."""
    if not all(node.inputs[slot].constant for slot in _WEIGHTS):
        return "its weights are computed while the model runs"
    if node.integer("layout", 0):
        return "the integer LSTM wants the steps on the first axis (layout=0)"
    return Demand(activations=(), dynamic=_WEIGHTS)


ROWS: Mapping[str, Demand | Handler] = {
    "LSTM": lstm,
}
