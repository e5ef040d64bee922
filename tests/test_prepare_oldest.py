"""Operator sets 1 to 6, and experiments: onnxruntime and onnx's converter hardly know them."""

import numpy as np
import onnx
import pytest
from models import feeds, model, node, rng, weights
from onnx import numpy_helper
from prepared import check, ops, run

import qdq
from qdq.errors import ModelError
from qdq.prepare import prepare

X = rng(3).normal(size=(2, 3, 4, 5)).astype(np.float32)
CHANNELS = np.float32([2, -3, 4])


def result(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray] | None, opset: int
) -> np.ndarray:
    """What the prepared model makes of X."""
    rank = 2 if nodes[-1].op_type == "Reshape" else 4
    net = model(nodes, {"x": list(X.shape)}, {"y": [None] * rank}, constants, opset)
    return run(prepare(net), {"x": X})[0]


def wide(values: np.ndarray, axis: int) -> np.ndarray:
    return values.reshape(values.shape + (1,) * (X.ndim - axis - values.ndim))


class TestWidening:
    @pytest.mark.parametrize("opset", [1, 6])
    @pytest.mark.parametrize(
        ("op", "f"),
        [("Add", np.add), ("Sub", np.subtract), ("Div", np.divide), ("Mul", np.multiply)],
    )
    def test_along_an_axis(self, opset: int, op: str, f: np.ufunc) -> None:
        made = result([node(op, ["x", "c"], "y", broadcast=1, axis=1)], {"c": CHANNELS}, opset)
        np.testing.assert_array_equal(made, f(X, wide(CHANNELS, 1)))

    @pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
    def test_from_any_axis_on(self, axis: int | None) -> None:
        at = 3 if axis is None else axis % 4
        c = rng(1).normal(size=X.shape[at : at + 2]).astype(np.float32)
        where = {} if axis is None else {"axis": axis}
        made = result([node("Add", ["x", "c"], "y", broadcast=1, **where)], {"c": c}, 6)
        np.testing.assert_array_equal(made, X + wide(c, at))

    def test_one_value_and_equal_shapes(self) -> None:
        nodes = [node("Mul", ["x", "c"], "h", broadcast=1, axis=0), node("Add", ["h", "x"], "y")]
        made = result(nodes, {"c": np.float32([3])}, 6)
        np.testing.assert_array_equal(made, X * np.float32(3) + X)

    def test_behind_others_that_widen(self) -> None:
        nodes = [
            node("Greater", ["x", "c"], "g", broadcast=1, axis=1),
            node("Cast", ["g"], "h", to="FLOAT"),
            node("Add", ["h", "c"], "y", broadcast=1, axis=1),
        ]
        c = wide(CHANNELS, 1)
        np.testing.assert_array_equal(result(nodes, {"c": CHANNELS}, 1), (c < X) + c)

    def test_slopes_are_of_channels(self) -> None:
        slopes = np.float32([0.5, 0.25, 0.125])
        made = result([node("PRelu", ["x", "c"], "y")], {"c": slopes}, 6)
        np.testing.assert_array_equal(made, np.where(X < 0, X * wide(slopes, 1), X))

    def test_rank_that_is_not_known(self) -> None:
        add = node("Add", ["x", "c"], "y", broadcast=1, axis=1)
        net = model([add], {"x": []}, {"y": []}, {"c": CHANNELS}, 6)
        net.graph.input[0].type.tensor_type.ClearField("shape")
        with pytest.raises(ModelError, match=r"Add that makes 'y'.*the rank of 'x' is not known"):
            prepare(net)


class TestAttributes:
    def test_shape_of_a_reshape(self) -> None:
        made = result([node("Reshape", ["x"], "y", shape=[0, -1], consumed_inputs=[0])], None, 1)
        np.testing.assert_array_equal(made, X.reshape(2, -1))

    def test_axis_of_a_concat(self) -> None:
        made = result([node("Concat", ["x", "x"], "y")], None, 1)
        np.testing.assert_array_equal(made, np.concatenate([X, X], 1))

    def test_pads(self) -> None:
        pads = [0, 0, 1, 2, 0, 0, 3, 4]
        made = result([node("Pad", ["x"], "y", paddings=pads, value=1.5)], None, 1)
        padded = np.pad(X, [(0, 0), (0, 0), (1, 3), (2, 4)], constant_values=1.5)
        np.testing.assert_array_equal(made, padded)

    def test_scales_of_an_upsample(self) -> None:
        made = result([node("Upsample", ["x"], "y", height_scale=2.0, width_scale=3.0)], None, 1)
        np.testing.assert_array_equal(made, X.repeat(2, 2).repeat(3, 3))

    @pytest.mark.parametrize("constant", ["initializer", "node"])
    def test_tile_of_an_axis(self, constant: str) -> None:
        values = {"n": np.int64(3), "a": np.int64(1)}
        nodes = [node("Tile", ["x", "n", "a"], "y")]
        if constant == "node":
            tensors = {k: numpy_helper.from_array(v) for k, v in values.items()}
            nodes = [*(node("Constant", [], k, value=t) for k, t in tensors.items()), *nodes]
            values = {}
        np.testing.assert_array_equal(result(nodes, values, 1), np.tile(X, (1, 3, 1, 1)))

    def test_lengths_of_a_split(self) -> None:
        nodes = [node("Split", ["x", "n"], ["a", "b"], axis=1), node("Concat", ["b", "a"], "y")]
        made = result(nodes, {"n": np.array([1, 2])}, 1)
        np.testing.assert_array_equal(made, np.roll(X, -1, 1))

    def test_batch_normalization_and_dropout_of_a_test(self) -> None:
        norm = {"consumed_inputs": [0, 0, 0, 1, 1], "is_test": 1, "spatial": 1}
        nodes = [
            node("BatchNormalization", ["x", "c", "c", "c", "v"], "h", epsilon=0.0, **norm),
            node("Dropout", ["h"], ["y", "mask"], is_test=1, ratio=0.3, consumed_inputs=[0]),
        ]
        made = result(nodes, {"c": CHANNELS, "v": np.float32([1, 4, 9])}, 1)
        c, d = wide(CHANNELS, 1), wide(np.float32([1, 2, 3]), 1)
        np.testing.assert_allclose(made, (X - c) / d * c + c, rtol=1e-5, atol=1e-5)

    def test_powers_and_slopes(self) -> None:
        made = result([node("GlobalLpPool", ["x"], "y", p=2.0)], None, 1)
        np.testing.assert_allclose(made, np.sqrt((X**2).sum((2, 3), keepdims=True)), rtol=1e-5)
        made = result([node("Selu", ["x"], "y", consumed_inputs=[0])], None, 1)
        wanted = 1.0507 * np.where(X > 0, X, 1.6732 * np.expm1(X))
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)

    def test_a_network(self) -> None:
        """As CNTK has written them: a convolution, its bias, a product behind a Reshape."""
        bias = {"broadcast": 1, "axis": 1}
        nodes = [
            node("Conv", ["x", "w"], "c", kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
            node("Add", ["c", "b"], "a", **bias),
            node("Relu", ["a"], "r", consumed_inputs=[0]),
            node("MaxPool", ["r"], "p", kernel_shape=[2, 2], strides=[2, 2]),
            node("Reshape", ["p"], "f", shape=[1, 4096]),
            node("Gemm", ["f", "v", "d"], "y", broadcast=1),
        ]
        constants = {
            "w": weights(64, 32, 3, 3), "b": weights(64), "v": weights(4096, 10), "d": weights(10),
        }  # fmt: skip
        net = model(nodes, {"x": [1, 32, 16, 16]}, {"y": [1, 10]}, constants, 3)
        prepared = prepare(net)
        assert ops(prepared) == {"Conv": 1, "Relu": 1, "MaxPool": 1, "Reshape": 1, "Gemm": 1}
        samples = feeds({"x": (1, 32, 16, 16)}, 4)
        good = run(qdq.quantize(net, samples), samples[0])[0]
        exact = run(prepared, samples[0])[0]
        assert np.square(good - exact).sum() < 1e-3 * np.square(exact).sum()


def experiment(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """A model of operators that onnx's checker does not take."""
    plain = node("Identity", ["x"], "y")
    net = model([plain], {"x": list(X.shape)}, {"y": [None] * 4}, constants, opset=8)
    del net.graph.node[:]
    net.graph.node.extend(nodes)
    return net


class TestExperiments:
    @pytest.mark.parametrize(
        ("op", "attrs"),
        [
            ("Affine", {"alpha": 1.5, "beta": 0.5}),
            ("Crop", {"border": [1, 1, 2, 0]}),
            ("Crop", {"border": [1, 2, 0, 0], "scale": [2, 3]}),
            ("ImageScaler", {"scale": 0.5, "bias": [1.0, 2.0, 3.0]}),
            ("MeanVarianceNormalization", {"across_channels": 1, "normalize_variance": 0}),
            ("MeanVarianceNormalization", {"across_channels": 0, "normalize_variance": 1}),
            ("ParametricSoftplus", {"alpha": 1.5, "beta": 0.7}),
            ("Scale", {"scale": 2.0}),
            ("ScaledTanh", {"alpha": 1.7, "beta": 0.6}),
            ("ThresholdedRelu", {"alpha": 0.5}),
        ],
        ids=str,
    )
    def test_as_the_runtime_has_them(self, op: str, attrs: dict[str, object]) -> None:
        net = experiment(node(op, ["x"], "y", **attrs))
        made = check(net, tol=1e-6)
        assert made.graph.node[-1].name == f"{op}_y"
        qdq.quantize(net, {"x": X})

    def test_the_standard_took_one(self) -> None:
        net = model([node("MeanVarianceNormalization", ["x"], "y", axes=[2, 3])],
                    {"x": list(X.shape)}, {"y": list(X.shape)}, opset=9)  # fmt: skip
        check(net, tol=1e-5)

    def test_an_image_is_scaled_in_front_of_a_convolution(self) -> None:
        scaler = node("ImageScaler", ["x"], "h", scale=0.5, bias=[1.0, 2.0, 3.0])
        conv = node("Conv", ["h", "w"], "y")
        assert ops(check(experiment(scaler, conv, w=weights(4, 3, 3, 3)))) == {"Conv": 1}
