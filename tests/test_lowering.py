"""Models of the latest operator sets are written in opset 21 where they mean the same there."""

import numpy as np
import onnx
import pytest
from harness import older, quantized
from models import feeds, model, node, weights
from onnx import TensorProto, helper, numpy_helper

from qdq import Rule, Scheme
from qdq.graph import opset_of
from qdq.lowering import lower_to_usual

SHAPE = [1, 8, 8, 8]
LATEST = 24
OPSETS = [
    22,
    23,
    pytest.param(24, marks=pytest.mark.skipif(older("1.24"), reason="no opset 24")),
]


@pytest.mark.parametrize("opset", OPSETS)
def test_kernels_are_those_of_the_usual_opset(opset: int) -> None:
    """onnxruntime 1.23 has no QuantizeLinear of opset 23, 1.27 none for a MaxPool of opset 22."""
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("MaxPool", ["a"], "b", kernel_shape=[2, 2]),
        node("Conv", ["b", "w"], "y"),
    ]
    net = model(nodes, {"x": SHAPE}, {"y": [None] * 4}, {"w": weights(8, 8, 1, 1)}, opset)
    result, outcome = quantized(net, feeds({"x": SHAPE}, 4))
    assert opset_of(result.model) == 21
    assert opset_of(net) == opset
    assert outcome.sqnr > 30
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.ops["MaxPool"] + outcome.ops["NhwcMaxPool"] == 1
    assert outcome.ops["QuantizeLinear"] == outcome.ops["DequantizeLinear"] == 1


def test_an_older_one_still_where_a_float_pool_gains() -> None:
    shape = [1, 24, 8, 8]
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("AveragePool", ["a"], "b", kernel_shape=[3, 3]),
        node("Tanh", ["b"], "y"),
    ]
    net = model(nodes, {"x": shape}, {"y": [None] * 4}, {"w": weights(24, 24, 1, 1)}, opset=22)
    scheme = Scheme(rules=(Rule(op_types=("AveragePool",), keep_float=True),))
    result, outcome = quantized(net, feeds({"x": shape}, 4), scheme=scheme)
    assert opset_of(result.model) == 18
    assert outcome.sqnr > 30
    assert outcome.ops["QLinearConv"] == 1


def lowered(nodes: list[onnx.NodeProto], constant: onnx.TensorProto | None = None) -> int:
    net = model(nodes, {"x": SHAPE}, {"y": SHAPE}, opset=LATEST)
    if constant is not None:
        net.graph.initializer.append(constant)
    lower_to_usual(net)
    return opset_of(net)


def tensor(kind: int) -> onnx.TensorProto:
    return helper.make_tensor("t", kind, [1], [0.0])


def branch(op: str) -> onnx.NodeProto:
    """An If, with a node in its branches."""
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    body = helper.make_graph([node(op, ["x"], "o")], "body", [], [out])
    return helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)


CONDITION = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ([node("Relu", ["x"], "y")], 21),
        ([node("Swish", ["x"], "y")], 24),
        ([CONDITION, branch("Relu")], 21),
        ([CONDITION, branch("Swish")], 24),
        ([node("Cast", ["x"], "y", to=TensorProto.FLOAT)], 21),
        ([node("Cast", ["x"], "y", to=TensorProto.FLOAT, round_mode="down")], 24),
        ([node("Cast", ["x"], "y", to=TensorProto.BFLOAT16)], 24),
        ([node("Constant", [], "y", value=tensor(TensorProto.FLOAT))], 21),
        ([node("Constant", [], "y", value=tensor(TensorProto.BFLOAT16))], 24),
    ],
    ids=lambda v: "-".join(n.op_type for n in v) if isinstance(v, list) else str(v),
)
def test_what_is_new_keeps_the_opset(nodes: list[onnx.NodeProto], opset: int) -> None:
    assert lowered(nodes) == opset


@pytest.mark.parametrize(("kind", "opset"), [(TensorProto.FLOAT16, 21), (TensorProto.BFLOAT16, 24)])
def test_types_of_late_operators_keep_it(kind: int, opset: int) -> None:
    assert lowered([node("Relu", ["x"], "y")], tensor(kind)) == opset
    net = model([node("Relu", ["x"], "y")], {"x": SHAPE}, {"y": SHAPE}, opset=LATEST)
    net.graph.input[0].type.tensor_type.elem_type = kind
    lower_to_usual(net)
    assert opset_of(net) == opset


def test_functions_keep_it() -> None:
    net = model([node("Relu", ["x"], "y")], {"x": SHAPE}, {"y": SHAPE}, opset=LATEST)
    net.functions.add(name="f", domain="mine")
    lower_to_usual(net)
    assert opset_of(net) == LATEST


def test_an_older_opset_is_left() -> None:
    net = model([node("Relu", ["x"], "y")], {"x": SHAPE}, {"y": SHAPE}, opset=17)
    lower_to_usual(net)
    assert opset_of(net) == 17
