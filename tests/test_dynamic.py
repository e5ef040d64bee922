"""LSTMs on integers: kernels that round their activations by themselves."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, fused_ops, quantized
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import feeds, model, node, retyped, rng, weights
from numpy.typing import NDArray

import qdq
from qdq.api import collect_statistics, run
from qdq.dynamic import make_dynamic
from qdq.graph import Graph
from qdq.modelio import save
from qdq.ops import demand_of
from qdq.ops.demand import NodeView, TensorView
from qdq.placement import gains, place
from qdq.placement.frontier import HARMS, rounded_by
from qdq.placement.gains import typical
from qdq.statistics.few import FewSamples
from qdq.targets import ORT_CPU_NO_VNNI, PORTABLE

STEPS, WIDTH = 40, 192
ANY = [None] * 4
SHAPE = {"x": [STEPS, 1, WIDTH]}
INT8 = "DynamicQuantizeLSTM"


def cell(hidden: int, width: int, directions: int = 1, seed: int = 0) -> dict[str, NDArray]:
    """W and R that forget slowly enough for errors to show."""
    r = rng(seed)
    made = {"W": (directions, 4 * hidden, width), "R": (directions, 4 * hidden, hidden)}
    return {k: (r.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for k, s in made.items()}


def lstm(
    inputs: Sequence[str] = ("x", "W", "R"),
    outputs: Sequence[str] = ("y",),
    hidden: int = WIDTH,
    **attributes: Any,
) -> onnx.NodeProto:
    return node("LSTM", inputs, outputs, hidden_size=hidden, **attributes)


def one(**constants: NDArray) -> onnx.ModelProto:
    made = cell(WIDTH, WIDTH) | constants
    return model([lstm()], SHAPE, {"y": [STEPS, 1, 1, WIDTH]}, made)


def stack() -> onnx.ModelProto:
    """LSTM, LSTM, Gemm over the last step."""
    first, second = cell(WIDTH, WIDTH, seed=1), cell(WIDTH, WIDTH, seed=2)
    constants = {k + "0": v for k, v in first.items()} | {k + "1": v for k, v in second.items()}
    constants |= {"one": np.array([1]), "w": weights(WIDTH, 8, seed=3)}
    constants |= {"flat": np.array([-1, WIDTH])}
    nodes = [
        lstm(["x", "W0", "R0"], ["a"]),
        node("Squeeze", ["a", "one"], "b"),
        lstm(["b", "W1", "R1"], ["c", "h"]),
        node("Reshape", ["h", "flat"], "last"),
        node("Gemm", ["last", "w"], "y"),
    ]
    return model(nodes, SHAPE, {"y": [1, 8]}, constants)


def test_a_default_call_runs_lstms_on_integers(caplog: pytest.LogCaptureFixture) -> None:
    net, data = stack(), feeds(SHAPE)
    with caplog.at_level(logging.WARNING):
        result = run(net, data)
    assert not caplog.records
    assert result.plan.quantized == ("LSTM_a", "LSTM_c")
    assert "LSTM_a" not in result.left_float
    found = compare(net, result.model, feeds(SHAPE, seed=5))
    assert found.ops[INT8] == 2
    assert found.ops["LSTM"] == 0
    assert found.sqnr > 30
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=1)
    props = {p.key: p.value for p in result.model.metadata_props}
    assert json.loads(props["qdq.planned"]) == {"LSTM": 2}
    names = {t.name for t in result.model.graph.initializer}
    assert names.isdisjoint({"W0", "R0", "W1", "R1"})  # a quarter of the size, not five quarters
    assert result.harm.keys() >= {"W0", "W1"}
    assert rounded_by(result.plan) >= {"W0", "W1"}


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.sampled_from([4, 8]), st.integers(1, 5)),
        elements=st.floats(-1e3, 1e3, width=32),
    )
)
def test_codes_are_within_half_a_scale(weight: NDArray[np.float32]) -> None:
    directions, gates, _ = weight.shape
    recurrent = np.ones((directions, gates, gates // 4), np.float32)
    net = model(
        [lstm(hidden=gates // 4)], {"x": [1, 1, 1]}, {"y": ANY}, {"W": weight, "R": recurrent}
    )
    made = {t.name: t for t in make_dynamic(net.graph.node[0], Graph(net))}
    codes, scale, zero = (
        onnx.numpy_helper.to_array(made[f"W_{part}"])
        for part in ("quantized", "scale", "zero_point")
    )
    assert codes.dtype == zero.dtype == np.int8
    assert scale.shape == zero.shape == (directions, gates)
    assert not zero.any()
    real = codes.transpose(0, 2, 1) * scale[..., None].astype(np.float64)
    error = np.abs(real - weight)
    assert (error <= 0.5 * scale[..., None] * (1 + 1e-5)).all()
    used = np.abs(codes.astype(int)).max(1)
    assert (used[np.abs(weight).max(2) > 1e-30] == 127).all()


OPTIONAL = {
    "bias": (dict(inputs=("x", "W", "R", "B")), {}),
    "states": (dict(inputs=("x", "W", "R", "B", "", "h0", "c0"), outputs=("y", "h", "c")), {}),
    "peepholes": (dict(inputs=("x", "W", "R", "", "", "", "", "P")), {}),
    "lengths": (dict(inputs=("x", "W", "R", "B", "lengths")), {}),
    "only the state": (dict(outputs=("", "y")), {}),
    "clip": (dict(clip=0.5), {}),
    "reverse": (dict(direction="reverse"), {}),
    "both ways": (dict(direction="bidirectional"), {"directions": 2}),
    "activations": (dict(activations=["HardSigmoid", "Softsign", "Tanh"]), {}),
    "explicit layout": (dict(layout=0), {}),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_all_that_an_lstm_can_have(case: str) -> None:
    form, size = OPTIONAL[case]
    directions = size.get("directions", 1)
    constants = cell(64, 32, directions) | {
        "B": rng(4).standard_normal((directions, 8 * 64)).astype(np.float32),
        "h0": rng(5).uniform(-1, 1, (directions, 3, 64)).astype(np.float32),
        "c0": rng(6).uniform(-1, 1, (directions, 3, 64)).astype(np.float32),
        "P": rng(7).standard_normal((directions, 3 * 64)).astype(np.float32),
        "lengths": np.array([7, 2, 5], np.int32),
    }
    made = lstm(hidden=64, **form)
    used = {k: v for k, v in constants.items() if k in made.input}
    sizes = zip(made.output, (4, 3, 3), strict=False)
    outputs = {n: [None] * rank for n, rank in sizes if n}
    net = model([made], {"x": [7, 3, 32]}, outputs, used)
    _, found = quantized(net, feeds({"x": [7, 3, 32]}))
    assert found.ops[INT8] == 1
    assert found.sqnr > 30
    assert np.array_equal(found.fused, found.unfused)


def loud() -> onnx.ModelProto:
    """All that counts is a millionth of what is loudest in its input."""
    made = cell(WIDTH, WIDTH)
    made["W"][:, :, 0] = 0.0
    return one(W=made["W"])


def loud_data(seed: int = 1) -> list[dict[str, NDArray]]:
    data = feeds(SHAPE, seed=seed)
    for feed in data:
        feed["x"][:, :, 0] = 1e5
    return data


@pytest.mark.parametrize("options", [{}, {"worth": 0.0}, {"worth": 45.0}, {"measured": True}])
def test_what_it_destroys_stays_float(options: dict[str, Any]) -> None:
    result = run(loud(), loud_data(), **options)
    assert result.left_float["LSTM_y"] == HARMS
    assert fused_ops(result.model)["LSTM"] == 1


def test_without_measuring_it_stays_float() -> None:
    result = run(stack(), feeds(SHAPE), calibrator=qdq.MinMax())
    assert result.left_float["LSTM_a"] == place.UNSEEN
    assert "the calibrator keeps histograms" in place.UNSEEN


def test_batches_first_stay_float() -> None:
    """onnxruntime's CPU provider has no kernel for that at all, so nothing is run."""
    weight = TensorView(name="w", constant=True)
    view = NodeView(
        name="cell",
        op_type="LSTM",
        inputs=(TensorView(name="x"), weight, weight),
        outputs=("y",),
        attributes={"layout": 1},
    )
    assert "layout=0" in str(demand_of(view))


def test_a_clamp_behind_it_stays() -> None:
    nodes = [lstm(outputs=("a",)), node("Relu", ["a"], "r"), node("Neg", ["r"], "y")]
    net = model(nodes, SHAPE, {"y": ANY}, cell(WIDTH, WIDTH))
    _, found = quantized(net, feeds(SHAPE))
    assert found.ops[INT8] == found.ops["Relu"] == 1
    assert found.sqnr > 30


def test_small_ones_stay_float() -> None:
    constants = cell(32, 32)
    net = model([lstm(hidden=32)], {"x": [40, 1, 32]}, {"y": ANY}, constants)
    assert run(net, feeds({"x": [40, 1, 32]})).left_float["LSTM_y"] == place.FLOAT_PAYS


def test_weights_that_are_computed_stay_float() -> None:
    made = cell(WIDTH, WIDTH)
    nodes = [node("Mul", ["scale", "R"], "R2"), lstm(["x", "W", "R2"])]
    net = model(nodes, SHAPE | {"scale": [1]}, {"y": ANY}, made)
    data = [feed | {"scale": np.ones(1, np.float32)} for feed in feeds(SHAPE)]
    assert "computed while the model runs" in run(net, data).left_float["LSTM_y"]


@pytest.mark.parametrize("target", [ORT_CPU_NO_VNNI, PORTABLE])
def test_targets_without_such_kernels(target: Any) -> None:
    reason = run(stack(), feeds(SHAPE), target=target).left_float["LSTM_a"]
    assert reason == f"{target.name} has no integer kernel for LSTM"


@pytest.mark.parametrize(
    "rule",
    [qdq.Rule(op_types=("LSTM",), keep_float=True), qdq.Rule(nodes="LSTM_.*", keep_float=True)],
)
def test_rules_keep_it_float(rule: qdq.Rule) -> None:
    result = run(stack(), feeds(SHAPE), scheme=qdq.Scheme(rules=[rule]))
    assert fused_ops(result.model)[INT8] == 0
    assert "rule" in result.left_float["LSTM_a"]


def test_an_integer_reader_gets_a_q_of_its_own() -> None:
    constants = cell(WIDTH, WIDTH) | {"w": weights(WIDTH, WIDTH, seed=3)}
    nodes = [
        lstm(outputs=("a",)),
        node("MatMul", ["a", "w"], "c"),
        node("Neg", ["a"], "d"),
        node("Add", ["c", "d"], "y"),
    ]
    net = model(nodes, SHAPE, {"y": ANY}, constants)
    result, found = quantized(net, feeds(SHAPE))
    assert found.ops[INT8] == 1
    assert found.sqnr > 30
    makers = {o: n for n in result.model.graph.node for o in n.output}
    (sign,) = [n for n in result.model.graph.node if n.op_type == "Neg"]
    assert makers[sign.input[0]].op_type == INT8  # a float reader reads float
    assert "LeakyRelu" not in {n.op_type for n in result.model.graph.node}
    assert found.unfused_sqnr == pytest.approx(found.sqnr, abs=1)


def test_a_quantized_producer_hands_it_real_numbers() -> None:
    constants = cell(WIDTH, WIDTH) | {"w": weights(WIDTH, WIDTH, seed=3)}
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Sigmoid", ["a"], "s"),
        lstm(["s", "W", "R"]),
    ]
    net = model(nodes, SHAPE, {"y": ANY}, constants)
    _, found = quantized(net, feeds(SHAPE))
    assert found.ops["QLinearMatMul"] == found.ops["QLinearSigmoid"] == found.ops[INT8] == 1
    assert found.sqnr > 25


def shared() -> onnx.ModelProto:
    """Two with the same weights."""
    made = cell(WIDTH, WIDTH)
    nodes = [
        lstm(outputs=("a",)),
        lstm(["z", "W", "R"], ["b"]),
        node("Concat", ["a", "b"], "y", axis=0),
    ]
    return model(nodes, SHAPE | {"z": SHAPE["x"]}, {"y": ANY}, made)


@pytest.mark.parametrize("loud", ["x", "z"])
def test_those_of_one_weight_count_together(loud: str) -> None:
    net = shared()
    data = feeds(SHAPE | {"z": SHAPE["x"]})
    result = run(net, data)
    assert result.plan.quantized == ("LSTM_a", "LSTM_b")
    assert compare(net, result.model, data).sqnr > 30
    for feed in data:  # one of the two reads what it must not round
        feed[loud][:, :, 0] = 1e5
    net = onnx.ModelProto.FromString(net.SerializeToString())
    weight = onnx.numpy_helper.to_array(net.graph.initializer[0]).copy()
    weight[:, :, 0] = 0.0
    net.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    assert run(net, data).plan.quantized == ()


def test_calibration_apart_gives_the_same_bytes(tmp_path: Any) -> None:
    net, data = stack(), feeds(SHAPE, count=9)
    plain = run(net, data).model.SerializeToString()
    with ThreadPoolExecutor(2) as pool:
        found = collect_statistics(net, data[::-1], executor=pool)
    found.save(tmp_path / "s.npz")
    again = run(net, statistics=tmp_path / "s.npz")
    assert again.model.SerializeToString() == plain
    parts = [collect_statistics(net, half) for half in (data[:4], data[4:])]
    assert parts[1].merge(parts[0], qdq.MSE()) == found


def test_statistics_without_its_error_leave_it_float() -> None:
    net = stack()
    found = collect_statistics(net, feeds(SHAPE))
    bare = type(found.gradients)()
    assert run(net, statistics=replace(found, gradients=bare)).plan.quantized == ()


def test_a_model_with_half_precision(tmp_path: Any) -> None:
    net = stack()
    half = retyped(net, np.float16)
    data = [{"x": f["x"].astype(np.float16)} for f in feeds(SHAPE)]
    assert fused_ops(run(half, data).model)[INT8] == 2


def test_weights_in_the_model_file(tmp_path: Any) -> None:
    """Large ones are references, which have to be read into what is measured and emitted."""
    constants = cell(512, 128)
    net = model([lstm(hidden=512)], {"x": [20, 1, 128]}, {"y": ANY}, constants)
    path = tmp_path / "m.onnx"
    save(net, path)
    before = path.read_bytes()
    data = feeds({"x": [20, 1, 128]})
    found = run(path, data).model
    assert fused_ops(found)[INT8] == 1
    assert found.SerializeToString() == run(net, data).model.SerializeToString()
    assert path.read_bytes() == before


def test_every_lstm_that_can_is_integer_where_all_are() -> None:
    assert run(loud(), loud_data(), target=FORCED).plan.quantized == ("LSTM_y",)


def test_compare_tells_where_the_noise_arises() -> None:
    net, data = stack(), feeds(SHAPE)
    report = qdq.compare(net, qdq.quantize(net, data), data, repeats=0)
    shares = {n.name: n.share for n in report.nodes}
    assert shares["LSTM_a"] + shares["LSTM_c"] == pytest.approx(1.0)
    assert min(shares["LSTM_a"], shares["LSTM_c"]) > 0.05
    assert not report.notes
    (kernel,) = [k for k in report.kernels if k.op_type == "LSTM"]
    assert (kernel.planned, kernel.integer, kernel.float) == (2, 2, 0)
    gains = {a.what: a.gain_db for a in report.advice}
    assert gains.keys() == {"leave LSTM_a float", "leave LSTM_c float"}
    assert min(gains.values()) > 0.2
    assert all(n.integer == (n.op_type == INT8) for n in report.nodes)


def test_compare_takes_what_onnxruntimes_quantizer_makes(tmp_path: Any) -> None:
    from onnxruntime.quantization import quantize_dynamic

    net, data = stack(), feeds(SHAPE)
    save(net, tmp_path / "float.onnx")
    paths = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    quantize_dynamic(*paths, op_types_to_quantize=["LSTM"])
    report = qdq.compare(net, paths[1], data, repeats=0)
    shares = {n.name: n.share for n in report.nodes if n.integer}
    assert shares.keys() == {"LSTM_a", "LSTM_c"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert {a.what for a in report.advice} == {"leave LSTM_a float", "leave LSTM_c float"}


def test_of_many_several_are_measured_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(stack(), feeds(SHAPE))
    monkeypatch.setattr(gains, "_MOST_RUNS", 1)
    together = run(stack(), feeds(SHAPE))
    assert together.harm["W0"] == together.harm["W1"] > max(alone.harm["W0"], alone.harm["W1"])


def test_its_price_is_that_of_other_errors() -> None:
    net, data = stack(), feeds(SHAPE)
    found = typical(collect_statistics(net, data).gradients)
    harm = run(net, data).harm
    assert {k: harm[k] for k in ("W0", "W1")} == pytest.approx(
        {k: 8 / 3 * found[k] for k in ("W0", "W1")}
    )


def test_numbers_of_other_samples_are_not_put_together() -> None:
    def of(name: str, *digests: str) -> FewSamples:
        return FewSamples(names=(name,), rows={d: np.ones(1, np.float32) for d in digests})

    both = of("a", "1", "2").beside(of("b", "1", "2"))
    assert both.names == ("a", "b")
    assert {d: len(row) for d, row in both.rows.items()} == {"1": 2, "2": 2}
    assert not of("a", "1").beside(of("b", "2")).rows
    assert of("a", "1").beside(FewSamples()) == of("a", "1") == FewSamples().beside(of("a", "1"))


def test_compare_passes_inputs_that_are_left_out() -> None:
    constants = cell(WIDTH, WIDTH) | {"P": weights(1, 3 * WIDTH)}
    net = model([lstm(["x", "W", "R", "", "", "", "", "P"])], SHAPE, {"y": ANY}, constants)
    data = feeds(SHAPE)
    report = qdq.compare(net, qdq.quantize(net, data), data, repeats=0)
    assert [n.share for n in report.nodes if n.integer] == [1.0]
