"""What stands behind a kernel must not keep it, or its weights, in float: pair by pair."""

from collections import Counter

import numpy as np
import onnx
import pytest
from harness import FORCED, older, optimized
from harness import compare as measured
from models import feeds, model, node, rng, weights

from qdq import QuantSpec, Rule, Scheme
from qdq.api import run
from qdq.calibrate import MinMax
from qdq.compare import compare
from qdq.graph import Graph
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.spec import INT8
from qdq.targets import PORTABLE, Target
from qdq.wiring import wire

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


@pytest.mark.parametrize("op", ["Softmax", "Where"])
def test_what_is_slower_on_integers_and_float_by_rule_stays_float(op: str) -> None:
    """onnxruntime has integer kernels for both, which it would take between a DQ and a Q."""
    between = {
        "Softmax": node("Softmax", ["a"], "m", axis=3),
        "Where": node("Where", ["mask", "a", "zero"], "m"),
    }
    nodes = [node("Conv", ["x", "f"], "a"), between[op], node("Conv", ["m", "g"], "y")]
    shape = {"x": [1, 32, 12, 12]}
    constants = {"f": weights(32, 32, 1, 1), "g": weights(32, 32, 1, 1, seed=4),
                 "zero": np.float32(0), "mask": rng().random((12, 12)) < 0.5}  # fmt: skip
    read = {i for n in nodes for i in n.input}
    net = model(nodes, shape, {"y": [None] * 4}, {k: v for k, v in constants.items() if k in read})
    rules = (Rule(op_types=(op,), keep_float=True),)
    result = run(net, feeds(shape), scheme=Scheme(rules=rules), target=FORCED)
    found = measured(net, result.model, feeds(shape))
    assert found.ops[op] == 1
    assert found.ops["QLinearConv"] == 2
    assert found.sqnr > 25


MOVING = {
    "MaxPool": ({}, {"kernel_shape": [2, 2]}),
    "Reshape": ({"shape": np.int64([1, 32, -1])}, {}),
    "Slice": ({"start": np.int64([0, 3]), "end": np.int64([1, 30])}, {}),
    "Squeeze": ({"axes": np.int64([0])}, {}),
    "Transpose": ({}, {"perm": [0, 2, 3, 1]}),
    "Unsqueeze": ({"axes": np.int64([0])}, {}),
}


@pytest.mark.parametrize("op", MOVING)
@pytest.mark.parametrize("reader", ["Tanh", "Relu"])
def test_float_movements_of_int8_codes_can_be_loaded(op: str, reader: str) -> None:
    """onnxruntime moves a DQ of int8 over them, and then refuses what it has made."""
    constants, attributes = MOVING[op]
    nodes = [
        node("Conv", ["x", "f"], "a"),
        node(op, ["a", *constants], "m", **attributes),
        node(reader, ["m"], "y"),
    ]
    shape = {"x": [1, 32, 12, 12]}
    rank = 4 + (op == "Unsqueeze") - (op in ("Reshape", "Squeeze"))
    net = model(nodes, shape, {"y": [None] * rank}, {"f": weights(32, 32, 1, 1), **constants})
    scheme = Scheme(
        activation=QuantSpec(dtype=INT8, symmetric=False),
        rules=(Rule(op_types=(op, reader), keep_float=True),),
    )
    result = run(net, feeds(shape), scheme=scheme, target=FORCED)
    found = measured(net, result.model, feeds(shape))
    assert found.ops["QLinearConv"] == 1
    assert found.sqnr > 25
    report = compare(net, result.model, feeds(shape), repeats=0, advise=0)
    assert op in {n.op_type for n in report.nodes if not n.integer}
    assert not report.notes


def pooled(
    channels: int = 24, behind: str = "Tanh", dims: int = 2, **attributes: object
) -> onnx.ModelProto:
    """A float AveragePool behind a convolution."""
    attributes = {"kernel_shape": [3] * dims, **attributes}
    nodes = [
        node("Conv", ["x", "f"], "a"),
        node("AveragePool", ["a"], "p", **attributes),
        node(behind, ["p"], "y"),
    ]
    constants = {"f": weights(channels, 32, *[1] * dims)}
    return model(nodes, {"x": [1, 32, *[12] * dims]}, {"y": [None] * (2 + dims)}, constants)


@pytest.mark.parametrize(
    ("net", "opset"),
    [
        (pooled(), 18),
        (pooled(channels=32), 21),  # in blocks
        (pooled(channels=32, dims=1), 18),  # which only images have
        (pooled(channels=32, dims=3), 18),
        (pooled(dilations=[2, 2]), 21),
        (pooled(ceil_mode=1, strides=[2, 2]), 21),
        (pooled(count_include_pad=1, pads=[1] * 4), 18),
        pytest.param(
            pooled(dims=3, count_include_pad=1, kernel_shape=[5, 1, 1], pads=[2, 0, 0] * 2),
            18,
            marks=pytest.mark.skipif(older("1.25"), reason="wrong at the borders from opset 19 on"),
        ),
        (pooled(pads=[1] * 4), 18),
        (pooled(behind="Gelu"), 21),  # which came with opset 20
    ],
    ids=[
        "ragged",
        "blocks",
        "1-D",
        "3-D",
        "dilated",
        "ceil",
        "counted",
        "channels",
        "padded",
        "gelu",
    ],
)
def test_a_float_average_pool_has_the_opset_of_its_fast_kernel(
    net: onnx.ModelProto, opset: int
) -> None:
    shape = {"x": [d.dim_value for d in net.graph.input[0].type.tensor_type.shape.dim]}
    rules = (Rule(op_types=("AveragePool",), keep_float=True),)
    result = run(net, feeds(shape), scheme=Scheme(rules=rules), target=FORCED)
    assert [o.version for o in result.model.opset_import if not o.domain] == [opset]
    found = measured(net, result.model, feeds(shape))
    assert found.ops["QLinearConv"] == 1
    assert found.sqnr > 25


def test_an_integer_average_pool_needs_no_older_opset() -> None:
    shape = {"x": [1, 32, 12, 12]}
    result = run(pooled(), feeds(shape), target=FORCED)
    assert "AveragePool_p" in result.plan.quantized
    assert [o.version for o in result.model.opset_import if not o.domain] == [21]


def test_what_depends_on_no_input_stays_float() -> None:
    """The runtime folds float nodes on constants, but no integer kernels."""
    nodes = [
        node("CumSum", ["k", "axis"], "u"),
        node("Softplus", ["u"], "m"),  # which prepare does not compute
        node("MatMul", ["m", "w"], "p"),
        node("MatMul", ["x", "w"], "q"),
        node("Add", ["p", "q"], "y"),
    ]
    constants = {"k": weights(8, K), "w": weights(K, K), "axis": np.int64(0)}
    made = model(nodes, {"x": [8, K]}, {"y": [8, K]}, constants)
    result = run(made, feeds({"x": [8, K]}), calibrator=MinMax(), target=FORCED)
    assert "depends on no input" in " ".join(result.left_float.values())
    assert sum(n.op_type == "MatMul" for n in optimized(result.model).nodes) == 0


def upsampled(kind: str) -> onnx.ModelProto:
    """Two convolutions, the first at half the size of the second one, as the input's shape says."""
    sizes = [
        node("Shape", ["x"], "s"),
        node("Gather", ["s", "two"], "n"),
        node("Cast", ["n"], "f", to=onnx.TensorProto.FLOAT),
        node("Shape", ["p"], "t"),
        node("Gather", ["t", "two"], "m"),
        node("Cast", ["m"], "g", to=onnx.TensorProto.FLOAT),
        node("Div", ["f", "g"], "q"),
    ]
    if kind == "scales":
        sizes += [
            node("Concat", ["ones", "q", "q"], "r", axis=0),
            node("Resize", ["p", "", "r"], "u", mode="nearest"),
        ]
    else:
        sizes += [
            node("Mul", ["q", "g"], "h"),
            node("Cast", ["h"], "k", to=onnx.TensorProto.INT64),
            node("Concat", ["batch", "k", "k"], "r", axis=0),
            node("Resize", ["p", "", "", "r"], "u", mode="nearest"),
        ]
    nodes = [
        node("Conv", ["x", "w"], "p", strides=[2, 2], pads=[1, 1, 1, 1]),
        *sizes,
        node("Concat", ["u", "x"], "c", axis=1),
        node("Conv", ["c", "v"], "y"),
    ]
    constants = {"w": weights(8, 8, 3, 3), "v": weights(4, 16, 1, 1), "two": np.array([2])}
    constants |= {"ones": np.ones(2, np.float32)} if kind == "scales" else {}
    constants |= {"batch": np.array([1, 8])} if kind != "scales" else {}
    return model(nodes, {"x": [1, 8, "n", "n"]}, {"y": [1, 4, "n", "n"]}, constants)


@pytest.mark.parametrize("kind", ["scales", "sizes"])
@pytest.mark.parametrize("target", [FORCED, PORTABLE], ids=["forced", "portable"])
def test_sizes_stay_float(kind: str, target: Target) -> None:
    """A scale of 1.99 for 2 would leave a row out."""
    net, data = upsampled(kind), [feeds({"x": [1, 8, n, n]}, seed=n)[0] for n in (14, 20, 22)]
    result = run(net, data, target=target)
    assert "Concat_c" in result.plan.quantized
    found = measured(net, result.model, data)
    assert found.sqnr > 25
    last = {"scales": "Concat_r", "sizes": "Mul_h"}[kind]
    assert "sizes of tensors" in result.left_float[last]


def looped(moves: int) -> onnx.ModelProto:
    """A product, and a Loop that captures it behind Transposes."""
    last = f"t{moves - 1}"
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [node("Add", ["sum", last], "o"), node("Identity", ["c"], "on")],
        "body",
        [info("i", 7, []), info("c", 9, []), info("sum", 1, [K, K])],
        [info("on", 9, []), info("o", 1, [K, K])],
    )
    nodes = [
        node("Gemm", ["x", "w"], "p"),
        node("Relu", ["p"], "r"),
        *(node("Transpose", [["r", "t0"][k]], f"t{k}", perm=[1, 0]) for k in range(moves)),
        node("Loop", ["n", "true", "zeros"], "l", body=body),
        node("Gemm", ["r", "w"], "q"),
        node("Add", ["l", "q"], "y"),
    ]
    constants = {"w": weights(K, K), "n": np.int64(3), "true": np.bool_(True)}
    constants["zeros"] = np.zeros((K, K), np.float32)
    return model(nodes, {"x": [K, K]}, {"y": [K, K]}, constants)


@pytest.mark.parametrize("moves", [1, 2])
def test_no_dq_is_moved_towards_what_a_subgraph_captures(moves: int) -> None:
    """onnxruntime would abort the process when it loads the model."""
    scheme = Scheme(rules=(Rule(op_types=("Transpose",), keep_float=True),))
    net = prepare(looped(moves))
    plan = make_plan(net, scheme, FORCED)
    assert {"Gemm_p", "Gemm_q"} <= set(plan.quantized)
    wiring = wire(Graph(net), plan, {}, {})
    assert wiring.shielded == {"Transpose_t0"}
    data = feeds({"x": [K, K]})
    result = run(looped(moves), data, scheme=scheme, target=FORCED)
    assert measured(net, result.model, data).sqnr > 25


def test_random_numbers_are_made_anew_each_time() -> None:
    nodes = [
        node("RandomNormal", [], "k", shape=[8, K]),
        node("MatMul", ["k", "w"], "p"),
        node("MatMul", ["x", "w"], "q"),
        node("Add", ["p", "q"], "y"),
    ]
    made = model(nodes, {"x": [8, K]}, {"y": [8, K]}, {"w": weights(K, K)})
    result = run(made, feeds({"x": [8, K]}), calibrator=MinMax(), target=FORCED)
    assert "MatMul_p" in result.plan.quantized
    assert "depends on no input" not in " ".join(result.left_float.values())
