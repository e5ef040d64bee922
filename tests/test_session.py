"""Running models: the right values, one sample at a time, and errors of our own."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdq import modelio, session
from qdq.data import open_feeds
from qdq.errors import CalibrationError, ModelError
from qdq.session import (
    input_specs,
    observe,
    open_session,
    optimized_op_counts,
    paired_latency,
    run,
)

RNG = np.random.default_rng(7)


def conv_net(opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    """image -> Conv -> Relu -> Shape (int64); the Relu's output is not a graph output."""
    weight = RNG.normal(size=(12, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w"], ["c"], "conv"),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("Shape", ["r"], ["s"], "shape"),
            helper.make_node("GlobalAveragePool", ["r"], ["y"], "pool"),
        ],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def images(count: int) -> list[dict[str, np.ndarray]]:
    return [{"image": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def test_observe_gives_the_values_of_an_independent_implementation() -> None:
    model, feeds = conv_net(), images(3)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    for name, kind in (("c", TensorProto.FLOAT), ("r", TensorProto.FLOAT), ("s", 7)):
        exposed.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    reference = ReferenceEvaluator(exposed)
    before = model.SerializeToString()
    found = list(observe(model, ["r", "image", "s", "c", "y"], feeds))
    assert model.SerializeToString() == before
    assert len(found) == 3
    for values, feed in zip(found, feeds, strict=True):
        c, r, s = reference.run(None, feed)
        np.testing.assert_allclose(values["c"], c, atol=1e-5)
        np.testing.assert_allclose(values["r"], r, atol=1e-5)
        np.testing.assert_array_equal(values["s"], s)
        np.testing.assert_array_equal(values["image"], feed["image"])
        np.testing.assert_allclose(values["y"], r.mean((2, 3), keepdims=True), atol=1e-5)
        assert set(values) == {"c", "r", "s", "y", "image"}


def test_observe_takes_a_feed_only_when_its_values_are_asked_for() -> None:
    taken = []

    def source() -> Iterator[dict[str, np.ndarray]]:
        for i, feed in enumerate(images(3)):
            taken.append(i)
            yield feed

    values = observe(conv_net(), ["r"], source())
    assert taken == []
    next(values)
    assert taken == [0]


def test_observing_nothing_or_inputs_only_runs_no_model() -> None:
    feeds = images(2)
    assert list(observe(conv_net(), [], feeds)) == [{}, {}]
    fed = list(observe(conv_net(), ["image"], feeds))
    assert [v["image"] is f["image"] for v, f in zip(fed, feeds, strict=True)] == [True, True]


def test_observing_an_unknown_tensor() -> None:
    with pytest.raises(ModelError, match="no tensor 'imagee'; did you mean 'image'") as e:
        observe(conv_net(), ["imagee"], images(1))
    assert e.value.tensor == "imagee"


def test_a_sample_that_cannot_run_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    feeds = [*images(1), {"image": np.zeros((1, 3, 1, 1), np.float32)}]
    for values in (observe(conv_net(), ["r"], feeds), run(conv_net(), feeds)):
        next(values)
        with pytest.raises(CalibrationError, match="Sample 1: onnxruntime could not run") as e:
            next(values)
        assert e.value.sample == 1
        assert "\n" not in str(e.value)
        assert "[ONNXRuntimeError]" not in str(e.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (conv_net(ir=99), ["IR version", "upgrade onnxruntime"]),
        (conv_net(opset=99), ["opset", "upgrade onnxruntime"]),
        (b"not a model", ["could not load"]),
        ("missing.onnx", ["missing.onnx"]),
        (Path("missing.onnx"), ["missing.onnx"]),
    ],
)
def test_a_model_that_does_not_load(
    model: object, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as e:
        open_session(model)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_run_gives_the_same_from_proto_bytes_and_path_with_and_without_optimizations(
    tmp_path: Path,
) -> None:
    model, feeds = conv_net(), images(2)
    onnx.save(model, tmp_path / "m.onnx")
    forms = (model, model.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx"))
    expected = [v["y"] for v in run(model, feeds)]
    for form in forms:
        for optimize in (True, False):
            for found, wanted in zip(run(form, feeds, optimize=optimize), expected, strict=True):
                np.testing.assert_allclose(found["y"], wanted, atol=1e-6)


def test_a_large_model_goes_through_a_folder_that_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, feeds = conv_net(), images(1)
    expected, before = next(run(model, feeds))["y"], model.SerializeToString()
    counts = optimized_op_counts(model)
    monkeypatch.setattr(session, "_MAX_PROTO_BYTES", 100)
    monkeypatch.setattr(modelio, "_PROTO_LIMIT", 100)
    monkeypatch.setattr(session.tempfile, "tempdir", str(tmp_path))
    opened = open_session(model)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(opened.run(feeds[0])["y"], expected)
    assert optimized_op_counts(model) == counts
    assert model.SerializeToString() == before
    assert list(tmp_path.iterdir()) == []


def test_input_specs_leave_initializers_out_and_read_shapes() -> None:
    graph = helper.make_graph(
        [],
        "g",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 3, None]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("b", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.STRING, None),
        ],
        [],
        [numpy_helper.from_array(np.zeros(2, np.float32), "w")],
    )
    specs = input_specs(helper.make_model(graph))
    assert {k: (v.dtype, v.shape) for k, v in specs.items()} == {
        "a": (np.dtype(np.float32), (None, 3, None)),
        "b": (np.dtype(np.int64), ()),
        "c": (np.dtype(object), None),
    }
    assert list(specs) == ["a", "b", "c"]


def test_a_sequence_input_is_refused() -> None:
    value = helper.make_tensor_sequence_value_info("seq", TensorProto.FLOAT, None)
    with pytest.raises(ModelError, match="'seq' is not a tensor but sequence_type"):
        input_specs(helper.make_model(helper.make_graph([], "g", [value], [])))


def test_checked_feeds_run() -> None:
    model = conv_net()
    feeds = open_feeds(images(2), input_specs(model))
    assert len(list(run(model, feeds))) == 2


def test_optimized_op_counts_are_those_of_the_optimized_graph() -> None:
    counts = optimized_op_counts(conv_net())
    assert "Relu" not in counts  # fused into the convolution
    assert counts["Conv"] == 1


def test_paired_latency_sees_the_faster_model() -> None:
    def chain(length: int) -> onnx.ModelProto:
        w = numpy_helper.from_array(np.eye(128, dtype=np.float32), "w")
        nodes = [helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"]) for i in range(length)]
        info = helper.make_tensor_value_info
        ends = [info(n, TensorProto.FLOAT, [128, 128]) for n in ("t0", f"t{length}")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [w])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    feed = {"t0": np.ones((128, 128), np.float32)}
    timing = paired_latency(chain(40), chain(1), feed, repeats=9, threads=1)
    assert timing.ratio > 2
    assert timing.ms_a > timing.ms_b > 0
