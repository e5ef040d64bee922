"""What stands behind a kernel must not keep it, or its weights, in float: pair by pair."""

from collections import Counter
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from harness import FORCED, session
from harness import compare as measured
from models import feeds, model, node, weights

from qdq import Rule, Scheme
from qdq.api import run
from qdq.calibrate import MinMax
from qdq.compare import compare
from qdq.graph import Graph

K = 128

PRODUCTS = {
    "Gemm": [node("Gemm", ["x", "w", "b"], "p")],
    "MatMul": [node("MatMul", ["x", "w"], "p")],
    "Conv": [node("Conv", ["x", "f", "b"], "p", pads=[1, 1, 1, 1])],
}
BEHIND = {
    "relu": [node("Relu", ["p"], "r")],
    "relu6": [node("Clip", ["p", "zero", "six"], "r")],
    "hard tanh": [node("Clip", ["p", "minus", "one"], "r")],
    "leaky": [node("LeakyRelu", ["p"], "r", alpha=0.1)],
    "tanh": [node("Tanh", ["p"], "r")],
    "sum": [node("Erf", ["x"], "e"), node("Add", ["p", "e"], "r")],
    "sum, other way round": [node("Erf", ["x"], "e"), node("Add", ["e", "p"], "r")],
    "sum, clamped": [
        node("Erf", ["x"], "e"),
        node("Add", ["p", "e"], "s"),
        node("Relu", ["s"], "r"),
    ],
    "relu beside another reader": [
        node("Relu", ["p"], "q"),
        node("Erf", ["p"], "e"),
        node("Mul", ["q", "e"], "r"),
    ],
    "difference": [node("Erf", ["x"], "e"), node("Sub", ["p", "e"], "r")],
}
READERS = {
    "float": [node("Erf", ["r"], "y")],
    "nobody": [node("Identity", ["r"], "y")],
    "integer": [],  # the product once more
    "both": [node("Erf", ["r"], "z")],
}


def net(product: str, behind: str, reader: str) -> tuple[onnx.ModelProto, dict]:
    shape = [1, 32, 12, 12] if product == "Conv" else [8, K]
    nodes = [*PRODUCTS[product], *BEHIND[behind], *READERS[reader]]
    if reader in ("integer", "both"):
        again = onnx.NodeProto()
        again.CopyFrom(PRODUCTS[product][0])
        again.name, again.input[0], again.output[0] = "again", "r", "y"
        nodes.append(again)
    width = shape[1]
    constants = {
        "b": weights(width),
        "zero": np.float32(0),
        "six": np.float32(6),
        "minus": np.float32(-1),
        "one": np.float32(1),
        "w": weights(K, K),
        "f": weights(32, 32, 3, 3),
    }
    read = {name for n in nodes for name in n.input}
    outputs = {"y": shape, "z": shape} if reader == "both" else {"y": shape}
    made = model(nodes, {"x": shape}, outputs, {k: v for k, v in constants.items() if k in read})
    return made, {"x": shape}


def optimized(net: onnx.ModelProto) -> Graph:
    with TemporaryDirectory() as folder:
        path = f"{folder}/optimized.onnx"
        session(net, fused=True, save=path)
        return Graph(onnx.load(path))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_planned_product_runs_on_integers(product: str, behind: str, reader: str) -> None:
    source, shapes = net(product, behind, reader)
    data = feeds(shapes)
    scheme = Scheme(rules=(Rule(nodes="Add_.*", keep_float=True),) if "sum" in behind else ())
    result = run(source, data, target=FORCED, calibrator=MinMax(), scheme=scheme)
    planned = [n for n in result.plan.quantized if n.startswith((product, "again"))]
    assert len(planned) == (2 if reader in ("integer", "both") else 1)
    graph = optimized(result.model)
    kinds = Counter(n.op_type for n in graph.nodes)
    kernels = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearConv")
    assert sum(kinds[k] for k in kernels) == len(planned), kinds
    weights_in_float = [
        n.name
        for n in graph.nodes
        if n.op_type == "DequantizeLinear" and n.input[0] in graph.constants
    ]
    assert weights_in_float == []
    found = measured(source, result.model, data)
    assert found.sqnr > 30
    assert found.steps_apart < 3


def test_a_clamp_within_half_a_code_is_done_by_the_codes() -> None:
    """[-1, 1] has no code for both ends beside the one for 0."""
    source, shapes = net("Conv", "hard tanh", "float")
    result = run(source, feeds(shapes), target=FORCED, calibrator=MinMax())
    assert "Clip" not in {n.op_type for n in result.model.graph.node}
    assert "r" not in result.left_float
    params = result.solution.params["r"]
    ends = (np.array([0, 255]) - params.zero_point) * params.scale
    assert np.abs(ends - [-1, 1]).max() <= params.scale * 0.501
    assert np.abs(ends).max() > 1  # which is why the runtime would have kept the Clip


def test_a_clamp_that_cuts_deeper_stays() -> None:
    source, shapes = net("Conv", "hard tanh", "float")
    wide = Scheme(rules=(Rule(tensors="r", range=(-2.0, 2.0)),))
    result = run(source, feeds(shapes), target=FORCED, calibrator=MinMax(), scheme=wide)
    assert "Clip" in {n.op_type for n in result.model.graph.node}
    (why,) = [p.value for p in result.model.metadata_props if p.key == "qdq.left_float"]
    assert "beyond the bounds" in why


def test_the_report_sees_the_kernels() -> None:
    """The product's own result is matched behind the identity that hides the clamp."""
    for behind in ("relu", "relu6", "hard tanh", "sum"):
        source, shapes = net("MatMul", behind, "float")
        data = feeds(shapes)
        result = run(source, data, target=FORCED, calibrator=MinMax())
        report = compare(source, result.model, data)
        (row,) = [n for n in report.nodes if n.op_type == "MatMul"]
        assert row.integer, behind
        (kernel,) = [k for k in report.kernels if k.op_type == "MatMul"]
        assert (kernel.planned, kernel.integer, kernel.float) == (1, 1, 0)
