"""Faults of other quantizers around the graph, each of which must not be ours."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, dequantized, quantized, run
from models import conv_chain, feeds, mlp, model, node, residual, retyped, rng, weights
from onnx import TensorProto, helper, numpy_helper

import qdq
from qdq import ConfigError, Rule, Scheme
from qdq.spec import INT8, QuantSpec
from qdq.targets import PORTABLE

IMAGE = [1, 8, 6, 6]


def convs(*links: tuple[str, str, str]) -> list[onnx.NodeProto]:
    """Convs of 8 channels as (input, weight, output)."""
    return [node("Conv", [x, w], y, pads=[1] * 4) for x, w, y in links]


def kernels(*names: str, size: int = 3) -> dict[str, np.ndarray]:
    return {n: weights(8, 8, size, size, seed=k) for k, n in enumerate(names)}


def all_outputs(float_model, result, data) -> list[float]:
    """Largest error of each graph output of the fused model, relative to its range."""
    exact, found = run(float_model, data, fused=True), run(result.model, data, fused=True)
    return [
        max(np.abs(a[k] - b[k]).max() for a, b in zip(exact, found, strict=True))
        / max(np.ptp(a[k]) for a in exact)
        for k in range(len(exact[0]))
    ]


class TestClamps:
    @pytest.mark.parametrize("clamp", ["Relu", "Clip"])
    def test_the_tensor_before_a_clamp_that_is_also_a_graph_output(self, clamp: str) -> None:
        """Its range is its own, not the clamped one."""
        clamped = node(clamp, ["a", "lo", "hi"] if clamp == "Clip" else ["a"], "r")
        nodes = [*convs(("x", "w0", "a")), clamped, *convs(("r", "w1", "y"))]
        constants = kernels("w0", "w1") | {"lo": np.float32(0), "hi": np.float32(1)}
        net = model(nodes, {"x": IMAGE}, {"a": IMAGE, "y": IMAGE}, constants)
        data = feeds({"x": IMAGE}, 4)
        result, _ = quantized(net, data)
        assert all(e < 0.02 for e in all_outputs(net, result, data))

    @pytest.mark.parametrize("bounds", [(1, 6), (-6, -1), (-1, 6), (0, 6), (-1, 1), (0.5, 0.5001)])
    @pytest.mark.parametrize("target", [FORCED, PORTABLE], ids=lambda t: t.name)
    def test_clip_to_any_bounds(self, bounds, target) -> None:
        nodes = [*convs(("x", "w0", "a")), node("Clip", ["a", "lo", "hi"], "r")]
        nodes += convs(("r", "w1", "y"))
        low, high = np.float32(bounds[0]), np.float32(bounds[1])
        constants = kernels("w0", "w1") | {"lo": low, "hi": high}
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE, "r": IMAGE}, constants)
        data = [{"x": 3 * f["x"]} for f in feeds({"x": IMAGE}, 4)]
        result, outcome = quantized(net, data, target=target)
        exact, found = run(net, data, fused=True), run(result.model, data, fused=True)
        for a, b in zip(exact, found, strict=True):
            # the rounding of x alone makes up to 0.1; a clamp that is lost makes 1 and more
            assert np.abs(a[1] - b[1]).max() < 0.15
            assert low * 1.01 - 0.05 <= b[1].min() <= b[1].max() <= high * 1.01 + 0.05
        assert outcome.sqnr > 25

    @pytest.mark.parametrize(
        "scheme",
        [
            Scheme(activation=QuantSpec(symmetric=True)),
            Scheme(rules=(Rule(tensors="r", symmetric=True),)),
            Scheme(rules=(Rule(tensors="r", range=(-3.0, 9.0)),)),
            Scheme(rules=(Rule(tensors="r", scale=0.05, zero_point=7),)),
        ],
        ids=["scheme", "symmetric", "range", "given"],
    )
    @pytest.mark.parametrize("clamp", ["Relu", "Clip"])
    def test_a_zero_point_that_does_not_clamp_keeps_the_clamp(self, clamp: str, scheme) -> None:
        bounds = {"lo": np.float32(0), "hi": np.float32(4)} if clamp == "Clip" else {}
        nodes = [*convs(("x", "w0", "a")), node(clamp, ["a", *bounds], "r")]
        nodes += convs(("r", "w1", "y"))
        constants = kernels("w0", "w1") | bounds
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE, "r": IMAGE}, constants)
        data = feeds({"x": IMAGE}, 4)
        result, outcome = quantized(net, data, scheme=scheme)
        for exact, found in zip(
            run(net, data, fused=True), run(result.model, data, fused=True), strict=True
        ):
            assert found[1].min() >= 0
            assert np.abs(exact[1] - found[1]).max() < 0.1
        assert outcome.sqnr > 25

    def test_symmetric_signed_activations(self) -> None:
        scheme = Scheme(activation=QuantSpec(dtype=INT8, symmetric=True))
        net, data = conv_chain(8, 6), feeds({"x": [1, 8, 6, 6]}, 4)
        _, outcome = quantized(net, data, scheme=scheme)
        assert outcome.sqnr > 25
        assert outcome.fused.min() >= 0

    @pytest.mark.parametrize("gain", [0.01, 0.3, 1.0, 10.0])
    def test_a_clip_to_6_fuses_whatever_the_calibrated_range(self, gain: float) -> None:
        net = conv_chain(8, 6, clamp="Clip")
        data = [{"x": gain * f["x"]} for f in feeds({"x": [1, 8, 6, 6]}, 4)]
        _, outcome = quantized(net, data)
        assert outcome.ops["QLinearConv"] == 3
        assert outcome.ops["Clip"] == outcome.ops["Conv"] == outcome.ops["FusedConv"] == 0
        assert outcome.ops["DequantizeLinear"] == 1

    def test_a_relu_read_by_several_fuses(self) -> None:
        nodes = [*convs(("x", "w0", "a")), node("Relu", ["a"], "r")]
        nodes += [*convs(("r", "w1", "b"), ("r", "w2", "c")), node("Add", ["b", "c"], "y")]
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE}, kernels("w0", "w1", "w2"))
        _, outcome = quantized(net, feeds({"x": IMAGE}, 4))
        assert outcome.ops["QLinearConv"] == 3
        assert outcome.ops["Relu"] == 0


class TestWhatFuses:
    def test_a_residual_net_fuses_whole(self) -> None:
        net = residual(8, 6)
        _, outcome = quantized(net, feeds({"x": [1, 8, 6, 6]}, 4))
        assert outcome.ops["QLinearConv"] == 3
        assert outcome.ops["QLinearAdd"] == 1
        assert outcome.ops["QuantizeLinear"] == outcome.ops["DequantizeLinear"] == 1
        assert outcome.sqnr > 25

    @pytest.mark.parametrize("per_channel", [True, False])
    def test_batch_norms_are_folded(self, per_channel: bool) -> None:
        bn = {n: rng(k).uniform(0.5, 2, 8).astype(np.float32) for k, n in enumerate("gbmv")}
        bn["g"] *= np.logspace(-2, 2, 8, dtype=np.float32)  # unequal channels
        nodes = [
            *convs(("x", "w0", "a")),
            node("BatchNormalization", ["a", "g", "b", "m", "v"], "n"),
            node("Relu", ["n"], "r"),
            *convs(("r", "w1", "y")),
        ]
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE}, kernels("w0", "w1") | bn)
        scheme = Scheme(per_channel=per_channel)
        _, outcome = quantized(net, feeds({"x": IMAGE}, 4), scheme=scheme)
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.ops["BatchNormalization"] == 0
        assert outcome.ops["DequantizeLinear"] == 1
        assert outcome.sqnr > (25 if per_channel else 15)

    def test_a_last_gemm_hands_out_float(self) -> None:
        net = mlp(8, 32)
        result, outcome = quantized(net, feeds({"x": [8, 32]}, 4))
        assert outcome.ops["QGemm"] == 2
        assert outcome.ops["DequantizeLinear"] == 0
        assert "y" not in result.plan.tensors
        # float out: more values than 8 bits could hold
        assert len(np.unique(outcome.fused)) > 256

    def test_operators_without_integer_kernel_stay_as_they_are(self) -> None:
        """No Q or DQ around them, and float weights."""
        nodes = [node("InstanceNormalization", ["x", "b", "b"], "i"), node("Tanh", ["i"], "y")]
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE}, {"b": weights(8, 1)[:, 0]})
        result, outcome = quantized(net, feeds({"x": IMAGE}, 2))
        assert {n.op_type for n in result.model.graph.node} == {n.op_type for n in nodes}
        np.testing.assert_array_equal(outcome.exact, outcome.fused)
        assert all("no integer kernel" in why for why in result.plan.left_float.values())


def masked_attention(kind: str, mask: float) -> onnx.ModelProto:
    """MatMul → Where or Add of a causal mask → Softmax → MatMul."""
    later = np.triu(np.ones((16, 16), bool), 1)
    constants = {
        "later": later,
        "mask": np.float32(mask),
        "masks": np.where(later, mask, 0).astype(np.float32),
        "wq": weights(8, 8),
    }
    hide = {"Where": ["later", "mask", "s"], "Add": ["s", "masks"]}[kind]
    nodes = [
        node("MatMul", ["x", "wq"], "q"),
        node("MatMul", ["q", "k"], "s"),
        node(kind, hide, "m"),
        node("Softmax", ["m"], "p"),
        node("MatMul", ["p", "x"], "y"),
    ]
    inputs = {"x": [2, 16, 8], "k": [2, 8, 16]}
    return model(nodes, inputs, {"y": [2, 16, 8]}, constants)


@pytest.mark.parametrize("kind", ["Where", "Add"])
@pytest.mark.parametrize("mask", [-1e4, -3.4e38, -np.inf])
def test_what_reads_a_masked_tensor_stays_float(kind: str, mask: float) -> None:
    """No 8-bit scale holds the mask and the scores."""
    net = masked_attention(kind, mask)
    _, outcome = quantized(net, feeds({"x": [2, 16, 8], "k": [2, 8, 16]}, 4))
    assert outcome.sqnr > 25
    assert outcome.ops["MatMulIntegerToFloat"] + outcome.ops["QLinearMatMul"] == 3


MAKERS: dict[str, list[onnx.NodeProto]] = {
    "filled": [
        node("ConstantOfShape", ["size"], "f",
             value=numpy_helper.from_array(np.array([-3.4e38], np.float32))),
        node("Trilu", ["f", "one"], "masks", upper=1),
    ],
    "widened": [node("Expand", ["mask", "size"], "f"), node("Trilu", ["f", "one"], "masks")],
    "clamped": [
        node("Mul", ["hidden", "mask"], "f"),
        node("Max", ["f", "mask"], "masks"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_masks_that_are_made_at_run_time(kind: str) -> None:
    """As decoders for any number of tokens are exported."""
    nodes = [
        node("Shape", ["hidden"], "size"),
        *MAKERS[kind],
        node("MatMul", ["x", "wq"], "q"),
        node("MatMul", ["q", "k"], "s"),
        node("Add", ["s", "masks"], "m"),
        node("Softmax", ["m"], "p"),
        node("MatMul", ["p", "x"], "y"),
    ]
    constants = {"mask": np.float32(-3.4e38), "one": np.int64(1), "wq": weights(8, 8)}
    inputs = {"x": ["b", "n", 8], "k": ["b", 8, "n"], "hidden": ["n", "n"]}
    net = model(nodes, inputs, {"y": ["b", "n", 8]}, constants)
    data = feeds({"x": [2, 16, 8], "k": [2, 8, 16]}, 4)
    hidden = np.triu(np.ones((16, 16), np.float32), 1)
    _, outcome = quantized(net, [{**feed, "hidden": hidden} for feed in data], target=PORTABLE)
    assert outcome.sqnr > 25


def test_a_pool_whose_second_output_is_absent() -> None:
    """onnxruntime would transpose it all the same, and miss it."""
    pool = node("MaxPool", ["a"], ["p", ""], kernel_shape=[2, 2], strides=[2, 2])
    nodes = [*convs(("x", "w0", "a")), pool, *convs(("p", "w1", "y"))]
    net = model(nodes, {"x": IMAGE}, {"y": [1, 8, 3, 3]}, kernels("w0", "w1"))
    _, outcome = quantized(net, feeds({"x": IMAGE}, 4))
    assert outcome.ops["QLinearConv"] == 2
    assert outcome.sqnr > 25


class TestWeights:
    def test_per_channel_matmul_by_a_batch_of_matrices_or_from_the_left(self) -> None:
        constants = {"b": rng(1).standard_normal((2, 8, 8)).astype(np.float32) / 3}
        constants["a"] = rng(2).standard_normal((8, 8)).astype(np.float32) / 3
        constants["w"] = weights(8, 8)
        nodes = [
            node("MatMul", ["x", "w"], "p"),
            node("MatMul", ["p", "b"], "q"),
            node("MatMul", ["a", "q"], "r"),
            node("MatMul", ["r", "w"], "y"),
        ]
        net = model(nodes, {"x": [2, 8, 8]}, {"y": [2, 8, 8]}, constants)
        result, outcome = quantized(net, feeds({"x": [2, 8, 8]}, 4))
        assert set(result.plan.left_float) == {"MatMul_q", "MatMul_r"}
        assert outcome.ops["MatMulIntegerToFloat"] == 2
        assert outcome.ops["MatMul"] == 2
        assert outcome.ops["DequantizeLinear"] == 0
        assert outcome.sqnr > 28

    @pytest.mark.parametrize("per_channel", [True, False])
    def test_an_embedding_tied_to_the_last_layer(self, per_channel: bool) -> None:
        """Gather reads the table as data, Gemm reads it transposed as a weight."""
        table = rng(1).standard_normal((32, 16)).astype(np.float32)
        nodes = [
            node("Cast", ["ids"], "i", to=TensorProto.INT64),
            node("Gather", ["table", "i"], "e"),
            node("Gemm", ["e", "w"], "h"),
            node("Gemm", ["h", "table", "b"], "y", transB=1),
        ]
        constants = {"table": table, "w": weights(16, 16), "b": rng(2).random(32, np.float32)}
        net = model(nodes, {"ids": [5]}, {"y": [5, 32]}, constants)
        data = [{"ids": rng(k).integers(0, 32, 5).astype(np.float32)} for k in range(4)]
        result, outcome = quantized(net, data, scheme=Scheme(per_channel=per_channel))
        ops = outcome.ops
        assert ops["QGemm"] + ops["MatMulIntegerToFloat"] + ops["QLinearMatMul"] == 2
        assert outcome.sqnr > 28
        stored = Counter(t.data_type for t in result.model.graph.initializer if len(t.dims) == 2)
        assert stored == {TensorProto.FLOAT: 1, TensorProto.INT8: 2}

    def test_excluded_nodes_read_the_float_tensor(self) -> None:
        net = residual(8, 6)
        scheme = Scheme(rules=(Rule(nodes="Conv_[ab]", keep_float=True),))
        result, outcome = quantized(net, feeds({"x": [1, 8, 6, 6]}, 4), scheme=scheme)
        made = {o: n.op_type for n in result.model.graph.node for o in n.output}
        reads = {n.name: [made.get(i) for i in n.input] for n in result.model.graph.node}
        assert set(reads["Conv_a"]) == {None}
        assert reads["Conv_b"][0] == "Relu"
        assert set(reads["Conv_b"][1:]) == {None}
        assert set(reads["Add_s"]) == set(reads["Conv_y"]) == {"DequantizeLinear"}
        assert outcome.sqnr > 28


class TestOpsetsAndNames:
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("opset", [10, 11, 12, 13, 17, 22])
    def test_opsets(self, opset: int, per_channel: bool) -> None:
        net, data = conv_chain(8, 6, opset=opset), feeds({"x": [1, 8, 6, 6]}, 4)
        _, outcome = quantized(net, data, scheme=Scheme(per_channel=per_channel))
        assert outcome.ops["QLinearConv"] == 3
        assert outcome.sqnr > 25

    @pytest.mark.parametrize("opset", [13, 17, 21])
    def test_float16_is_valid_and_right_whatever_stays_float(self, opset: int) -> None:
        net = retyped(conv_chain(8, 6, opset=opset, depth=2), np.float16)
        data = [{"x": f["x"].astype(np.float16)} for f in feeds({"x": [1, 8, 6, 6]}, 4)]
        _, outcome = quantized(net, data)
        assert outcome.fused.dtype == np.float16
        assert outcome.sqnr > 25

    def test_names_that_qdq_would_use_are_taken(self) -> None:
        net = conv_chain(8, 6, depth=2)
        taken = {
            "w0_quantized": "w0_scale",
            "b0": "w0_quantized",
            "w1": "x_QuantizeLinear_Output",
            "r0": "x_scale",
            "c0": "w0_DequantizeLinear_Output",
            "b1": "r0_zero_point",
        }
        for n in net.graph.node:
            for names in (n.input, n.output):
                for k, name in enumerate(names):
                    names[k] = taken.get(name, name)
            n.name = {"Conv_c0": "x_QuantizeLinear"}.get(n.name, n.name)
        for t in net.graph.initializer:
            t.name = taken.get(t.name, t.name)
        _, outcome = quantized(net, feeds({"x": [1, 8, 6, 6]}, 4))
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.sqnr > 25


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    last = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), name, [], [last])


def with_if(then: list, other: list, **extra) -> onnx.ModelProto:
    """Conv → Relu → Conv, and an If beside it; its condition is whether "p" is above 0."""
    choice = helper.make_node(
        "If",
        ["c"],
        ["z"],
        "choice",
        then_branch=branch("t", *then),
        else_branch=branch("e", *other),
    )
    nodes = [
        *convs(("x", "w0", "a")),
        node("Relu", ["a"], "r"),
        *convs(("r", "w1", "y")),
        node("Greater", ["p", "zero"], "c"),
        choice,
    ]
    constants = kernels("w0", "w1") | {"zero": np.float32(0)}
    if extra.get("first"):
        nodes = [nodes[3], choice, *nodes[:3]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, IMAGE), helper.make_tensor_value_info("p", 1, [])],
        [
            helper.make_tensor_value_info("y", 1, IMAGE),
            helper.make_tensor_value_info("z", 1, IMAGE),
        ],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def both_ways() -> list[dict]:
    return [
        {"x": f["x"], "p": np.array(k % 2, np.float32)}
        for k, f in enumerate(feeds({"x": IMAGE}, 4))
    ]


class TestSubgraphs:
    @pytest.mark.parametrize("captured", ["x", "a", "r", "y"])
    def test_branches_may_capture_any_tensor(self, captured: str) -> None:
        net = with_if([node("Neg", [captured], "u")], [node("Identity", ["r"], "v")])
        data = both_ways()
        result, outcome = quantized(net, data)
        assert outcome.ops["QLinearConv"] >= 1
        assert all(e < 0.03 for e in all_outputs(net, result, data))

    def test_branches_may_capture_a_weight_that_is_quantized(self) -> None:
        inner = node("Conv", ["r", "w1"], "u", pads=[1] * 4)
        net = with_if([inner], [node("Identity", ["r"], "v")])
        result, outcome = quantized(net, both_ways())
        assert outcome.ops["QLinearConv"] == 2
        assert all(e < 0.03 for e in all_outputs(net, result, both_ways()))

    def test_an_if_before_the_producers_of_its_captures(self) -> None:
        net = with_if([node("Neg", ["a"], "u")], [node("Identity", ["r"], "v")], first=True)
        straight = with_if([node("Neg", ["a"], "u")], [node("Identity", ["r"], "v")])
        result, outcome = quantized(straight, both_ways())
        unsorted = qdq.quantize(net, both_ways(), target=FORCED, calibrator=qdq.MinMax())
        assert outcome.ops["QLinearConv"] == 2
        for a, b in zip(
            run(result.model, both_ways(), fused=True),
            run(unsorted, both_ways(), fused=True),
            strict=True,
        ):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(a[1], b[1])

    def test_domains_inside_and_outside_are_kept(self) -> None:
        own = helper.make_node("Gelu", ["a"], ["u"], "own", domain="com.microsoft")
        result, _ = quantized(with_if([own], [node("Identity", ["r"], "v")]), both_ways())
        (choice,) = [n for n in result.model.graph.node if n.op_type == "If"]
        domains = {n.domain for a in choice.attribute for n in a.g.node if n.op_type == "Gelu"}
        assert domains == {"com.microsoft"}
        assert "com.microsoft" in {o.domain for o in result.model.opset_import}

    def test_a_loop_that_reads_the_outer_graph(self) -> None:
        body = helper.make_graph(
            [node("Add", ["state", "r"], "next"), node("Identity", ["go"], "on")],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("state", TensorProto.FLOAT, IMAGE),
            ],
            [
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next", TensorProto.FLOAT, IMAGE),
            ],
        )
        nodes = [
            *convs(("x", "w0", "a")),
            node("Relu", ["a"], "r"),
            helper.make_node("Loop", ["n", "", "r"], ["l"], "loop", body=body),
            *convs(("l", "w1", "y")),
        ]
        constants = kernels("w0", "w1") | {"n": np.array(3, np.int64)}
        net = model(nodes, {"x": IMAGE}, {"y": IMAGE}, constants)
        _, outcome = quantized(net, feeds({"x": IMAGE}, 4))
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.sqnr > 28


class TestTheCallersThings:
    def test_the_model_is_byte_identical_after_one_and_two_calls(self) -> None:
        net, data = conv_chain(32, 6), feeds({"x": [1, 32, 6, 6]}, 4)
        before = net.SerializeToString(deterministic=True)
        first = qdq.quantize(net, data, target=FORCED)
        assert net.SerializeToString(deterministic=True) == before
        second = qdq.quantize(net, data, target=FORCED)
        assert net.SerializeToString(deterministic=True) == before
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(
            deterministic=True
        )
        onnx.checker.check_model(net, full_check=True)

    def test_nothing_is_written_beside_the_model(self, tmp_path: Path, monkeypatch) -> None:
        folder, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        path = folder / "net.onnx"
        onnx.save(conv_chain(8, 6), path, save_as_external_data=True, size_threshold=0)
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
        folder.chmod(0o555)
        try:
            qdq.quantize(path, feeds({"x": [1, 8, 6, 6]}, 4), target=FORCED)
            after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
        finally:
            folder.chmod(0o755)
        assert after == before
        assert os.listdir(elsewhere) == []  # noqa: PTH208

    def test_doc_strings_metadata_and_inputs_are_kept(self) -> None:
        net = conv_chain(8, 6)
        helper.set_model_props(net, {"author": "me"})
        net.graph.doc_string, net.domain = "words", "my.domain"
        made = qdq.quantize(net, feeds({"x": [1, 8, 6, 6]}, 4), target=FORCED)
        assert {p.key: p.value for p in made.metadata_props}["author"] == "me"
        assert (made.graph.doc_string, made.domain) == ("words", "my.domain")
        assert list(made.graph.input) == list(net.graph.input)
        assert list(made.graph.output) == list(net.graph.output)


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "near"),
        [
            (Rule(nodes="Conv_c9", keep_float=True), "Conv_c0"),
            (Rule(tensors="w9", symmetric=True), "w0"),
            (Rule(op_types=("Conw",), keep_float=True), "Conv"),
            (Rule(nodes="Conv_c0", op_types=("Relu",), keep_float=True), "Conv_c0"),
            (Rule(tensors="r9", range=(0.0, 1.0)), "r0"),
        ],
        ids=str,
    )
    def test_unknown_names_are_errors_with_the_nearest(self, rule: Rule, near: str) -> None:
        net, data = conv_chain(8, 6), feeds({"x": [1, 8, 6, 6]}, 2)
        with pytest.raises(ConfigError, match="matches no") as e:
            quantized(net, data, scheme=Scheme(rules=(rule,)))
        assert near in str(e.value)

    def test_what_a_rule_says_is_in_the_model(self) -> None:
        rules = (
            Rule(tensors="x", range=(-4.0, 4.0)),
            Rule(tensors="w0", per_channel=False),
            Rule(tensors="r0", scale=0.031, zero_point=2),
        )
        net, data = conv_chain(8, 6), feeds({"x": [1, 8, 6, 6]}, 2)
        result, outcome = quantized(net, data, scheme=Scheme(rules=rules))
        params = result.solution.params
        assert params["x"].scale == pytest.approx(8 / 255)
        assert params["w0"].scale.shape == ()
        assert params["w1"].scale.shape == (8,)
        assert (params["r0"].scale, params["r0"].zero_point) == (np.float32(0.031), 2)
        w = numpy_helper.to_array(next(t for t in net.graph.initializer if t.name == "w0"))
        assert np.abs(dequantized(result.model, "w0") - w).max() <= params["w0"].scale * 0.51
        assert outcome.sqnr > 20


def test_default_placement_tells_the_same_story() -> None:
    """Where costs decide, float, unfused and fused agree too."""
    net, data = residual(32, 24), feeds({"x": [1, 32, 24, 24]}, 4)
    made = qdq.quantize(net, data)
    outcome = compare(net, made, data)
    assert outcome.sqnr > 25
    assert outcome.steps_apart <= 1.01
