"""Nothing that is invalid, or does not load and run, leaves the library."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import model, node, weights

from qdq import CalibrationError, VerifyError
from qdq.verify import verify


def strided() -> onnx.ModelProto:
    """Open sizes; the second convolution needs three rows of what the pool leaves."""
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("MaxPool", ["c"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "v"], "y"),
    ]
    constants = {"w": weights(32, 32, 3, 3), "v": weights(32, 32, 3, 3)}
    return model(nodes, {"x": [1, 32, "h", "w"]}, {"y": [1, 32, None, None]}, constants)


def test_a_valid_model_comes_back() -> None:
    net = strided()
    assert verify(net, {"x": np.zeros((1, 32, 20, 20), np.float32)}) is net
    assert verify(net) is net


def test_an_invalid_model_is_a_fault_of_qdq() -> None:
    net = strided()
    net.graph.node[0].op_type = "Convolve"
    with pytest.raises(VerifyError, match=r"Convolve.*fault in qdq.*keep_float"):
        verify(net, source=strided())


def test_a_model_that_does_not_run_is_a_fault_of_qdq() -> None:
    broken = model(
        [node("Reshape", ["x", "shape"], "y")],
        {"x": ["n"]},
        {"y": ["m"]},
        {"shape": np.array([3], np.int64)},
    )
    right = model([node("Identity", ["x"], "y")], {"x": ["n"]}, {"y": ["n"]})
    feed = {"x": np.zeros(4, np.float32)}
    for source in (None, right):
        with pytest.raises(VerifyError, match=rf"could not run .*fault in qdq.*{ort.__version__}"):
            verify(broken, feed, source)


def test_a_sample_that_the_float_model_cannot_run_is_no_fault_of_qdq() -> None:
    low = np.random.default_rng(0).uniform(size=(1, 32, 5, 60)).astype(np.float32)
    with pytest.raises(CalibrationError, match=r"float model does not run.*sample 0") as caught:
        verify(strided(), {"x": low}, strided())
    assert caught.value.sample == 0


def test_infinities_that_the_float_model_does_not_give_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def net(bias: float) -> onnx.ModelProto:
        nodes = [node("Add", ["x", "b"], "a"), node("Reciprocal", ["a"], "y")]
        return model(nodes, {"x": [3]}, {"y": [3]}, {"b": np.float32(bias)})

    feed = {"x": np.array([0, 1, 2], np.float32)}
    verify(net(0), feed, net(1))
    assert "'y' of the quantized model has 1 NaN or Inf of 3 values" in caplog.text
    caplog.clear()
    verify(net(0), feed, net(0))  # the float model gives them too
    verify(net(1), feed, net(0))
    assert not caplog.text


def test_outputs_that_are_no_tensors_are_let_pass() -> None:
    split = node("SplitToSequence", ["x"], "y")
    graph = onnx.helper.make_graph(
        [split], "g", [onnx.helper.make_tensor_value_info("x", 1, [3])],
        [onnx.helper.make_tensor_sequence_value_info("y", 1, None)],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21)]
    net = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert verify(net, {"x": np.array([0, np.inf, 2], np.float32)}, net) is net
