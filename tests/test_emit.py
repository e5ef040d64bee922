"""Emitted graphs: names, wiring, metadata, determinism; float, unfused and fused agree."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, fused_ops
from harness import run as session_run
from models import conv_chain, feeds, mlp, model, node, residual, weights
from onnx import TensorProto, helper

import qdq
from qdq import Rule, Scheme
from qdq.api import make_problem, run
from qdq.emit import emit
from qdq.graph import Graph
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.ranges import TensorRange
from qdq.solve import solve
from qdq.steps import DEFAULT_STEPS
from qdq.targets import ORT_CPU

IMAGE = {"x": [1, 32, 24, 24]}


def quantized(net: onnx.ModelProto, shapes: dict, *rules: Rule, **more) -> onnx.ModelProto:
    more.setdefault("target", FORCED)
    return run(net, feeds(shapes), scheme=Scheme(rules=rules), **more).model


def nodes_of(net: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [n for n in net.graph.node if n.op_type == op]


class TestNames:
    def test_of_activations_weights_and_biases(self) -> None:
        net = quantized(conv_chain(depth=1), IMAGE)
        names = {n.name: n for n in net.graph.node}
        assert names["x_QuantizeLinear"].output[0] == "x_QuantizeLinear_Output"
        assert names["x_DequantizeLinear"].output[0] == "x_DequantizeLinear_Output"
        assert names["w0_DequantizeLinear"].input[0] == "w0_quantized"
        assert names["b0_DequantizeLinear"].input[:2] == ["b0_quantized", "b0_scale"]
        assert names["Conv_c0"].output == ["c0"]  # the user's own names stay
        held = {t.name: t for t in net.graph.initializer}
        assert {"x_scale", "x_zero_point", "w0_quantized", "w0_scale", "w0_zero_point"} <= set(held)
        assert "w0" not in held  # the float weight is not carried along
        assert list(held["x_scale"].dims) == []  # rank 0: the fused kernels want it so
        assert held["b0_quantized"].data_type == TensorProto.INT32

    def test_never_collide(self) -> None:
        net = conv_chain(depth=1)
        net.graph.initializer[0].name = "w0_quantized_"
        for taken in ("w0_quantized", "x_scale", "x_QuantizeLinear_Output"):
            net.graph.node.append(node("Relu", ["x"], taken))
            net.graph.output.append(helper.make_tensor_value_info(taken, 1, [1, 32, 24, 24]))
        net.graph.initializer[0].name = "w0"
        made = quantized(net, IMAGE)
        onnx.checker.check_model(made, full_check=True)
        assert "w0_quantized_2" in {t.name for t in made.graph.initializer}


class TestWiring:
    def test_a_chain_becomes_integer_kernels_only(self) -> None:
        for clamp in ("Relu", "Clip"):
            ops = fused_ops(quantized(conv_chain(clamp=clamp), IMAGE))
            assert ops["QLinearConv"] == 3
            assert ops["Conv"] == ops["FusedConv"] == ops[clamp] == 0
            assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)

    def test_three_readers_fuse(self) -> None:
        outcome = compare(residual(), quantized(residual(), IMAGE), feeds(IMAGE, seed=9))
        assert (outcome.ops["QLinearConv"], outcome.ops["QLinearAdd"]) == (3, 1)
        assert outcome.steps_apart <= 2
        assert outcome.sqnr > 30

    def test_gemms_hand_out_float_at_the_end(self) -> None:
        shapes = {"x": [64, 256]}
        made = quantized(mlp(), shapes)
        outcome = compare(mlp(), made, feeds(shapes, seed=9))
        assert outcome.ops["QGemm"] == 2
        assert outcome.ops["DequantizeLinear"] == 0
        assert outcome.sqnr > 35
        assert made.graph.node[-1].op_type == "Gemm"

    def test_only_integer_readers_read_codes(self) -> None:
        net = model(
            [
                node("Conv", ["x", "w"], "c"),
                node("Exp", ["x"], "e"),
                node("Add", ["c", "e"], "y"),
            ],
            {"x": [1, 4, 8, 8]},
            {"y": [1, 4, 8, 8]},
            {"w": weights(4, 4, 1, 1)},
        )
        made = quantized(net, {"x": [1, 4, 8, 8]}, Rule(op_types=("Add",), keep_float=True))
        names = {n.name: n for n in made.graph.node}
        assert names["Exp_e"].input[0] == "x"
        assert names["Conv_c"].input[0] == "x_DequantizeLinear_Output"
        assert names["Add_y"].input[0] == "c_DequantizeLinear_Output"

    def test_a_graph_output_from_an_integer_kernel_keeps_its_name(self) -> None:
        net = model(
            [
                node("Conv", ["x", "w"], "c"),
                node("Relu", ["c"], "r"),
                node("Conv", ["r", "v"], "y"),
            ],
            {"x": [1, 8, 8, 8]},
            {"r": [1, 8, 8, 8], "y": [1, 8, 8, 8]},
            {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 1, 1, seed=4)},
        )
        made = quantized(net, {"x": [1, 8, 8, 8]})
        assert [o.name for o in made.graph.output] == ["r", "y"]
        assert fused_ops(made)["QLinearConv"] == 2

    def test_constants_that_are_outputs_stay_float_constants(self) -> None:
        """Of a weight too, of which the kernel reads codes alone; and one that no node reads."""
        net = model(
            [node("Conv", ["x", "w"], "y")],
            {"x": [1, 8, 8, 8]},
            {"y": [1, 8, 8, 8], "w": [8, 8, 1, 1], "alone": [2]},
            {"w": weights(8, 8, 1, 1), "alone": np.float32([1, 2])},
        )
        made = quantized(net, {"x": [1, 8, 8, 8]})
        assert fused_ops(made)["QLinearConv"] == 1
        (_, w, alone), (_, exact, _) = (
            session_run(m, feeds({"x": [1, 8, 8, 8]}, 1), fused=True)[0] for m in (made, net)
        )
        assert np.array_equal(w, exact)
        assert alone.tolist() == [1, 2]

    def test_a_float_conv_between_integers_stays_float(self) -> None:
        net = conv_chain()
        made = quantized(net, IMAGE, Rule(nodes="Conv_c1", keep_float=True))
        outcome = compare(net, made, feeds(IMAGE, seed=9))
        assert outcome.ops["QLinearConv"] == 2
        # onnxruntime would have made it the third, had the identity not hidden the Q behind it
        assert outcome.ops["Conv"] + outcome.ops["FusedConv"] == 1
        assert outcome.steps_apart <= 2

    def test_names_that_subgraphs_capture_mean_the_dequantized_tensor(self) -> None:
        branch = helper.make_graph(
            [helper.make_node("Mul", ["c", "c"], ["square"], name="square")],
            "then",
            [],
            [helper.make_tensor_value_info("square", 1, None)],
        )
        other = helper.make_graph(
            [helper.make_node("Neg", ["c"], ["negated"], name="negated")],
            "else",
            [],
            [helper.make_tensor_value_info("negated", 1, None)],
        )
        net = model(
            [
                node("Conv", ["x", "w"], "c"),
                node("ReduceMax", ["c"], "m", keepdims=0),
                node("Greater", ["m", "zero"], "yes"),
                node("If", ["yes"], "y", then_branch=branch, else_branch=other),
                node("Conv", ["c", "v"], "z"),
            ],
            {"x": [1, 8, 8, 8]},
            {"y": [1, 8, 8, 8], "z": [1, 8, 8, 8]},
            {"w": weights(8, 8, 1, 1), "v": weights(8, 8, 1, 1, seed=4), "zero": np.float32(0)},
        )
        made = quantized(net, {"x": [1, 8, 8, 8]})
        outcome = compare(net, made, feeds({"x": [1, 8, 8, 8]}, seed=9))
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.sqnr > 22


class TestSolverFloats:
    def test_a_node_that_the_solver_leaves_float_is_wired_as_float(self) -> None:
        prepared = prepare(conv_chain())
        plan = make_plan(prepared, target=FORCED)
        ranges = {name: TensorRange(-4 if name == "x" else 0, 4) for name in plan.observed}
        solution = solve(make_problem(prepared, plan, ranges), DEFAULT_STEPS)
        made = emit(prepared, plan, replace(solution, floats={"Conv_c1": "weights would collapse"}))
        outcome = compare(conv_chain(), made, feeds(IMAGE))
        assert outcome.ops["QLinearConv"] == 2
        assert "w1" in {t.name for t in made.graph.initializer}
        assert outcome.sqnr > 20

    def test_an_input_that_was_always_0_leaves_a_node_with_a_bias_float(self) -> None:
        nodes = [
            node("Sub", ["x", "h"], "s"),
            node("Relu", ["s"], "r"),
            node("Conv", ["r", "w", "b"], "y"),
        ]
        bias = np.full(4, 0.003, np.float32)
        constants = {"h": np.float32(50), "w": weights(4, 3, 1, 1), "b": bias}
        shape = {"x": [1, 3, 8, 8]}
        net = model(nodes, shape, {"y": [1, 4, 8, 8]}, constants)
        result = run(net, feeds(shape), target=FORCED)
        assert result.left_float["Conv_y"].startswith("its input 'r' was 0 in every sample")
        assert compare(net, result.model, feeds(shape)).sqnr > 100
        unbiased = model(nodes, shape, {"y": [1, 4, 8, 8]}, {**constants, "b": bias * 0})
        assert not run(unbiased, feeds(shape), target=FORCED).solution.floats

    def test_so_does_one_behind_a_pool(self) -> None:
        """The pool has the parameters of what it reads, and no range of its own."""
        nodes = [
            node("MaxPool", ["x"], "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "w", "b"], "y"),
        ]
        constants = {"w": 60 * weights(4, 3, 1, 1), "b": np.full(4, 0.3, np.float32)}
        shape = {"x": [1, 3, 8, 8]}
        net = model(nodes, shape, {"y": [1, 4, 4, 4]}, constants)
        zeros = [{"x": np.zeros(shape["x"], np.float32)}] * 2
        result = run(net, zeros, target=FORCED)
        assert result.left_float["Conv_y"].startswith("its input 'p' was 0 in every sample")
        assert compare(net, result.model, zeros).sqnr > 100


def test_shapes_that_the_float_model_declares_wrongly_are_not_held_against_it() -> None:
    net = conv_chain()
    declared = net.graph.output[0].type.tensor_type.shape.dim
    declared[2].dim_value = 99
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(net, full_check=True)
    assert fused_ops(quantized(net, IMAGE))["QLinearConv"] == 3


class TestClampsThatStay:
    def test_a_range_beyond_the_clamp_is_right_and_said(self) -> None:
        rule = Rule(tensors="r1", range=(-2.0, 4.0))
        result = run(conv_chain(), feeds(IMAGE), scheme=Scheme(rules=(rule,)), target=FORCED)
        assert "goes beyond the bounds of 'Relu_r1'" in result.left_float["Conv_c1"]
        assert set(result.left_float) == {"Conv_c1"}
        outcome = compare(conv_chain(), result.model, feeds(IMAGE, seed=9))
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.sqnr > 25

    def test_calibrated_ranges_never_do(self) -> None:
        for clamp in ("Relu", "Clip"):
            assert not run(conv_chain(clamp=clamp), feeds(IMAGE), target=FORCED).left_float

    def test_a_node_that_the_solver_leaves_float_is_still_clamped(self) -> None:
        """Codes for [-1, 1] reach to -1.004, so the Clip is dropped, but only where codes are."""
        bias = np.zeros(64, np.float32)
        bias[1:3] = 1e6, -1e6  # per tensor, no scale holds it beside these weights
        nodes = [
            node("Conv", ["x", "v", "b"], "a", pads=[1] * 4),
            node("Clip", ["a", "low", "high"], "c"),
            node("Conv", ["c", "w"], "y", pads=[1] * 4),
        ]
        shape = [1, 64, 16, 16]
        constants = {"v": weights(64, 64, 3, 3), "w": weights(64, 64, 3, 3), "b": bias,
                     "low": np.float32(-1), "high": np.float32(1)}  # fmt: skip
        net = model(nodes, {"x": shape}, {"c": shape, "y": shape}, constants)
        data = [{"x": f["x"] / 1000} for f in feeds({"x": shape}, count=2)]
        made = self.left_float(net, data, {"Conv_a"})
        outcome = compare(net, made, data)
        assert max(np.abs(outcome.fused).max(), np.abs(outcome.unfused).max()) <= 1.01

    def test_nor_is_a_clamp_lost_whose_reader_the_solver_leaves_float(self) -> None:
        bias = np.zeros(64, np.float32)
        bias[1] = 3e9
        nodes = [
            node("Gemm", ["x", "v"], "a"),
            node("Clip", ["a", "low", "high"], "c"),
            node("Gemm", ["c", "w", "b"], "y"),
        ]
        shape = [8, 64]
        constants = {"v": weights(64, 64) * 4, "w": weights(64, 64), "b": bias,
                     "low": np.float32(-1), "high": np.float32(1)}  # fmt: skip
        net = model(nodes, {"x": shape}, {"y": shape}, constants)
        data = feeds({"x": shape}, count=2)
        made = self.left_float(net, data, {"Gemm_y"})
        assert len(nodes_of(made, "Clip")) == 1

    def left_float(
        self, net: onnx.ModelProto, data: list[dict], wanted: set[str]
    ) -> onnx.ModelProto:
        scheme = Scheme(per_channel=False, smooth=False, equalize=False)
        result = run(net, data, scheme=scheme, calibrator=qdq.MinMax(), target=FORCED)
        assert set(result.solution.floats) == wanted
        return result.model


class TestMetadata:
    def test_says_how_it_was_made(self) -> None:
        net = conv_chain()
        net.producer_name = "pytorch"
        helper.set_model_props(net, {"author": "me"})
        made = quantized(net, IMAGE)
        props = {p.key: p.value for p in made.metadata_props}
        assert props["author"] == "me"
        assert props["qdq.source_producer"] == "pytorch"
        assert made.producer_name == "qdq"
        assert props["qdq.version"] == qdq.__version__
        recipe = json.loads(props["qdq.recipe"])
        assert recipe["target"] == "onnxruntime CPU"
        assert recipe["calibrator"].startswith("MSE")
        assert json.loads(props["qdq.left_float"]) == {}


class TestSameBytes:
    @pytest.mark.parametrize("name", ["MinMax", "Entropy", "Percentile", "MSE"])
    def test_for_any_order_of_samples(self, name: str) -> None:
        data = feeds(IMAGE, count=6)
        net = conv_chain()
        made = [
            run(net, order, target=FORCED, calibrator=getattr(qdq, name)()).model.SerializeToString(
                deterministic=True
            )
            for order in (data, data, data[::-1], data[3:] + data[:3])
        ]
        assert len(set(made)) == 1

    def test_the_input_is_not_touched(self) -> None:
        net = residual()
        before = net.SerializeToString(deterministic=True)
        qdq.quantize(net, feeds(IMAGE))
        assert net.SerializeToString(deterministic=True) == before


def test_wide_and_deep_models_take_linear_time() -> None:
    depth = 300
    net = conv_chain(channels=4, size=4, depth=depth)
    made = quantized(net, {"x": [1, 4, 4, 4]})
    assert len(nodes_of(made, "Conv")) == depth
    assert Graph(made).opset == 21


def test_default_target_is_the_cpu() -> None:
    made = qdq.quantize(conv_chain(channels=64, size=32), feeds({"x": [1, 64, 32, 32]}))
    assert fused_ops(made)["QLinearConv"] == 3
    assert ORT_CPU.weighs_costs


def test_a_model_in_which_nothing_pays_is_returned_with_that_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = conv_chain(channels=4, size=4)
    made = qdq.quantize(net, feeds({"x": [1, 4, 4, 4]}))
    assert "no node of this model runs on integers" in caplog.text
    outcome = compare(net, made, feeds({"x": [1, 4, 4, 4]}, seed=3))
    assert outcome.sqnr > 120
    assert not nodes_of(made, "QuantizeLinear")


def test_the_default_recipe_corrects_biases_and_records_it() -> None:
    result = run(conv_chain(), feeds(IMAGE), target=FORCED)
    corrected = [c.tensor for c in result.solution.changes if c.step == "CorrectBias"]
    assert corrected == ["b0", "b1", "b2"]
    props = {p.key: p.value for p in result.model.metadata_props}
    assert json.loads(props["qdq.planned"]) == {"Conv": 3}
