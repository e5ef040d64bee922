"""Products of two activations with int8 on the right, which onnxruntime multiplies faster."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, optimized, quantized
from models import feeds, model, node, weights
from onnx import TensorProto

import qdq
from qdq import QuantSpec, Rule, Scheme
from qdq.api import run
from qdq.ops.demand import NodeView, TensorView
from qdq.placement.costs import Features, signed_pays
from qdq.placement.weighing import features_of, kind_of
from qdq.report.advice import without
from qdq.report.matching import match
from qdq.spec import INT8
from qdq.statistics.observe import observe
from qdq.targets import ORT_CPU_NO_VNNI, PORTABLE, Target

PLAIN = replace(FORCED, signed_right=False)


def attention(tokens: int = 256, width: int = 64, *, shared: bool = False) -> onnx.ModelProto:
    """One head; ``shared``: what the scores are made with is what they weigh."""
    constants = {name: weights(width, width, seed=k) for k, name in enumerate(("wq", "wk", "wv"))}
    nodes = [
        node("MatMul", ["x", "wq"], "q"),
        node("MatMul", ["x", "wk"], "k"),
        node("Transpose", ["k"], "turned", perm=[0, 2, 1]),
        node("MatMul", ["q", "turned"], "scores"),
        node("Softmax", ["scores"], "p", axis=-1),
        *([] if shared else [node("MatMul", ["x", "wv"], "v")]),
        node("MatMul", ["p", "k" if shared else "v"], "y"),
    ]
    if shared:
        del constants["wv"]
    shape = [1, tokens, width]
    return model(nodes, {"x": shape}, {"y": shape}, constants)


def data(tokens: int = 256, width: int = 64) -> list[dict[str, Any]]:
    return feeds({"x": (1, tokens, width)}, 3, seed=2)


def right_types(made: onnx.ModelProto) -> list[int]:
    """Of the integer products of the optimized graph: the type of the right factor's codes."""
    graph = optimized(made).model.graph
    types = {t.name: t.data_type for t in graph.initializer}
    slots = {"QLinearMatMul": 5, "MatMulIntegerToFloat": 5}
    found = []
    for n in graph.node:
        if n.op_type in slots and n.input[1 if n.op_type != "QLinearMatMul" else 3] not in types:
            found.append(types[n.input[slots[n.op_type]]])
    return found


def test_the_kernels_get_int8_and_the_values_stay() -> None:
    net = attention()
    result, outcome = quantized(net, data())
    assert result.plan.signed == {"MatMul_scores", "MatMul_y"}
    assert right_types(result.model) == [TensorProto.INT8, TensorProto.INT8]
    assert outcome.ops["MatMulIntegerToFloat"] + outcome.ops["QLinearMatMul"] == 5
    assert outcome.ops["MatMul"] == 0
    assert outcome.sqnr > 20
    assert outcome.steps_apart <= 2
    plain, unsigned = quantized(net, data(), target=PLAIN)
    assert right_types(plain.model) == [TensorProto.UINT8, TensorProto.UINT8]
    np.testing.assert_array_equal(outcome.fused, unsigned.fused)
    np.testing.assert_array_equal(outcome.unfused, unsigned.unfused)


def test_a_factor_of_two_products_is_brought_there_once() -> None:
    """One product reads it, the other one turned: each has codes of its own, made once."""
    net = attention(shared=True)
    extended = onnx.ModelProto.FromString(net.SerializeToString())
    extended.graph.node.append(node("MatMul", ["p", "k"], "z"))
    value = onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 256, 64])
    extended.graph.output.append(value)
    result = run(extended, data(), target=FORCED, calibrator=qdq.MinMax())
    assert result.plan.signed == {"MatMul_scores", "MatMul_y", "MatMul_z"}
    names = [n.name for n in result.model.graph.node if "_signed_Reshape" in n.name]
    assert sorted(names) == ["k_signed_Reshape", "turned_signed_Reshape"]
    assert compare(extended, result.model, data()).sqnr > 20


def test_names_are_those_of_the_reference_page() -> None:
    made = run(attention(), data(), target=FORCED, calibrator=qdq.MinMax()).model
    found = [(n.op_type, n.name) for n in made.graph.node if n.name.startswith("v_signed")]
    assert found == [
        (op, f"v_signed_{op}") for op in ("QuantizeLinear", "Reshape", "DequantizeLinear")
    ]
    zeros = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    assert zeros["v_signed_zero_point"].dtype == np.int8
    assert int(zeros["v_signed_zero_point"]) == int(zeros["v_zero_point"]) - 128


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (attention(tokens=48), {}),
        (attention(), {"target": replace(ORT_CPU_NO_VNNI, weighs_costs=False)}),
        (attention(), {"target": PORTABLE}),
        (attention(), {"scheme": Scheme(activation=QuantSpec(dtype=INT8))}),
    ],
    ids=["few rows", "no VNNI", "portable", "int8"],
)
def test_others_are_left_alone(net: onnx.ModelProto, settings: dict[str, Any]) -> None:
    samples = data(net.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
    result, outcome = quantized(net, samples, **settings)
    assert {"MatMul_scores", "MatMul_y"} <= set(result.plan.quantized)
    assert not result.plan.signed
    assert not [n for n in result.model.graph.node if "_signed" in n.name]
    assert outcome.sqnr > 20


def product(rows: int, depth: int, columns: int) -> Features:
    return Features(
        inputs=max(rows * depth, depth * columns),
        outputs=rows * columns,
        channels_in=depth,
        channels_out=columns,
        weights=depth * columns,
    )


def test_it_pays_where_many_rows_are_multiplied() -> None:
    assert signed_pays(product(1024, 1024, 64))
    assert signed_pays(product(1024, 64, 1024))
    assert not signed_pays(product(16, 1024, 64))
    assert not signed_pays(product(64, 64, 64))
    # rows of a large result that end within a block
    assert signed_pays(product(1504, 64, 1504))
    assert not signed_pays(product(1500, 64, 1500))
    assert signed_pays(product(1500, 1500, 64))
    assert signed_pays(product(1024, 64, 600))
    assert not signed_pays(product(1024, 64, 1000))
    # what it takes to bring the right factor there counts
    rows = [m for m in range(1, 400) if signed_pays(product(m, 256, 256))]
    assert rows == list(range(rows[0], 400))
    assert 60 < rows[0] < 160


def test_the_right_factor_is_counted() -> None:
    view = NodeView(
        name="n",
        op_type="MatMul",
        inputs=(TensorView("a", (2, 128, 64)), TensorView("b", (2, 64, 32))),
        outputs=("y",),
    )
    shapes = {"a": (2, 128, 64), "b": (2, 64, 32), "y": (2, 128, 32)}
    assert features_of(view, ("y",), shapes.get).weights == 2 * 64 * 32
    assert kind_of(view, shapes.get, signed_right=True) == "MatMul.dynamic"
    shapes |= {"a": (2, 1024, 64), "y": (2, 1024, 32)}
    assert kind_of(view, shapes.get, signed_right=True) == "MatMul.signed"
    assert kind_of(view, shapes.get) == "MatMul.dynamic"


def test_sizes_that_only_samples_know_count() -> None:
    net = attention()
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    result, outcome = quantized(net, data())
    assert result.plan.signed == {"MatMul_scores", "MatMul_y"}
    assert outcome.sqnr > 20
    assert compare(net, result.model, data(tokens=31)).sqnr > 20


def test_other_types_by_rule_and_products_that_stay_float_are_left() -> None:
    rules = (Rule(nodes="MatMul_y", keep_float=True),)
    result, _ = quantized(attention(), data(), scheme=Scheme(rules=rules))
    assert result.plan.signed == {"MatMul_scores"}
    typed = (Rule(tensors="q", dtype=INT8),)
    plan = run(
        attention(), data(), target=replace(FORCED, one_type=False), scheme=Scheme(rules=typed)
    ).plan
    assert "MatMul_scores" in plan.quantized
    assert "MatMul_scores" not in plan.signed


def test_where_it_is_not_written_it_is_not_counted_on() -> None:
    """Without VNNI the product of 1024 tokens takes as long as in float, so it stays that."""
    net, samples = attention(tokens=1024), data(tokens=1024)
    assert "MatMul_y" in run(net, samples).plan.signed
    assert "MatMul_y" not in run(net, samples, target=ORT_CPU_NO_VNNI).plan.quantized


def test_of_int8_activations_it_is_not_written_either() -> None:
    net, samples = attention(tokens=1024), data(tokens=1024)
    both = Scheme(activation=QuantSpec(dtype=INT8))
    assert "MatMul_y" not in run(net, samples, scheme=both).plan.quantized


def test_compare_knows_what_they_read() -> None:
    net = attention()
    made = run(net, data(), target=FORCED, calibrator=qdq.MinMax()).model
    report = qdq.compare(net, made, data())
    assert "namesake" not in str(report)
    rows = {row.name: row for row in report.nodes}
    assert rows["MatMul_scores"].integer
    assert rows["MatMul_y"].integer


def test_advice_counts_all_readers() -> None:
    """A tensor that two products read, one of them in int8, becomes float for both."""
    net, samples = attention(shared=True), data()

    def told(target: Target) -> dict[str, Any]:
        made = run(net, samples, target=target, calibrator=qdq.MinMax()).model
        report = qdq.compare(net, made, samples, repeats=0, advise=8)
        noises = {row.name: row.local_db for row in report.nodes}
        return noises | {a.what: a.gain_db for a in report.advice}

    found, wanted = told(FORCED), told(PLAIN)
    assert "leave tensor k and 1 more float (4 nodes)" in wanted
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, abs=0.01)


def test_a_node_is_tried_in_float_whatever_codes_it_reads() -> None:
    """Of one tensor, which is float, one product reads int8 and the other one uint8."""
    parts = [node("Tanh", ["x"], "k"), node("MatMul", ["p", "k"], "y"),
             node("MatMul", ["k", "w"], "z")]  # fmt: skip
    inputs = {"x": [1, 256, 64], "p": [1, 256, 256]}
    net = model(parts, inputs, {"y": [1, 256, 64], "z": [1, 256, 64]}, {"w": weights(64, 64)})
    samples = feeds(inputs, 3)
    scheme = Scheme(rules=(Rule(op_types=("Tanh",), keep_float=True),))
    result = run(net, samples, target=FORCED, scheme=scheme)
    assert result.plan.signed == {"MatMul_y"}
    found = match(net, result.model)
    for own, tensor, other in (("MatMul_y", "y", "z"), ("MatMul_z", "z", "y")):
        (index,) = [site.index for site in found.sites if site.name == own]
        tried = observe(without(found, [index]), ["y", "z"], samples)
        for seen, exact, coded in zip(
            tried,
            observe(net, ["y", "z"], samples),
            observe(result.model, ["y", "z"], samples),
            strict=True,
        ):
            np.testing.assert_allclose(seen[tensor], exact[tensor], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(seen[other], coded[other], rtol=1e-4, atol=1e-4)
            assert np.abs(coded[tensor] - exact[tensor]).max() > 1e-3


def test_other_codes_of_a_tensor_are_not_its_own() -> None:
    """A second Q and DQ with another scale rounds otherwise."""
    constants = {"w": weights(64, 32), "v": weights(64, 32, seed=3)}
    parts = [node("MatMul", ["x", "w"], "y"), node("MatMul", ["x", "v"], "z")]
    shapes = {"x": [4, 64]}, {"y": [4, 32], "z": [4, 32]}
    net = model(parts, *shapes, constants)

    def reader(scale: float, zero: np.generic) -> tuple[str, ...]:
        numbers = {"s": np.float32(0.03), "o": np.uint8(128), "s2": np.float32(scale), "o2": zero}
        coded = [
            node("QuantizeLinear", ["x", "s", "o"], "codes"),
            node("DequantizeLinear", ["codes", "s", "o"], "real"),
            node("MatMul", ["real", "w"], "y"),
            node("QuantizeLinear", ["x", "s2", "o2"], "codes2"),
            node("DequantizeLinear", ["codes2", "s2", "o2"], "real2"),
            node("MatMul", ["real2", "v"], "z"),
        ]
        return match(net, model(coded, *shapes, {**constants, **numbers})).coded["x"].others

    assert reader(0.03, np.uint8(128)) == reader(0.03, np.int8(0)) == ("real2",)
    assert reader(0.04, np.uint8(128)) == reader(0.03, np.uint8(127)) == ()


def test_another_reshape_of_codes_is_no_pair() -> None:
    """Other tools may move codes themselves; then the shapes before and behind differ."""
    constants = {"w": weights(64, 32), "shape": np.array([-1, 64], np.int64)}
    parts = [node("Reshape", ["x", "shape"], "flat"), node("MatMul", ["flat", "w"], "y")]
    inputs, outputs = {"x": [2, 3, 64]}, {"y": [6, 32]}
    net = model(parts, inputs, outputs, constants)
    scale, zero = np.float32(0.03), np.uint8(128)
    moved = [
        node("QuantizeLinear", ["x", "scale", "zero"], "codes"),
        node("Reshape", ["codes", "shape"], "turned"),
        node("DequantizeLinear", ["turned", "scale", "zero"], "flat"),
        node("MatMul", ["flat", "w"], "y"),
    ]
    made = model(moved, inputs, outputs, {**constants, "scale": scale, "zero": zero})
    with pytest.raises(qdq.ModelError, match="no QuantizeLinear and DequantizeLinear around"):
        qdq.compare(net, made, feeds({"x": (2, 3, 64)}, 2))
