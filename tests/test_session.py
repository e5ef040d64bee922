"""Running models: the right values, one sample at a time, and errors of our own."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import feeds, model, node, weights
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdq import session
from qdq.data import open_feeds
from qdq.errors import CalibrationError, ConfigError, ModelError
from qdq.session import (
    input_specs,
    open_session,
    optimized_op_counts,
    run,
)
from qdq.statistics.observe import observe
from qdq.timing import paired_latency

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


def lookup(value: np.ndarray | onnx.TensorProto, *, as_input: bool = False) -> onnx.ModelProto:
    """y = row i of the table w, which is one more input (with a default) if ``as_input``."""
    tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, "w")
    inputs = [helper.make_tensor_value_info("i", TensorProto.INT64, [1])]
    if as_input:
        inputs.append(helper.make_tensor_value_info("w", tensor.data_type, tensor.dims))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "i"], ["y"], "gather")],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", tensor.data_type, [1, *tensor.dims[1:]])],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


ROW = [{"i": np.array([3])}]


@pytest.fixture
def serialized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the messages that the runtime is given."""
    sizes: list[int] = []
    real = session.ort.InferenceSession

    def noted(source: bytes, *args: object, **settings: object) -> object:
        sizes.append(len(source))
        return real(source, *args, **settings)

    monkeypatch.setattr(session.ort, "InferenceSession", noted)
    return sizes


@pytest.mark.parametrize(
    "kind", ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
)
def test_large_weights_of_every_numpy_type_are_lent(kind: str, serialized: list[int]) -> None:
    table = np.arange(40 * 400).reshape(40, 400).astype(kind)
    for optimize in (True, False):
        (found,) = run(lookup(table), ROW, optimize=optimize)
        np.testing.assert_array_equal(found["y"], table[3:4])
    assert max(serialized) < 1000 < table.nbytes


@pytest.mark.parametrize(
    "kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.STRING]
)
def test_weights_that_numpy_does_not_know_stay_inside(kind: int) -> None:
    if kind == TensorProto.STRING:
        tensor = helper.make_tensor("w", kind, [4000], [f"row {i}" for i in range(4000)])
        (found,) = run(lookup(tensor), ROW)
        assert found["y"].tolist() == ["row 3"]
        return
    tensor = helper.make_tensor("w", kind, [4, 1000], [i % 7 for i in range(4000)])
    model = lookup(tensor)
    model.graph.node[0].CopyFrom(helper.make_node("Cast", ["w"], ["y"], "cast", to=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [4, 1000]))
    (found,) = run(model, ROW)
    np.testing.assert_array_equal(found["y"].ravel(), np.arange(4000) % 7)


def test_values_kept_in_typed_fields_are_lent(serialized: list[int]) -> None:
    tensor = helper.make_tensor("w", TensorProto.DOUBLE, [4, 1000], np.arange(4000.0))
    assert len(tensor.double_data) == 4000
    np.testing.assert_array_equal(next(run(lookup(tensor), ROW))["y"][0], np.arange(3000.0, 4000))
    assert max(serialized) < 1000


def test_a_lent_default_of_an_input_can_be_overridden(serialized: list[int]) -> None:
    table = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    opened = open_session(lookup(table, as_input=True))
    np.testing.assert_array_equal(opened.run(ROW[0])["y"], table[3:4])
    np.testing.assert_array_equal(opened.run({**ROW[0], "w": -table})["y"], -table[3:4])
    assert max(serialized) < 1000


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as one that is too large to be copied."""
    monkeypatch.setattr(session, "_HEAVY", 0)
    monkeypatch.setattr(session, "_FED_ABOVE", 1024)


def inputs_of(opened: session.Session) -> set[str]:
    return {i.name for i in opened._session.get_inputs()}


def test_a_lean_session_reads_the_weights_of_large_models_as_inputs(heavy: None) -> None:
    model, feeds = conv_net(), images(2)
    lean, usual = open_session(model, lean=True), open_session(model)
    assert inputs_of(lean) == {"image", "w"}
    assert inputs_of(usual) == {"image"}
    for feed in feeds:
        np.testing.assert_allclose(lean.run(feed)["y"], usual.run(feed)["y"], rtol=1e-5)


def test_only_large_models_are_opened_lean() -> None:
    assert inputs_of(open_session(conv_net(), lean=True)) == {"image"}


def test_for_few_samples_large_matrices_are_inputs() -> None:
    """Others stay: a convolution's weight is put in another order, which makes it fast."""
    nodes = [
        node("Conv", ["x", "k"], "c"),
        node("MatMul", ["c", "w"], "m"),
        node("MatMul", ["m", "small"], "s"),
        node("Add", ["s", "handed"], "y"),
    ]
    constants = {"k": weights(600, 600, 1, 1), "w": weights(600, 500), "small": weights(500, 5),
                 "handed": weights(60_000, 5)}  # fmt: skip
    net = model(nodes, {"x": [1, 600, 1, 600]}, {"y": [None] * 4}, constants)
    feed = feeds({"x": (1, 600, 1, 600)}, 1)[0]
    few = open_session(net, outputs=("s", "handed"), few=True)
    assert few._fed.keys() == {"w"}
    plain = open_session(net, outputs=("s", "handed")).run(feed)
    found = few.run(feed)
    np.testing.assert_allclose(found["s"], plain["s"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["handed"], plain["handed"])


def test_a_lean_session_hands_out_weights_and_takes_others_in_their_place(heavy: None) -> None:
    table = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    opened = open_session(lookup(table, as_input=True), lean=True)
    np.testing.assert_array_equal(opened.run(ROW[0])["y"], table[3:4])
    np.testing.assert_array_equal(opened.run({**ROW[0], "w": -table})["y"], -table[3:4])
    seen = open_session(lookup(table), outputs=["w", "y"], lean=True).run(ROW[0])
    np.testing.assert_array_equal(seen["w"], table)
    np.testing.assert_array_equal(seen["y"], table[3:4])


def test_lean_sessions_feed_weights_to_subgraphs(heavy: None, serialized: list[int]) -> None:
    test_lent_weights_in_subgraphs_and_as_observed_tensors(serialized)
    table = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    rows = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])
    inner = [helper.make_node("Gather", ["w", "i"], ["y"])]
    graphs = [helper.make_graph(inner, name, [], [rows]) for name in ("yes", "no")]
    model = lookup(table)
    branch = helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1])
    model.graph.node[0].CopyFrom(branch)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    opened = open_session(model, lean=True)
    assert inputs_of(opened) == {"i", "c", "w"}
    np.testing.assert_array_equal(opened.run({**ROW[0], "c": np.array(True)})["y"], table[3:4])


def test_lent_weights_in_subgraphs_and_as_observed_tensors(serialized: list[int]) -> None:
    table = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    model = lookup(table)
    rows = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])
    own = numpy_helper.from_array(-table[:1], "own")
    yes = helper.make_graph([helper.make_node("Gather", ["w", "i"], ["y"])], "yes", [], [rows])
    no = helper.make_graph([helper.make_node("Identity", ["own"], ["y"])], "no", [], [rows], [own])
    branch = helper.make_node("If", ["c"], ["y"], "if", then_branch=yes, else_branch=no)
    model.graph.node[0].CopyFrom(branch)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    feeds = [{**ROW[0], "c": np.array(c)} for c in (True, False)]
    found = list(observe(model, ["y", "w"], feeds))
    np.testing.assert_array_equal(found[0]["y"], table[3:4])
    np.testing.assert_array_equal(found[1]["y"], -table[:1])
    np.testing.assert_array_equal(found[1]["w"], table)
    assert max(serialized) < 6000


def test_lent_weights_outlive_the_model() -> None:
    table = np.arange(4000, dtype=np.float32).reshape(4, 1000)
    opened = open_session(lookup(table), optimize=False)
    gc.collect()
    _others = [np.full((4, 1000), 7, np.float32) for _ in range(50)]  # would take freed memory
    np.testing.assert_array_equal(opened.run(ROW[0])["y"], table[3:4])


def test_lending_changes_neither_the_model_nor_what_the_runtime_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, feeds = conv_net(), images(1)
    before = model.SerializeToString()
    monkeypatch.setattr(session.tempfile, "tempdir", str(tmp_path))
    lent = next(run(model, feeds))["y"], optimized_op_counts(model)
    inline = next(run(before, feeds))["y"], optimized_op_counts(before)
    np.testing.assert_array_equal(lent[0], inline[0])
    assert lent[1] == inline[1]
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
    for repeats in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="wants a whole number, 1 or more"):
            paired_latency(chain(1), chain(1), feed, repeats=repeats)  # type: ignore[arg-type]


def test_a_large_initializer_that_nothing_reads_does_no_harm() -> None:
    net = model([node("Relu", ["x"], "y")], {"x": [2]}, {"y": [2]}, {"idle": np.zeros(4096, "f")})
    assert open_session(net).outputs == ("y",)


def test_a_large_initializer_that_is_an_output() -> None:
    net = model([node("Relu", ["x"], "y")], {"x": [2]}, {"y": [2], "w": [800]}, {"w": weights(800)})
    (found,) = session.run(net, [{"x": np.ones(2, np.float32)}])
    np.testing.assert_array_equal(found["w"], weights(800))
