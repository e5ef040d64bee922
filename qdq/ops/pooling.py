"""Operators that average: the output has a range of its own, within the input's."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["ROWS"]


def average_pool(node: NodeView) -> Demand | str:
    """Windows without holes: no integer AveragePool knows the attribute, not even all ones."""
    return "it has dilations" if "dilations" in node.attributes else Demand()


ROWS: Mapping[str, Demand | Handler] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": Demand(),
    "ReduceMean": Demand(),
}
