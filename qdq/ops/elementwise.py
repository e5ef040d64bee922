"""Operators that work element by element: every input as codes, an output range of its own."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler

__all__ = ["ROWS"]

ONE = Demand(activations=(0,))
TWO = Demand(activations=(0, 1))

ROWS: Mapping[str, Demand | Handler] = {
    "Abs": ONE,
    "Add": TWO,
    "CumSum": ONE,
    "Div": TWO,
    "Elu": ONE,
    "Erf": ONE,
    "Exp": ONE,
    "Gelu": ONE,
    "HardSwish": ONE,
    "LeakyRelu": ONE,
    "Mish": ONE,
    "Mul": TWO,
    "Neg": ONE,
    "PRelu": TWO,
    "Pow": ONE,
    "Sqrt": ONE,
    "Sub": TWO,
}
