"""Operators that move, repeat or select values: the output has the input's parameters."""

from collections.abc import Mapping

from qdq.ops.demand import Demand, Handler, NodeView, Own, SameAs

__all__ = ["ROWS"]

SAME = Demand(activations=(0,), output=SameAs(0))


def resize(node: NodeView) -> Demand:
    """Only the nearest mode just copies values; the others interpolate within their range."""
    return SAME if node.text("mode", "nearest") == "nearest" else Demand()


def pad(node: NodeView) -> Demand:
    """Padding with own values, or with zeros (which every range holds), keeps the parameters."""
    if node.text("mode", "constant") != "constant" or not node.has(2):
        return SAME
    return SAME if node.scalars.get(2) == 0 else Demand(output=Own())


def max_pool(node: NodeView) -> Demand | str:
    """The largest code is the code of the largest value."""
    if len([o for o in node.outputs if o]) > 1:
        return "its Indices output has no integer kernel"
    return SAME


ROWS: Mapping[str, Demand | Handler] = {
    "ArgMax": SAME,
    "ArgMin": SAME,
    "DepthToSpace": SAME,
    "Expand": SAME,
    "Flatten": SAME,
    "Gather": SAME,
    "GatherElements": SAME,
    "GatherND": SAME,
    "GlobalMaxPool": SAME,
    "MaxPool": max_pool,
    "Pad": pad,
    "ReduceMax": SAME,
    "ReduceMin": SAME,
    "Reshape": SAME,
    "Resize": resize,
    "Slice": SAME,
    "SpaceToDepth": SAME,
    "Split": SAME,
    "Squeeze": SAME,
    "Tile": SAME,
    "TopK": SAME,
    "Transpose": SAME,
    "Unsqueeze": SAME,
}
