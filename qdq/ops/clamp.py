"""Relu and Clip: free behind an integer kernel, whose saturation does their work.

The output range is the calibrated one after the clamp; a kernel whose output saturates at the
clamp's bounds makes the node redundant. Where 0 is outside [min, max] that cannot be, since every
quantized range holds 0.
"""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["ROWS", "bounds"]

BIGGEST = 3.4028234663852886e38  # float32's largest finite value: Clip's default bounds


def bounds(node: NodeView) -> tuple[float, float] | None:
    """(min, max) of a Relu or Clip; None if a bound is not a constant, or for other operators."""
    if node.op_type == "Relu":
        return 0.0, BIGGEST
    if node.op_type != "Clip":
        return None
    if any(node.has(slot) and slot not in node.scalars for slot in (1, 2)):
        return None
    return node.scalars.get(1, -BIGGEST), node.scalars.get(2, BIGGEST)


ROWS: Mapping[str, Demand | Handler] = {"Relu": Demand(), "Clip": Demand()}
