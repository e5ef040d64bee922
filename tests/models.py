"""Small float models, one per kind of trouble, and data for them."""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def vec(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: dict[str, Sequence[int | str | None] | None],
    constants: dict[str, NDArray] | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    """A checked model with float inputs and outputs."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, F, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, F, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    ir = 10 if opset >= 21 else 8 if opset >= 15 else 7
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(made)
    return made


def node(
    op: str, inputs: Sequence[str], output: str | Sequence[str], **attributes
) -> onnx.NodeProto:
    outputs = [output] if isinstance(output, str) else list(output)
    return helper.make_node(op, list(inputs), outputs, name=f"{op}_{outputs[0]}", **attributes)


def retyped(net: onnx.ModelProto, kind: type[np.floating]) -> onnx.ModelProto:
    """A copy whose float constants, inputs and outputs are of another floating-point type."""
    made = onnx.ModelProto.FromString(net.SerializeToString())
    for t in made.graph.initializer:
        if t.data_type == F:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(kind), t.name))
    for v in (*made.graph.input, *made.graph.output):
        v.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return made


def weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Normal weights whose layer keeps the variance of its input."""
    fan = int(np.prod(shape[1:])) if len(shape) != 2 else shape[0]
    return (rng(seed).standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def feeds(
    shapes: dict[str, Sequence[int]], count: int = 8, seed: int = 1
) -> list[dict[str, NDArray]]:
    r = rng(seed)
    return [
        {n: r.standard_normal(tuple(s)).astype(np.float32) for n, s in shapes.items()}
        for _ in range(count)
    ]


def conv_chain(
    channels: int = 32, size: int = 24, clamp: str = "Relu", opset: int = 21, depth: int = 3
) -> onnx.ModelProto:
    """Conv → clamp, several times: everything fuses."""
    nodes, constants, last = [], {}, "x"
    for k in range(depth):
        constants[f"w{k}"] = weights(channels, channels, 3, 3, seed=k)
        constants[f"b{k}"] = rng(k + 50).standard_normal(channels).astype(np.float32) * 0.1
        nodes.append(node("Conv", [last, f"w{k}", f"b{k}"], f"c{k}", pads=[1, 1, 1, 1]))
        if clamp == "Clip":
            constants |= {"lo": np.float32(0), "hi": np.float32(6)}
            nodes.append(node("Clip", [f"c{k}", "lo", "hi"], f"r{k}"))
        else:
            nodes.append(node("Relu", [f"c{k}"], f"r{k}"))
        last = f"r{k}"
    shape = [1, channels, size, size]
    return model(nodes, {"x": shape}, {last: shape}, constants, opset)


def residual(channels: int = 32, size: int = 24) -> onnx.ModelProto:
    """Conv → Add with the skip → Conv: three readers of one tensor."""
    constants = {f"w{k}": weights(channels, channels, 3, 3, seed=k) for k in range(3)}
    nodes = [
        node("Conv", ["x", "w0"], "a", pads=[1] * 4),
        node("Relu", ["a"], "ar"),
        node("Conv", ["ar", "w1"], "b", pads=[1] * 4),
        node("Add", ["ar", "b"], "s"),
        node("Conv", ["s", "w2"], "y", pads=[1] * 4),
    ]
    shape = [1, channels, size, size]
    return model(nodes, {"x": shape}, {"y": shape}, constants)


def mlp(rows: int = 64, width: int = 256, opset: int = 21) -> onnx.ModelProto:
    """Gemm → Relu → Gemm: the last one hands out float."""
    constants = {
        "w0": weights(width, width, seed=0),
        "b0": rng(5).standard_normal(width).astype(np.float32),
        "w1": weights(width, width, seed=1),
        "b1": rng(6).standard_normal(width).astype(np.float32),
    }
    nodes = [
        node("Gemm", ["x", "w0", "b0"], "h"),
        node("Relu", ["h"], "hr"),
        node("Gemm", ["hr", "w1", "b1"], "y"),
    ]
    return model(nodes, {"x": [rows, width]}, {"y": [rows, width]}, constants, opset)


def detector() -> onnx.ModelProto:
    """Boxes up to some 300 and scores of 0..1, side by side in one tensor."""
    nodes = [
        node("Conv", ["x", "w0"], "c", pads=[1] * 4),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "w1"], "box", pads=[1] * 4),
        node("Conv", ["r", "w2"], "logit", pads=[1] * 4),
        node("Sigmoid", ["logit"], "score"),
        node("Concat", ["box", "score"], "both", axis=1),
        node("Conv", ["both", "same"], "y"),
    ]
    constants = {
        "w0": weights(32, 32, 3, 3, seed=0),
        "w1": 60 * weights(64, 32, 3, 3, seed=1),
        "w2": weights(64, 32, 3, 3, seed=2),
        "same": np.eye(128, dtype=np.float32)[:, :, None, None],
    }
    return model(nodes, {"x": [1, 32, 40, 40]}, {"y": [1, 128, 40, 40]}, constants)
