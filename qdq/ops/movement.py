"""Operators that move, repeat or select values: the output has the input's parameters."""

from collections.abc import Mapping
from math import prod

from qdq.ops.demand import Demand, Handler, NodeView, SameAs
from qdq.tables import bytes_saved

__all__ = ["ROWS"]

LEAST_TABLE = 1 << 16  # values; to keep fewer as codes saves nobody anything
SAME = Demand(activations=(0,), output=SameAs(0))


def resize(node: NodeView) -> Demand:
    """As its input in mode nearest; own range in others, which interpolate or overshoot.

    A crop fills what is outside of the input with a value of its own.
    """
    crops = node.text("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return SAME if node.text("mode", "nearest") == "nearest" and not crops else Demand()


def pad(node: NodeView) -> Demand:
    """As its input if padded with own values or zeros, which every range holds; else own range."""
    if node.text("mode", "constant") != "constant" or not node.has(2):
        return SAME
    return SAME if node.scalars.get(2) == 0 else Demand()


def max_pool(node: NodeView) -> Demand | str:
    """As its input: the largest code is the code of the largest value."""
    if len([o for o in node.outputs if o]) > 1:
        return "its Indices output has no integer kernel"
    return SAME


def gather(node: NodeView) -> Demand:
    """As its input; of a large constant table float, from int8 codes with a scale for each row."""
    data = node.inputs[0]
    shape = [d or 0 for d in data.shape or ()]
    rows = node.integer("axis", 0) in (0, -len(shape))
    large = rows and prod(shape) >= LEAST_TABLE and bytes_saved(shape) > 0
    if data.constant and data.floating and large:
        return Demand(activations=(), table=0)
    return SAME


ROWS: Mapping[str, Demand | Handler] = {
    "ArgMax": SAME,
    "ArgMin": SAME,
    "DepthToSpace": SAME,
    "Expand": SAME,
    "Flatten": SAME,
    "Gather": gather,
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
