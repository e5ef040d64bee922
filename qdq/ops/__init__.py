"""One row or small handler per operator. An operator without a row stays float by rule."""

from qdq.errors import ConfigError
from qdq.ops import (
    bounded,
    clamp,
    elementwise,
    linear,
    merging,
    movement,
    normalization,
    pooling,
    recurrent,
)
from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["TABLE", "demand_of", "register"]

_MODULES = (
    linear,
    elementwise,
    clamp,
    movement,
    merging,
    bounded,
    pooling,
    normalization,
    recurrent,
)
MASK = 1e4
"""Constants from this magnitude on say "not here", and are no data."""
TABLE: dict[str, Demand | Handler] = {}


def register(op_type: str, row: Demand | Handler) -> None:
    """Add an operator to the table.

    Args:
        op_type: the operator's name.
        row: a Demand that holds for every node of it, or a function NodeView → Demand | reason.

    Raises:
        ConfigError: if the operator has a row already.
    """
    if op_type in TABLE:
        raise ConfigError(f"operator '{op_type}' has a row already; remove it from TABLE first")
    TABLE[op_type] = row


for _module in _MODULES:
    for _op_type, _row in _module.ROWS.items():
        register(_op_type, _row)


def demand_of(node: NodeView) -> Demand | str:
    """What the node asks for, or the reason why it stays float."""
    row = TABLE.get(node.op_type)
    if row is None:
        return f"no integer form of {node.op_type} is known"
    demand = row if isinstance(row, Demand) else row(node)
    if isinstance(demand, str):
        return demand
    if not all(node.has(slot) for slot in demand.activations):
        return "an input that it needs is missing"
    wanted = [node.inputs[slot] for slot in demand.activations]
    if not all(t.floating for t in wanted):
        return "its data is not float32"
    if wanted and all(t.constant for t in wanted):
        return "all its data inputs are constants"
    for tensor in wanted:
        # "not below" so that NaN is caught too
        if tensor.constant and not tensor.largest < MASK:
            return (
                f"its constant '{tensor.name}' holds {tensor.largest:.3g}, as masks do: one scale "
                "for that and for the data would round the data away"
            )
    return demand
