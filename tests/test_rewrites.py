"""Float nodes that are written as others, which the runtime runs faster."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from chains import Net, between, samples
from harness import FORCED, compare, quantized
from models import feeds, model, node, weights

from qdq import Rule, Scheme
from qdq.api import run
from qdq.forms import in_steps, tuned
from qdq.graph import Graph
from qdq.placement.weighing import Weighing
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.spelling import MISH as MISH_STEPS
from qdq.statistics.observe import observe
from qdq.targets import ORT_CPU, PORTABLE

SWISH = (("Sigmoid", "a", "g"), ("Mul", "a g", "m"))
TURNED = (("Sigmoid", "a", "g"), ("Mul", "g a", "m"))
FLOATS = Scheme(rules=(Rule(op_types=("Sigmoid", "Mul"), keep_float=True),))
FLOAT_ONLY = Scheme(rules=(Rule(nodes=".*", keep_float=True),))


def written(net: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in net.graph.node if n.op_type not in ("QuantizeLinear", "Conv")]


@pytest.mark.parametrize("swish", [SWISH, TURNED], ids=["x first", "x last"])
def test_one_node_and_one_dq(swish: tuple[tuple[str, str, str], ...]) -> None:
    net = between(*swish).model()
    data = samples(net, 4)
    result, outcome = quantized(net, data, scheme=FLOATS)
    assert outcome.ops["QuickGelu"] == 1
    assert outcome.ops["QLinearConv"] == 2
    # one in front of the swish, one at the end: with two readers the runtime would make it two
    assert outcome.ops["DequantizeLinear"] == 2
    assert outcome.ops["Sigmoid"] == outcome.ops["Mul"] == 0
    assert outcome.steps_apart <= 1
    assert outcome.sqnr > 35
    (made,) = [n for n in result.model.graph.node if n.op_type == "QuickGelu"]
    assert (made.name, made.domain, list(made.output)) == ("Mul_m", "com.microsoft", ["m"])
    assert {o.domain: o.version for o in result.model.opset_import}["com.microsoft"] == 1
    assert {"Sigmoid_g", "Mul_m"} <= result.left_float.keys()


def test_it_computes_what_two_nodes_do() -> None:
    net = between(*SWISH).model()
    data = samples(net, 4)
    _, outcome = quantized(net, data, scheme=FLOATS)
    _, apart = quantized(net, data, scheme=FLOATS, target=replace(FORCED, tunes_float=False))
    assert (apart.ops["QuickGelu"], apart.ops["DequantizeLinear"]) == (0, 3)
    np.testing.assert_allclose(outcome.fused, apart.fused, atol=2e-2)
    assert abs(outcome.sqnr - apart.sqnr) < 0.5


@pytest.mark.parametrize(
    "middle",
    [
        (*SWISH[:1], ("Mul", "a g", "s"), ("Add", "s g", "m")),  # the gate has another reader
        (("Sigmoid", "a", "g"), ("Tanh", "a", "t"), ("Mul", "t g", "m")),  # no swish
        (("HardSigmoid", "a", "g"), ("Mul", "a g", "m")),
    ],
    ids=["gate read twice", "another tensor", "hard"],
)
def test_what_is_not_rewritten(middle: tuple[tuple[str, str, str], ...]) -> None:
    net = between(*middle).model()
    floats = Scheme(rules=(Rule(op_types=("Conv",), only=True),))
    result, outcome = quantized(net, samples(net, 4), scheme=floats)
    assert outcome.ops["QLinearConv"] == 2
    assert "QuickGelu" not in written(result.model)
    assert all(o.domain != "com.microsoft" for o in result.model.opset_import)


def test_a_gate_that_is_an_output_stays() -> None:
    net = between(*SWISH).model("y", "g")
    result, _ = quantized(net, samples(net, 4), scheme=FLOATS)
    assert "QuickGelu" not in written(result.model)


def test_behind_a_float_convolution_the_runtime_does_it() -> None:
    net = between(*SWISH).model()
    rule = Rule(nodes="Conv_a", keep_float=True)
    scheme = Scheme(rules=(rule, *FLOATS.rules))
    result, outcome = quantized(net, samples(net, 4), scheme=scheme)
    assert written(result.model).count("Sigmoid") == 1
    assert outcome.ops["QLinearConv"] == 1


def test_integer_swishes_and_other_targets_keep_their_two_nodes() -> None:
    net = between(*SWISH).model()
    data = samples(net, 4)
    result, outcome = quantized(net, data)
    assert (outcome.ops["QLinearSigmoid"], outcome.ops["QLinearMul"]) == (1, 1)
    portable = run(net, data, target=PORTABLE, scheme=FLOATS).model
    for made in (result.model, portable):
        assert "QuickGelu" not in written(made)
    assert compare(net, portable, data).sqnr > 35


def test_the_plan_pays_for_one_dq() -> None:
    shape = [1, 64, 40, 40]
    net = model(
        [
            node("Conv", ["x", "w"], "a", pads=[1] * 4),
            node("Sigmoid", ["a"], "g"),
            node("Mul", ["a", "g"], "y"),
        ],
        {"x": shape},
        {"y": shape},
        {"w": weights(64, 64, 3, 3)},
    )
    plans = [
        make_plan(
            prepare(net),
            FLOATS,
            replace(ORT_CPU, tunes_float=one),
            Weighing(noise=0, least=0),
        )
        for one in (True, False)
    ]
    assert plans[0].placement.float_time == plans[1].placement.float_time
    assert plans[0].quantized == ("Conv_a",)
    assert plans[0].placement.time < plans[1].placement.time


def residual_norm() -> onnx.ModelProto:
    """Gemm → + x → LayerNormalization, as in a transformer: three dimensions."""
    width, shape = 64, [1, 16, 64]
    constants = {
        "w": weights(width, width),
        "g": np.linspace(0.5, 1.5, width, dtype=np.float32),
        "b": np.zeros(width, np.float32),
    }
    nodes = [
        node("MatMul", ["x", "w"], "m"),
        node("Add", ["m", "x"], "s"),
        node("LayerNormalization", ["s", "g", "b"], "y", axis=-1),
    ]
    return model(nodes, {"x": shape}, {"y": shape}, constants)


KEPT = Scheme(rules=(Rule(op_types=("Add",), keep_float=True),))


def test_a_residual_sum_is_not_fused_into_its_norm() -> None:
    net = residual_norm()
    data = samples(net, 4)
    result, outcome = quantized(net, data, scheme=KEPT)
    assert written(result.model).count("Sum") == 1
    assert "Add" not in written(result.model)
    assert outcome.ops["SkipLayerNormalization"] == 0
    assert outcome.ops["LayerNormalization"] == 1
    assert outcome.steps_apart <= 1
    assert outcome.sqnr > 35
    _, fused = quantized(net, data, scheme=KEPT, target=replace(FORCED, tunes_float=False))
    assert fused.ops["SkipLayerNormalization"] == 1
    np.testing.assert_allclose(outcome.fused, fused.fused, atol=1e-5)


def test_a_model_that_stays_float_gains_too() -> None:
    net = residual_norm()
    result, outcome = quantized(net, samples(net, 4), scheme=FLOAT_ONLY)
    assert not result.plan.quantized
    assert outcome.ops["SkipLayerNormalization"] == 0
    np.testing.assert_allclose(outcome.fused, outcome.exact, atol=1e-5)


def test_an_integer_sum_keeps_its_kernel() -> None:
    net = residual_norm()
    result, outcome = quantized(net, samples(net, 4))
    assert "Add_s" in result.plan.quantized
    assert "Sum" not in written(result.model)
    assert outcome.ops["QLinearAdd"] == 1


def attention(mask: float, readers: str = "MatMul") -> onnx.ModelProto:
    """Scores + relative bias + mask → Reshape → Softmax → product, as windowed attention has it."""
    r = np.random.default_rng(5)
    hidden = np.where(r.random((2, 1, 16, 16)) < 0.4, np.float32(mask), np.float32(0))
    constants = {
        "w": weights(16, 16),
        "bias": r.standard_normal((1, 1, 16, 16)).astype(np.float32),
        "mask": hidden.astype(np.float32),
        "shape": np.array([4, 16, 16], np.int64),
    }
    nodes = [
        node("MatMul", ["x", "w"], "scores"),
        node("Add", ["scores", "mask"], "masked"),
        node("Add", ["masked", "bias"], "shifted"),
        node("Reshape", ["shifted", "shape"], "flat"),
        node("Softmax", ["flat"], "p", axis=-1),
        node(readers, ["p", "v"] if readers == "MatMul" else ["p"], "y"),
    ]
    inputs = {"x": [2, 2, 16, 16], "v": [4, 16, 8]}
    shape = [4, 16, 8] if readers == "MatMul" else [4, 16, 16]
    if readers != "MatMul":
        del inputs["v"]
    return model(nodes, inputs, {"y": shape}, constants)


def inputs_of(net: onnx.ModelProto, count: int) -> list[dict[str, np.ndarray]]:
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in net.graph.input}
    return feeds(shapes, count, seed=3)


def test_what_a_mask_leaves_of_a_probability_is_zero() -> None:
    net = attention(-100.0)
    result, outcome = quantized(net, inputs_of(net, 3), scheme=FLOAT_ONLY)
    assert written(result.model).count("ThresholdedRelu") == 1
    np.testing.assert_allclose(outcome.fused, outcome.exact, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(outcome.unfused, outcome.exact, rtol=1e-5, atol=1e-6)
    (made,) = [n for n in result.model.graph.node if n.op_type == "ThresholdedRelu"]
    assert (made.name, list(made.input), list(made.output)) == (
        "Softmax_p_cleaned",
        ["p_all"],
        ["p"],
    )


@pytest.mark.parametrize(
    "net",
    [attention(-10.0), attention(-1e4), attention(-3.4e38), attention(-100.0, readers="Abs")],
    ids=["shallow", "deep", "deepest", "no product"],
)
def test_other_masks_leave_no_denormals_or_do_no_harm(net: onnx.ModelProto) -> None:
    result, outcome = quantized(net, inputs_of(net, 3), scheme=FLOAT_ONLY)
    assert "ThresholdedRelu" not in written(result.model)
    np.testing.assert_allclose(outcome.fused, outcome.exact, rtol=1e-5, atol=1e-6)


def test_the_portable_target_has_standard_forms() -> None:
    for net in (attention(-100.0), residual_norm()):
        made = run(net, inputs_of(net, 2), target=PORTABLE, scheme=FLOAT_ONLY).model
        assert not {"ThresholdedRelu", "Sum", "QuickGelu"} & set(written(made))


def test_short_runs_are_not_moved_as_codes() -> None:
    """The runtime would move the DQ and the Q over what only moves values."""
    net = Net().linear("x", "a")
    net.op("Reshape", "a split", "s").op("Transpose", "s", "t", perm=[0, 2, 1, 3])
    net.op("Reshape", "t whole", "m").linear("m", "y")
    net.constants["split"] = np.array([32, 2, 4, 2], np.int64)
    net.constants["whole"] = np.array([1, 8, 8, 8], np.int64)
    exact = net.model()
    data = samples(exact, 4)
    scheme = Scheme(rules=(Rule(op_types=("Conv",), only=True),))
    result, outcome = quantized(exact, data, scheme=scheme)
    names = {n.name for n in result.model.graph.node if n.op_type == "LeakyRelu"}
    assert names == {"Reshape_s_stays_float", "Transpose_t_stays_float"}
    assert (outcome.ops["QLinearConv"], outcome.ops["LeakyRelu"]) == (2, 2)
    assert outcome.steps_apart <= 1
    assert outcome.sqnr > 35


MISH = (("Mish", "a", "m"),)


def test_mish_is_written_in_steps_that_are_fast() -> None:
    net = between(*MISH).model()
    data = samples(net, 4)
    result, outcome = quantized(net, data)
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.ops["Mish"] == outcome.ops["Softplus"] == outcome.ops["Tanh"] == 0
    assert (outcome.ops["Softsign"], outcome.ops["HardSigmoid"]) == (1, 1)
    assert outcome.sqnr > 35
    last = next(n for n in result.model.graph.node if "m" in n.output)
    assert (last.op_type, last.name) == ("Mul", "Mish_m")
    assert "Mish_m" in result.left_float
    _, plain = quantized(net, data, target=replace(FORCED, tunes_float=False))
    assert plain.ops["Softplus"] == 1
    np.testing.assert_allclose(outcome.fused, plain.fused, atol=1e-3)
    portable = run(net, data, target=PORTABLE).model
    assert "Mish" in written(portable)
    assert compare(net, portable, data).sqnr > 30


def test_mish_in_steps_is_mish() -> None:
    """Of all floats, but for those that are no numbers."""
    x = np.concatenate([np.linspace(-120, 120, 4001), np.geomspace(1e-38, 1e38, 200), [0.0]])
    x = np.concatenate([x, -x]).astype(np.float32)
    net = model([node("Mish", ["x"], "y")], {"x": [x.size]}, {"y": [x.size]}, {})
    steps, _ = in_steps(net.graph.node[0], MISH_STEPS, Graph(net).fresh)
    assert len(steps) == len(MISH_STEPS)
    made = model(steps, {"x": [x.size]}, {"y": [x.size]}, {})
    for optimize in (True, False):
        (seen,) = observe(made, ["y"], [{"x": x}], optimize=optimize)
        wide = x.astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            exact = wide * np.tanh(np.logaddexp(0, wide))
        np.testing.assert_allclose(seen["y"], exact, rtol=1e-6, atol=2e-6 * 20)
        assert np.abs(seen["y"][np.abs(x) < 20] - exact[np.abs(x) < 20]).max() < 4e-6


def test_only_float32_of_mish() -> None:
    net = model([node("Mish", ["x"], "y")], {"x": [4]}, {"y": [4]}, {})
    graph = Graph(net)
    name = net.graph.node[0].name
    assert list(tuned(graph, set(), set(), {}).split) == [name]
    assert not tuned(graph, set(), {name}, {}).split
    net.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert not tuned(Graph(net), set(), set(), {}).split
