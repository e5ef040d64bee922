"""Operators whose output range is known by mathematics, whatever the data."""

from collections.abc import Mapping

from qdq.ops.demand import Bounded, Demand, Handler

__all__ = ["ROWS"]

UNIT = Demand(output=Bounded(0.0, 1.0))
SIGNED_UNIT = Demand(output=Bounded(-1.0, 1.0))

ROWS: Mapping[str, Demand | Handler] = {
    "Cos": SIGNED_UNIT,
    "HardSigmoid": UNIT,
    "Sigmoid": UNIT,
    "Sin": SIGNED_UNIT,
    "Softmax": UNIT,
    "Softsign": SIGNED_UNIT,
    "Tanh": SIGNED_UNIT,
}
