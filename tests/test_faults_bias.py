"""Faults of other quantizers around biases, each of which must not be ours.

Everything runs fused by onnxruntime: the unfused graph computes in float and hides overflows.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from harness import FORCED, dequantized, quantized
from models import model, node, rng, weights

from qdq import Rule, Scheme, SolveError
from qdq.spec import INT8, UINT8, QuantSpec
from qdq.targets import PORTABLE

INT32_MAX = 2**31 - 1


def step_of(outcome) -> float:
    """One step of an 8-bit output over what was seen, zero included."""
    return (max(outcome.exact.max(), 0) - min(outcome.exact.min(), 0)) / 255


def worst(outcome) -> float:
    """Largest error of the fused model, in steps."""
    return float(np.abs(outcome.exact - outcome.fused).max()) / step_of(outcome)


def uniform(shape, low: float, high: float, count: int = 4) -> list[dict]:
    """Uniform samples, of which the first holds both bounds."""
    data = [{"x": rng(k).uniform(low, high, shape).astype(np.float32)} for k in range(count)]
    data[0]["x"].flat[:2] = low, high
    return data


def conv(w, b, size: int = 4) -> onnx.ModelProto:
    w, b = np.asarray(w, np.float32), np.asarray(b, np.float32)
    nodes = [node("Conv", ["x", "w", "b"], "y")]
    shape = [1, w.shape[1], size, size]
    out = [1, w.shape[0], size - w.shape[2] + 1, size - w.shape[3] + 1]
    return model(nodes, {"x": shape}, {"y": out}, {"w": w, "b": b})


class TestTinyWeights:
    """A bias that would leave int32 at the weights' own scale."""

    @pytest.mark.parametrize("dtype", [INT8, UINT8])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("size", [1e-7, 1e-9, 1e-14])
    def test_conv(self, size: float, per_channel: bool, dtype) -> None:
        w = size * np.sign(rng(3).standard_normal((2, 2, 2, 2)))
        scheme = Scheme(
            weight=QuantSpec(dtype=dtype, symmetric=dtype is INT8), per_channel=per_channel
        )
        data = uniform([1, 2, 4, 4], 0, 12.75)
        _, outcome = quantized(conv(w, [5, -4.5]), data, scheme=scheme)
        assert outcome.ops["QLinearConv"] == 1
        assert worst(outcome) <= 0.51

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_conv_transpose(self, groups: int, per_channel: bool) -> None:
        w = weights(4, 4 // groups, 2, 2) * 1e-8
        b = np.array([5, -4.5, 3, 0], np.float32)
        net = model(
            [node("ConvTranspose", ["x", "w", "b"], "y", group=groups)],
            {"x": [1, 4, 4, 4]},
            {"y": [1, 4, 5, 5]},
            {"w": w, "b": b},
        )
        scheme = Scheme(per_channel=per_channel)
        data = uniform([1, 4, 4, 4], -1, 1)
        _, outcome = quantized(net, data, target=PORTABLE, scheme=scheme)
        assert worst(outcome) <= 0.51

    @pytest.mark.parametrize("size", [1.0, 1e-9])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), (), (3, 6), (3, 1)])
    def test_gemm_with_biases_of_every_shape(self, shape, per_channel: bool, size: float) -> None:
        c = rng(5).uniform(3, 5, shape).astype(np.float32)
        nodes = [node("Gemm", ["x", "w", "c"], "h"), node("Gemm", ["h", "v"], "y")]
        constants = {"w": weights(8, 6) * np.float32(size), "c": c, "v": weights(6, 6, seed=1)}
        net = model(nodes, {"x": [3, 8]}, {"y": [3, 6]}, constants)
        scheme = Scheme(per_channel=per_channel)
        _, outcome = quantized(net, uniform([3, 8], -1, 1), scheme=scheme)
        assert outcome.ops["QGemm"] + outcome.ops["MatMulIntegerToFloat"] == 2
        assert worst(outcome) <= 2


class TestHeadroom:
    """int32 must hold the bias beside every sum of products, and the runtime does not check."""

    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("f", [0.5, 0.99, 0.9999, 1.01, 20.0])
    def test_576_products_of_one_sign(self, f: float, per_channel: bool) -> None:
        w = np.full((2, 64, 3, 3), 127e-9, np.float32)
        bias = f * INT32_MAX * (1 / 255) * 1e-9
        net, data = conv(w, [bias, bias / 2], 6), uniform([1, 64, 6, 6], 0.9, 1)
        _, outcome = quantized(net, data, scheme=Scheme(per_channel=per_channel))
        assert outcome.ops["QLinearConv"] == 1
        assert worst(outcome) <= 0.51
        assert outcome.steps_apart <= 1e-3

    @pytest.mark.parametrize("sign", [1, -1])
    def test_gemm_that_hands_out_float_keeps_all_digits(self, sign: int) -> None:
        w = np.full((576, 8), sign * 127e-9, np.float32)
        b = np.full(8, sign * 1.01 * INT32_MAX / 255 * 1e-9, np.float32)
        net = model(
            [node("Gemm", ["x", "w", "b"], "y")], {"x": [4, 576]}, {"y": [4, 8]}, {"w": w, "b": b}
        )
        _, outcome = quantized(net, uniform([4, 576], 0.9, 1))
        assert outcome.ops["QGemm"] == 1
        np.testing.assert_allclose(outcome.fused, outcome.exact, rtol=1e-4)


class TestScalesOfTheBias:
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_a_channel_of_zeros_keeps_its_bias(self, per_channel: bool) -> None:
        w = weights(3, 4, 2, 2) * np.float32(0.02)
        w[1] = 0
        net = conv(w, [0.1, 0.337, -0.2])
        data = uniform([1, 4, 4, 4], -12.5, 12.5)
        _, outcome = quantized(net, data, scheme=Scheme(per_channel=per_channel))
        channel = outcome.fused.reshape(len(data), 3, -1)[:, 1]
        assert np.abs(channel - np.float32(0.337)).max() <= 0.51 * step_of(outcome)

    @pytest.mark.parametrize("spec", [(UINT8, False), (INT8, False), (INT8, True)], ids=str)
    @pytest.mark.parametrize("size", [5e-37, 1e-36, 2e-36, 4e-36])
    def test_weights_below_what_float32_has_scales_for(self, size: float, spec) -> None:
        """Whether a scale is made up depends on all codes that it has, 255 or 127 to one side."""
        dtype, symmetric = spec
        scheme = Scheme(weight=QuantSpec(dtype=dtype, symmetric=symmetric))
        net = conv(np.full((2, 4, 1, 1), size), [0.337, -0.2])
        _, outcome = quantized(net, uniform([1, 4, 4, 4], -100, 100), scheme=scheme)
        assert outcome.ops["QLinearConv"] == 1
        assert worst(outcome) <= 0.51

    def test_a_layer_of_zeros_keeps_its_bias(self) -> None:
        net = conv(np.zeros((2, 4, 2, 2)), [0.337, -0.2])
        _, outcome = quantized(net, uniform([1, 4, 4, 4], -12.5, 12.5))
        assert worst(outcome) <= 0.51

    def test_the_scale_that_the_input_really_has_counts(self) -> None:
        """Conv → MaxPool → Conv: the second Conv reads the scale of the first one's output."""
        w1 = np.full((4, 1, 1, 1), 7e-8, np.float32)
        nodes = [
            node("Conv", ["x", "w0"], "a"),
            node("MaxPool", ["a"], "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "w1", "b"], "y"),
        ]
        constants = {
            "w0": np.ones((1, 1, 1, 1), np.float32),
            "w1": w1,
            "b": np.full(4, 5, np.float32),
        }
        net = model(nodes, {"x": [1, 1, 8, 8]}, {"y": [1, 4, 4, 4]}, constants)
        data = uniform([1, 1, 8, 8], 0, 1)
        for feed in data:
            feed["x"][..., ::2] = -1000  # each window's maximum is in the other column
        found, outcome = quantized(net, data)
        assert outcome.ops["QLinearConv"] == 2
        assert found.solution.params["p"].scale == pytest.approx(1001 / 255, rel=1e-3)
        np.testing.assert_allclose(dequantized(found.model, "w1"), w1, rtol=0.01)
        np.testing.assert_allclose(dequantized(found.model, "b"), 5, rtol=1e-6)
        assert worst(outcome) <= 0.51

    def test_two_convs_that_share_a_bias_have_two_codes_of_it(self) -> None:
        nodes = [node("Conv", ["x", "w0", "b"], "u"), node("Conv", ["x", "w1", "b"], "v")]
        nodes.append(node("Add", ["u", "v"], "y"))
        constants = {
            "w0": np.ones((2, 2, 1, 1), np.float32),
            "w1": np.full((2, 2, 1, 1), 0.001, np.float32),
            "b": np.ones(2, np.float32),
        }
        net = model(nodes, {"x": [1, 2, 4, 4]}, {"y": [1, 2, 4, 4]}, constants)
        _, outcome = quantized(net, uniform([1, 2, 4, 4], -1, 1))
        assert outcome.ops["QLinearConv"] == 2
        assert worst(outcome) <= 2

    def test_two_convs_that_share_a_weight_with_unlike_biases(self) -> None:
        nodes = [node("Conv", ["x", "w", "b0"], "u"), node("Conv", ["x", "w", "b1"], "v")]
        nodes.append(node("Add", ["u", "v"], "y"))
        constants = {
            "w": weights(2, 2, 1, 1) * np.float32(1e-8),
            "b0": np.array([5, -4], np.float32),
            "b1": np.array([0.5, 3], np.float32),
        }
        net = model(nodes, {"x": [1, 2, 4, 4]}, {"y": [1, 2, 4, 4]}, constants)
        _, outcome = quantized(net, uniform([1, 2, 4, 4], -1, 1))
        assert outcome.ops["QLinearConv"] == 2
        assert worst(outcome) <= 2

    @pytest.mark.parametrize("alpha", [1.0, 0.5, 3.0])
    @pytest.mark.parametrize("beta", [0.5, 2.0, 0.0])
    def test_gemm_with_alpha_and_beta(self, alpha: float, beta: float) -> None:
        constants = {"w": weights(16, 8), "c": rng(4).uniform(5, 9, 8).astype(np.float32)}
        gemm = node("Gemm", ["x", "w", "c"], "y", alpha=alpha, beta=beta)
        net = model([gemm], {"x": [4, 16]}, {"y": [4, 8]}, constants)
        _, outcome = quantized(net, uniform([4, 16], -1, 1))
        assert outcome.ops["QGemm"] + outcome.ops["MatMulIntegerToFloat"] == 1
        assert outcome.sqnr > 35


class TestGivenScales:
    """A weight scale that the user gave is used as it is, or refused."""

    def rule(self, scale: float) -> Scheme:
        return Scheme(rules=(Rule(tensors="w", scale=scale, zero_point=0),))

    def test_too_small_for_the_bias_is_refused_with_the_one_that_works(self) -> None:
        net, data = conv(np.full((2, 2, 2, 2), 1e-7), [5, -4.5]), uniform([1, 2, 4, 4], 0, 12.75)
        with pytest.raises(SolveError, match="given scale of weight 'w' cannot hold bias") as e:
            quantized(net, data, scheme=self.rule(1e-9 / 127))
        assert e.value.tensor == "w"
        assert e.value.node == "Conv_y"

    @pytest.mark.parametrize("scale", [1.5e-7, 0.25])
    def test_else_it_is_in_the_model(self, scale: float) -> None:
        net, data = conv(np.full((2, 2, 2, 2), 1e-7), [5, -4.5]), uniform([1, 2, 4, 4], 0, 12.75)
        found, outcome = quantized(net, data, scheme=self.rule(scale))
        assert found.solution.params["w"].scale == np.float32(scale)
        values = {t.name: onnx.numpy_helper.to_array(t) for t in found.model.graph.initializer}
        assert values["w_scale"] == np.float32(scale)
        assert worst(outcome) <= 0.51


def sandwich(op: str, clamp: bool, size: float) -> onnx.ModelProto:
    """Integer linear → ``op`` with weights of a size → integer linear."""
    image = "Conv" in op
    matrix = [8, 8, 1, 1] if image else [8, 8]
    outer = "Conv" if image else "Gemm"
    constants = {f"w{k}": weights(*matrix, seed=k) for k in range(3)}
    constants["w1"] = constants["w1"] * np.float32(size)
    constants |= {f"b{k}": rng(9 + k).uniform(-5, 5, 8).astype(np.float32) for k in range(3)}
    nodes = [node(outer, ["x", "w0", "b0"], "a")]
    if op == "MatMul":
        nodes += [node("MatMul", ["a", "w1"], "m"), node("Add", ["m", "b1"], "h")]
    else:
        nodes.append(node(op, ["a", "w1", "b1"], "h"))
    if clamp:
        nodes.append(node("Relu", ["h"], "r"))
    nodes.append(node(outer, ["r" if clamp else "h", "w2", "b2"], "y"))
    shape = [1, 8, 4, 4] if image else [4, 8]
    return model(nodes, {"x": shape}, {"y": shape}, constants)


class TestFloatBetweenIntegers:
    """onnxruntime quantizes a float linear node between DQ and Q by itself, bias unguarded."""

    @pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
    @pytest.mark.parametrize("clamp", [False, True])
    @pytest.mark.parametrize("size", [1.0, 1e-9])
    def test_a_rule_keeps_a_node_float(self, op: str, clamp: bool, size: float) -> None:
        net = sandwich(op, clamp, size)
        scheme = Scheme(rules=(Rule(nodes=f"{op}_[hm]", keep_float=True),))
        data = uniform([1, 8, 4, 4] if "Conv" in op else [4, 8], -1, 1)
        found, outcome = quantized(net, data, scheme=scheme)
        assert "a rule keeps" in next(iter(found.plan.left_float.values()))
        ops = outcome.ops
        if "Conv" in op:
            assert ops["QLinearConv"] == 2
            assert sum(ops[k] for k in ("Conv", "FusedConv", "ConvTranspose")) == 1
        else:
            assert ops["QGemm"] == 2
            assert sum(ops[k] for k in ("Gemm", "MatMul", "FusedGemm")) == 1
        assert outcome.steps_apart <= 1.01
        assert worst(outcome) <= 3

    @pytest.mark.parametrize("places", ["before", "behind", "both"])
    @pytest.mark.parametrize("mover", ["MaxPool", "Transpose", "Reshape"])
    def test_beside_float_movement(self, mover: str, places: str) -> None:
        """onnxruntime moves DQ forward and Q back through movement, and finds the Conv."""
        attributes = {"MaxPool": {"kernel_shape": [1, 1]}, "Transpose": {"perm": [0, 1, 3, 2]}}
        extra = ["to"] if mover == "Reshape" else []
        nodes = [node("Conv", ["x", "w0", "b0"], "a")]
        if places != "behind":
            nodes.append(node(mover, ["a", *extra], "m1", **attributes.get(mover, {})))
        nodes.append(node("Conv", [nodes[-1].output[0], "w1", "b1"], "h"))
        if places != "before":
            nodes.append(node(mover, ["h", *extra], "m2", **attributes.get(mover, {})))
        nodes.append(node("Conv", [nodes[-1].output[0], "w2", "b2"], "y"))
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in self.small_conv_constants()}
        constants["to"] = np.array([1, 8, 2, 8])
        net = model(nodes, {"x": [1, 8, 4, 4]}, {"y": [None] * 4}, constants)
        scheme = Scheme(rules=(Rule(nodes=f"Conv_h|{mover}_m.", keep_float=True),))
        _, outcome = quantized(net, uniform([1, 8, 4, 4], -1, 1), scheme=scheme)
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.steps_apart <= 1.01
        assert worst(outcome) <= 3

    def small_conv_constants(self):
        return sandwich("Conv", clamp=False, size=1e-9).graph.initializer

    def test_a_node_that_the_solver_leaves_float(self) -> None:
        """Per tensor, channel 0 would need a scale at which channel 1 is gone."""
        net = sandwich("Conv", clamp=False, size=1.0)
        values = {t.name: t for t in net.graph.initializer}
        w = onnx.numpy_helper.to_array(values["w1"]).copy()
        w[0] *= 1e-12
        b = onnx.numpy_helper.to_array(values["b1"]).copy()
        b[0] = 3e6
        for name, value in (("w1", w), ("b1", b)):
            values[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
        v = onnx.numpy_helper.to_array(values["w2"]).copy()
        v[:, 0] = 0  # so that the others can be seen in the output
        values["w2"].CopyFrom(onnx.numpy_helper.from_array(v, "w2"))
        rule = Rule(tensors="h", range=(-16.0, 16.0))
        data = uniform([1, 8, 4, 4], -1, 1)
        found, outcome = quantized(net, data, scheme=Scheme(per_channel=False, rules=(rule,)))
        assert "asks for" in found.solution.floats["Conv_h"]
        assert outcome.ops["QLinearConv"] == 2
        assert outcome.ops["Conv"] + outcome.ops["FusedConv"] == 1
        assert worst(outcome) <= 4


@pytest.mark.parametrize("weighs", [True, False])
def test_costs_change_nothing_of_this(weighs: bool) -> None:
    """The default target places a large Conv on integers and gives its bias room as well."""
    w = np.full((64, 64, 3, 3), 127e-9, np.float32)
    bias = np.full(64, 1.01 * INT32_MAX / 255 * 1e-9)
    net, data = conv(w, bias, 58), uniform([1, 64, 58, 58], 0.9, 1, count=2)
    _, outcome = quantized(net, data, target=replace(FORCED, weighs_costs=weighs))
    assert outcome.ops["QLinearConv"] == 1
    assert worst(outcome) <= 0.51
