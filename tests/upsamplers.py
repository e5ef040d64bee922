"""Small models that make their input larger, and what sees their nodes."""

from typing import Any

import numpy as np
import onnx
from models import model, node

from qdq.ops.demand import NodeView, TensorView

Array = np.ndarray[Any, Any]


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SHAPES = {1: [2, 16, 33], 2: [2, 16, 9, 8], 3: [1, 16, 4, 5, 6]}


def decoder(
    rank: int, *, window: int, behind: str = "Relu", fixed: bool = True, **attributes: Any
) -> onnx.ModelProto:
    """Conv → Relu → ConvTranspose → ``behind`` → Conv."""
    w = {
        "w0": values(16, 16, *[3] * rank, seed=1) / 7,
        "up": values(16, 8, *[window] * rank, seed=2) / 5,
        "b": values(8, seed=3),
        "w1": values(16, 8, *[3] * rank, seed=4) / 5,
    }
    pads = [1] * (2 * rank)
    nodes = [
        node("Conv", ["x", "w0"], "c", pads=pads),
        node("Relu", ["c"], "r"),
        node("ConvTranspose", ["r", "up", "b"], "t", **attributes),
        node(behind, ["t"], "q"),
        node("Conv", ["q", "w1"], "y", pads=pads),
    ]
    shape: list[Any] = SHAPES[rank] if fixed else ["N", 16, *"DHW"[:rank]]
    return model(nodes, {"x": shape}, {"y": [None] * (rank + 2)}, w)


ENLARGED = {"x": [2, 8, 7, 6]}


def enlarger(mode: str, side: int = 2, channels: int = 4, *, fixed: bool = True) -> onnx.ModelProto:
    """Conv → DepthToSpace → Conv."""
    made = channels * side**2
    w = {
        "w0": values(made, 8, 3, 3, seed=1) / 8,
        "b": values(made, seed=2),
        "w1": values(8, channels, 3, 3, seed=3) / 6,
    }
    nodes = [
        node("Conv", ["x", "w0", "b"], "c", pads=[1] * 4),
        node("DepthToSpace", ["c"], "d", blocksize=side, mode=mode),
        node("Conv", ["d", "w1"], "y", pads=[1] * 4),
    ]
    shape: list[Any] = [2, 8, 7, 6] if fixed else ["N", 8, "H", "W"]
    return model(nodes, {"x": shape}, {"y": [None] * 4}, w)


def view(op: str, *shapes: Any, **attributes: Any) -> NodeView:
    names = ("x", "w", "b")
    inputs = tuple(
        TensorView(name=n, shape=s, constant=n != "x") for n, s in zip(names, shapes, strict=False)
    )
    return NodeView(name="n", op_type=op, inputs=inputs, outputs=("y",), attributes=attributes)
