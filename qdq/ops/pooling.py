"""Operators that average: the output has a range of its own, within the input's."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler

__all__ = ["ROWS"]

ROWS: Mapping[str, Demand | Handler] = {
    "AveragePool": Demand(),
    "GlobalAveragePool": Demand(),
    "ReduceMean": Demand(),
}
