"""One small model per operator and variant, alone or between two integer kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from models import ints, model, node, rng, vec, weights
from numpy.typing import NDArray

__all__ = ["CASES", "Case", "alone", "island"]

OPSET = 21
IMAGE = (1, 8, 6, 6)
ROWS = (4, 8)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    ``inputs``: "x" and "x2" are activations of ``shape`` (``shape2``), other names constants.
    ``floor``: dB that the operator alone must reach on its calibration data.
    ``positive``: the activations are made positive, for operators that want that.
    ``opset``: the lowest in which this spelling exists.
    ``refused``: part of the reason why this variant stays float on the CPU; "" if it fuses.
    """

    op: str
    inputs: Sequence[str] = ("x",)
    constants: Mapping[str, NDArray] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)
    shape: Sequence[int] = IMAGE
    shape2: Sequence[int] | None = None
    outputs: int = 1
    name: str = ""
    floor: float = 30.0
    positive: bool = False
    opset: int = 13
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op

    @property
    def activations(self) -> dict[str, Sequence[int]]:
        found = {"x": self.shape}
        if "x2" in self.inputs:
            found["x2"] = self.shape2 or self.shape
        return found

    def node(self, names: Mapping[str, str]) -> onnx.NodeProto:
        outputs = ["y", *(f"y{k}" for k in range(1, self.outputs))]
        return node(self.op, [names.get(i, i) for i in self.inputs], outputs, **self.attributes)


def _output(net: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make a tensor the graph's output, with the type and shape that inference gives."""
    net.graph.output.append(_inferred(net, name))
    return net


def _inferred(net: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    inferred = onnx.shape_inference.infer_shapes(net, strict_mode=True, data_prop=True)
    found = [v for v in inferred.graph.value_info if v.name == name]
    # operators that are functions of others have no inference: theirs keep the shape
    like = net.graph.input[0].type
    return found[0] if found else onnx.ValueInfoProto(name=name, type=like)


def alone(case: Case) -> onnx.ModelProto:
    """Graph input → the operator → graph output."""
    nodes, names = [], {}
    if case.positive:
        nodes.append(node("Softplus", ["x"], "xp"))
        names["x"] = "xp"
    nodes.append(case.node(names))
    return _output(_built(case, nodes, {}, max(OPSET, case.opset)), "y")


def island(case: Case, opset: int = OPSET) -> onnx.ModelProto:
    """Conv or MatMul → the operator → Conv or MatMul: what is between should run on integers."""
    nodes, constants, names = [], {}, {}
    for k, (name, shape) in enumerate(case.activations.items()):
        names[name] = f"{name}_made"
        nodes.append(_linear(name, names[name], shape, k, constants))
    nodes.append(case.node(names))
    made = _inferred(_built(case, nodes, constants, opset), "y")
    shape = [d.dim_value for d in made.type.tensor_type.shape.dim]
    nodes.append(_linear("y", "z", shape, 7, constants))
    return _output(_built(case, nodes, constants, opset), "z")


def _linear(
    x: str, y: str, shape: Sequence[int], seed: int, constants: dict[str, NDArray]
) -> onnx.NodeProto:
    weight = f"weight_{y}"
    if len(shape) == 4:
        constants[weight] = weights(shape[1], shape[1], 1, 1, seed=seed)
        return node("Conv", [x, weight], y)
    constants[weight] = weights(shape[-1], shape[-1], seed=seed)
    return node("MatMul", [x, weight], y)


def _built(
    case: Case,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, NDArray],
    opset: int = OPSET,
) -> onnx.ModelProto:
    return model(nodes, case.activations, {}, {**case.constants, **constants}, opset)


def _pool(op: str) -> list[Case]:
    square = {"kernel_shape": [3, 3]}
    found = [
        Case(op, attributes=square, name="plain"),
        Case(op, attributes={**square, "strides": [2, 2], "pads": [1, 1, 1, 1]}, name="pads"),
        Case(
            op,
            attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
            shape=(1, 8, 7, 7),
            name="ceil",
        ),
        Case(op, attributes={**square, "auto_pad": "SAME_UPPER"}, name="auto"),
        Case(
            op,
            attributes={**square, "strides": [2, 2], "pads": [1] * 4, "ceil_mode": 1},
            shape=(1, 8, 8, 8),
            name="ceil_pads",
        ),
        Case(op, attributes={"kernel_shape": [3]}, shape=(1, 8, 9), name="1d"),
        Case(op, attributes={"kernel_shape": [2, 2, 2]}, shape=(1, 8, 4, 4, 4), name="3d"),
    ]
    if op == "MaxPool":
        return [*found, Case(op, attributes={**square, "dilations": [2, 2]}, name="dilations")]
    include = {**square, "pads": [1] * 4, "count_include_pad": 1}
    return [
        *found,
        Case(op, attributes=include, name="include"),
        Case(
            op,
            attributes={**include, "strides": [2, 2], "ceil_mode": 1},
            shape=(1, 8, 8, 8),
            name="ceil_include",
            refused="counts the padding",
        ),
        Case(op, attributes={**square, "dilations": [1, 1]}, name="ones", opset=19, refused="dil"),
    ]


def _resize(name: str, refused: str = "", **attributes: object) -> Case:
    constants = {"scales": vec(1, 1, 2, 2)}
    return Case("Resize", ("x", "", "scales"), constants, attributes, name=name, refused=refused)


WIDE = rng(3).standard_normal((1, 1, 6, 6)).astype(np.float32)
MASK = rng(4).random(IMAGE) < 0.5
CHANNEL = rng(5).standard_normal((8,)).astype(np.float32)
SPLIT = {"sizes": ints(3, 5)}

CASES: tuple[Case, ...] = (
    # linear
    Case("Conv", ("x", "w", "b"), {"w": weights(8, 8, 3, 3), "b": CHANNEL}),
    Case("Conv", ("x", "w"), {"w": weights(8, 4, 3, 3)}, {"group": 2}, name="group"),
    Case("Conv", ("x", "w"), {"w": weights(8, 1, 3, 3)}, {"group": 8}, name="depthwise"),
    Case("Conv", ("x", "w"), {"w": weights(8, 8, 3)}, shape=(1, 8, 9), name="1d"),
    Case("Conv", ("x", "w"), {"w": weights(8, 8, 2, 2, 2)}, shape=(1, 8, 4, 4, 4), name="3d"),
    Case("ConvTranspose", ("x", "w", "b"), {"w": weights(8, 8, 2, 2), "b": CHANNEL}),
    Case(
        "ConvTranspose", ("x", "w", "b"), {"w": weights(8, 4, 2, 2), "b": CHANNEL}, {"group": 2},
        name="group", refused="groups",
    ),
    Case("Gemm", ("x", "w", "b"), {"w": weights(8, 8), "b": CHANNEL}, shape=ROWS),
    Case("MatMul", ("x", "w"), {"w": weights(8, 8)}, shape=ROWS),
    Case("MatMul", ("x", "w"), {"w": weights(8, 8)}, shape=(2, 4, 8), name="batch"),
    Case("MatMul", ("x", "x2"), shape=(2, 4, 8), shape2=(2, 8, 4), name="dynamic"),
    Case("MatMul", ("x", "x2"), shape=(1, 4, 8), shape2=(2, 8, 4), name="broadcast"),
    Case("MatMul", ("x", "w"), {"w": rng(1).standard_normal((2, 8, 5)).astype(np.float32)},
         shape=(2, 4, 8), name="rank3", refused="not a matrix"),
    # elementwise
    Case("Abs"),
    Case("Add", ("x", "x2")),
    Case("Add", ("x", "x")  , name="self"),
    Case("Add", ("x", "k"), {"k": WIDE}, name="constant"),
    Case("Add", ("x", "x2"), shape2=(1, 8, 1, 1), name="broadcast"),
    Case("CumSum", ("x", "axis"), {"axis": ints(2)}),
    Case("Div", ("x", "k"), {"k": np.abs(CHANNEL.reshape(1, 8, 1, 1)) + 1}),
    Case("Elu"),
    Case("Erf"),
    Case("Exp"),
    Case("Gelu"),
    Case("Mish"),
    Case("HardSwish", refused="part of a hard-swish"),
    Case("LeakyRelu", attributes={"alpha": 0.1}),
    Case("LeakyRelu", attributes={"alpha": -0.5}, name="negative"),
    Case("Mul", ("x", "x2"), floor=26),
    Case("Mul", ("x", "x"), name="self", floor=26),
    Case("Mul", ("k", "x"), {"k": WIDE}, name="constant"),
    Case("Mul", ("x", "x2"), shape2=(1, 8, 1, 1), name="broadcast", floor=26),
    Case("Neg"),
    Case("PRelu", ("x", "k"), {"k": np.abs(CHANNEL.reshape(8, 1, 1)) / 4}),
    Case("Pow", ("x", "k"), {"k": vec(2)}, positive=True),
    Case("Sqrt", positive=True),
    Case("Sub", ("x", "x2")),
    # clamps
    Case("Relu"),
    Case("Clip", ("x", "lo", "hi"), {"lo": np.float32(0), "hi": np.float32(1)}),
    Case("Clip", ("x", "lo", "hi"), {"lo": np.float32(1), "hi": np.float32(6)}, name="off_zero",
         floor=20),
    # movement
    Case("ArgMax", attributes={"axis": 1}),
    Case("ArgMin", attributes={"axis": 1}),
    Case("DepthToSpace", attributes={"blocksize": 2}),
    Case("DepthToSpace", attributes={"blocksize": 2, "mode": "CRD"}, name="crd"),
    Case("Expand", ("x", "to"), {"to": ints(2, 8, 6, 6)}),
    Case("Flatten"),
    Case("Gather", ("x", "i"), {"i": ints(3, 1, 4)}, {"axis": 1}),
    Case("Gather", ("x", "i"), {"i": np.array(2, np.int64)}, {"axis": 0}, shape=(3, 4, 8),
         name="scalar"),
    Case("GatherElements", ("x", "i"), {"i": np.tile(ints(1, 0), (1, 8, 6, 3))}, {"axis": 3}),
    Case("GatherND", ("x", "i"), {"i": np.array([[0, 1], [0, 3]], np.int64)}),
    Case("GlobalMaxPool"),
    *_pool("MaxPool"),
    Case("Pad", ("x", "p"), {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    Case("Pad", ("x", "p", "v"), {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "v": np.float32(-3)},
         name="value"),
    Case("Pad", ("x", "p"), {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, {"mode": "reflect"},
         name="reflect"),
    Case("ReduceMax", ("x", "axes"), {"axes": ints(2)}, opset=18),
    Case("ReduceMax", ("x", "axes"), {"axes": ints(1, 3)}, {"keepdims": 0}, name="drop", opset=18),
    Case("ReduceMax", name="all"),
    Case("ReduceMin", ("x", "axes"), {"axes": ints(2)}, opset=18),
    Case("Reshape", ("x", "to"), {"to": ints(1, 8, 36)}),
    Case("Reshape", ("x", "to"), {"to": ints(0, 4, 2, 36)}, name="zero"),
    _resize("nearest", mode="nearest"),
    _resize("asymmetric", mode="nearest", coordinate_transformation_mode="asymmetric",
            nearest_mode="floor"),
    _resize("ceil", mode="nearest", nearest_mode="ceil"),
    _resize("linear", "only nearest", mode="linear"),
    _resize("cubic", "only nearest", mode="cubic"),
    Case("Resize", ("x", "roi", "", "sizes"),
         {"roi": vec(0, 0, 0.2, 0.2, 1, 1, 1.4, 1.4), "sizes": ints(1, 8, 6, 6)},
         {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 9.0},
         name="crop", refused="cropping"),
    Case("Resize", ("x", "", "scales"), {"scales": vec(1, 1, 2)}, shape=(1, 8, 9), name="1d"),
    Case("Resize", ("x", "", "", "sizes"), {"sizes": ints(1, 8, 9, 9)}, name="sizes"),
    Case("Resize", ("x", "", "scales"), {"scales": vec(2, 2)}, {"axes": [2, 3]}, name="axes",
         opset=18),
    Case("Resize", ("x", "", "scales"), {"scales": vec(1, 1, 0.5, 0.5)}, name="down"),
    Case("Slice", ("x", "a", "e", "ax"), {"a": ints(1), "e": ints(5), "ax": ints(2)}),
    Case("Slice", ("x", "a", "e", "ax", "st"),
         {"a": ints(0), "e": ints(8), "ax": ints(1), "st": ints(2)}, name="step"),
    Case("SpaceToDepth", attributes={"blocksize": 2}),
    Case("Split", ("x", "sizes"), SPLIT, {"axis": 1}, outputs=2),
    Case("Split", ("x",), {}, {"axis": 1, "num_outputs": 2}, outputs=2, name="even", opset=18),
    Case("Squeeze", ("x", "ax"), {"ax": ints(0)}),
    Case("Tile", ("x", "r"), {"r": ints(1, 1, 2, 1)}),
    Case("TopK", ("x", "k"), {"k": ints(3)}, outputs=2),
    Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Case("Transpose", attributes={"perm": [1, 0]}, shape=ROWS, name="matrix"),
    Case("Unsqueeze", ("x", "ax"), {"ax": ints(0)}),
    Case("Unsqueeze", ("x", "ax"), {"ax": ints(0)}, shape=(2, 4, 8), name="to_image"),
    # merging
    Case("Concat", ("x", "x2"), attributes={"axis": 1}),
    Case("Concat", ("x", "x2"), attributes={"axis": -1}, name="last"),
    Case("Concat", ("x", "x"), attributes={"axis": 1}, name="self"),
    Case("Concat", ("x", "k"), {"k": rng(8).standard_normal(IMAGE).astype(np.float32)},
         {"axis": 1}, name="constant"),
    Case("Max", ("x", "x2")),
    Case("Min", ("x", "x2")),
    Case("Sum", ("x", "x2")),
    Case("Where", ("c", "x", "x2"), {"c": MASK}),
    Case("Where", ("c", "x", "x2"), {"c": MASK[:, :, :1]}, name="broadcast"),
    Case("Where", ("c", "x", "k"), {"c": MASK, "k": np.float32(-1)}, name="constant"),
    Case("Where", ("c", "k", "x"), {"c": MASK, "k": np.abs(WIDE)}, name="array"),
    # bounded
    Case("Cos"),
    Case("HardSigmoid"),
    Case("Sigmoid"),
    Case("Sin"),
    Case("Softmax", attributes={"axis": -1}),
    Case("Softmax", attributes={"axis": 1}, shape=(1, 8, 5, 6), name="channels"),
    Case("Softmax", attributes={"axis": -1}, shape=ROWS, name="matrix"),
    Case("Softsign"),
    Case("Tanh"),
    # pooling
    *_pool("AveragePool"),
    Case("GlobalAveragePool"),
    Case("GlobalAveragePool", shape=(1, 8, 9), name="1d"),
    Case("GlobalAveragePool", shape=(1, 8, 4, 4, 4), name="3d"),
    Case("ReduceMean", ("x", "axes"), {"axes": ints(2, 3)}),
    # normalization
    Case("BatchNormalization", ("x", "g", "b", "m", "v"),
         {"g": CHANNEL, "b": CHANNEL, "m": CHANNEL, "v": np.abs(CHANNEL) + 1}),
    Case("GroupNormalization", ("x", "g", "b"), {"g": CHANNEL, "b": CHANNEL}, {"num_groups": 2}),
    Case("InstanceNormalization", ("x", "g", "b"), {"g": CHANNEL, "b": CHANNEL}),
    Case("LayerNormalization", ("x", "g"), {"g": CHANNEL[:6]}),
    Case("RMSNormalization", ("x", "g"), {"g": CHANNEL[:6]}, opset=23),
)  # fmt: skip
