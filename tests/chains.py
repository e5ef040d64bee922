"""Small chains of linear layers, with this and that between them."""

from collections.abc import Sequence

import numpy as np
import onnx
from models import model, node, weights


class Net:
    """Linear layers on (1, 8, 8, 8) with weights of their own, and what is between them."""

    def __init__(self, width: int = 8) -> None:
        self.width, self.nodes, self.constants = width, [], {}
        self.seed = 0

    def linear(
        self, x: str, y: str, op: str = "Conv", size: int = 3, apart: bool = False, **more: object
    ) -> "Net":
        shape: tuple[int, ...] = (self.width, 1 if apart else self.width, size, size)
        if op == "Gemm":
            shape = (self.width, self.width)
        else:
            more |= {"pads": [size // 2] * 4} | ({"group": self.width} if apart else {})
        self.seed += 1
        self.constants[f"w_{y}"] = weights(*shape, seed=self.seed)
        bias = 0.1 * np.random.default_rng(self.seed).standard_normal(self.width)
        self.constants[f"b_{y}"] = bias.astype(np.float32)
        self.nodes.append(node(op, [x, f"w_{y}", f"b_{y}"], y, **more))
        return self

    def op(self, op: str, inputs: str, y: str, **attributes: object) -> "Net":
        self.nodes.append(node(op, inputs.split(), y, **attributes))
        return self

    def model(
        self, *outputs: str, shape: Sequence[int | str | None] | None = None
    ) -> onnx.ModelProto:
        shape = shape or (1, self.width, 8, 8)
        free = [None] * (len(shape) - 2)
        given = {n: [None, None if n == "y" else self.width, *free] for n in outputs or ("y",)}
        return model(self.nodes, {"x": shape}, given, self.constants)


def between(*middle: tuple[object, ...], **more: object) -> Net:
    """Conv → nodes from "a" to "m" → Conv."""
    net = Net().linear("x", "a")
    for op, inputs, output in middle:
        net.op(op, inputs, output, **more)
    return net.linear("m", "y")


def samples(net: onnx.ModelProto, count: int, seed: int = 3) -> list[dict[str, np.ndarray]]:
    r = np.random.default_rng(seed)
    shape = [d.dim_value for d in net.graph.input[0].type.tensor_type.shape.dim]
    return [{"x": r.standard_normal(shape).astype(np.float32)} for _ in range(count)]
