"""Operators that average: the output has a range of its own, within the input's."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView

__all__ = ["ROWS"]


def average_pool(node: NodeView) -> Demand | str:
    """Own range; not where onnxruntime's integer AveragePool goes wrong.

    onnxruntime makes that one on its own. It does not know the attribute dilations (opset 19), not
    even all ones. With ceil_mode and count_include_pad it divides the windows at the far edges by
    another count than the float operator does; measured with version 1.32.
    """
    if "dilations" in node.attributes:
        return "the integer AveragePool knows no dilations"
    if node.integer("ceil_mode", 0) and node.integer("count_include_pad", 0):
        return "the integer AveragePool counts the padding of ceil_mode differently"
    return Demand()


ROWS: Mapping[str, Demand | Handler] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": Demand(),
    "ReduceMean": Demand(),
}
