"""Which plan is taken: the wish, and a budget in latency."""

import json
import logging
import math
from typing import Any

import numpy as np
import onnx
import pytest
from harness import compare, fused_ops
from models import detector, feeds, model, node, weights

import qdq
from qdq import choice
from qdq.api import run
from qdq.placement.frontier import Candidate
from qdq.plan import make_plan
from qdq.targets import PORTABLE
from qdq.timing import Latency
from qdq.wish import Wish

SHAPE = {"x": [1, 32, 40, 40]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worth": 1.0, "target_latency": 0.5}, "worth and target_latency are 2 ways"),
        ({"target_sqnr": 30.0, "target_latency": 0.5}, "give one of them"),
        ({"worth": 1.0, "target_sqnr": 30.0}, "give one of them"),
        ({"measured": True, "target_latency": 0.5}, "measured and target_latency are 2 ways"),
        ({"measured": True, "target_sqnr": 30.0}, "give one of them"),
        ({"measured": True, "worth": 0.0}, "give one of them"),
        ({"target_sqnr": float("inf")}, "finite number of dB"),
        ({"target_sqnr": "30"}, "finite number of dB"),
        ({"target_latency": 0.0}, "above 0"),
        ({"target_latency": float("nan")}, "above 0"),
        ({"target_latency": "0.5"}, "wants a number"),
        ({"target_latency": True}, "wants a number"),
        ({"worth": True}, "wants a finite number"),
        ({"worth": False}, "wants a finite number"),
        ({"target_sqnr": True}, "wants a finite number"),
        ({"target_sqnr": np.float32("nan")}, "wants a finite number"),
        ({"measured": "no"}, "measured='no'.*wants True or False"),
        ({"measured": 1}, "measured=1 .*wants True or False"),
    ],
)
def test_wishes_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(qdq.ConfigError, match=message):
        Wish(**options)


@pytest.mark.parametrize(
    ("harm", "amplitude", "surprises"),
    [
        (0.01, 0.19, False),  # dear, but less than twice the 0.1 that were foretold
        (0.01, 0.21, True),
        (0.0, 0.04, False),  # nothing was foretold, and 0.04 cost less than a tenth of the time
        (0.0, 0.06, True),
        (0.01, math.nan, False),
    ],
)
def test_an_error_surprises_that_is_twice_what_was_foretold_and_dear(
    harm: float, amplitude: float, surprises: bool
) -> None:
    plan = make_plan(detector())
    candidate = Candidate(plan=plan, worth=1.0, time=0.5, harm=harm)
    assert choice._surprises(candidate, amplitude) == surprises


def test_a_forecast_that_gives_up_all_integers_is_checked() -> None:
    """Where a few values flip, gradients foretell errors far beyond what a tanh can hand out."""
    nodes = [
        node("Conv", ["x", "w"], "a", pads=[1] * 4),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "w"], "c", pads=[1] * 4),
        node("Mul", ["c", "steep"], "d"),
        node("Tanh", ["d"], "y"),
    ]
    constants = {"w": weights(64, 64, 3, 3), "steep": np.float32(1e5)}
    shape = {"x": [1, 64, 24, 24]}
    net = model(nodes, shape, {"y": [1, 64, 24, 24]}, constants)
    made = qdq.quantize(net, feeds(shape, 6))
    assert fused_ops(made)["QLinearConv"] == 2


def table_rows() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A network of table rows in units from thousandths to 100,000, all of which count the same."""
    units = np.logspace(-3, 5, 64).astype(np.float32)
    nodes = [
        node("Gemm", ["x", "w"], "a"),
        node("Relu", ["a"], "b"),
        node("Gemm", ["b", "v"], "y"),
    ]
    constants = {"w": weights(64, 256) / units[:, None], "v": weights(256, 64)}
    net = model(nodes, {"x": [64, 64]}, {"y": [64, 64]}, constants)
    return net, [{"x": f["x"] * units} for f in feeds({"x": [64, 64]}, 6)]


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({"calibrator": qdq.MinMax(), "scheme": qdq.Scheme(smooth=False)}, True),
        ({"worth": 0.0, "scheme": qdq.Scheme(smooth=False)}, True),
        ({"target_latency": 1e-3, "scheme": qdq.Scheme(smooth=False)}, True),
        ({"target": PORTABLE, "scheme": qdq.Scheme(smooth=False)}, True),
        ({"calibrator": qdq.MinMax()}, False),  # smoothing saves it
        ({"worth": 0.0}, False),
        ({"scheme": qdq.Scheme(smooth=False)}, False),  # and so does the choice of the plan
        ({"measured": True, "scheme": qdq.Scheme(smooth=False)}, False),
    ],
)
def test_what_is_lost_is_told(
    options: dict[str, Any],
    lost: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_nodes(monkeypatch)
    net, data = table_rows()
    made = qdq.quantize(net, data, **options)
    assert (compare(net, made, data).sqnr < 3) == lost
    told = [r.getMessage() for r in caplog.records if "the outputs are lost" in r.getMessage()]
    assert len(told) == lost
    assert all("has 100 % of their energy" in t and "Rule(nodes=" in t for t in told)


def test_large_models_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, data = table_rows()
    options = {"calibrator": qdq.MinMax(), "scheme": qdq.Scheme(smooth=False)}
    for room, told in ((1 << 20, True), (1 << 10, False)):
        caplog.clear()
        monkeypatch.setattr(choice, "_LARGE", room)
        qdq.quantize(net, data, **options)
        assert ("the outputs are lost" in caplog.text) == told


def test_outputs_that_cannot_be_looked_at_are_no_obstacle() -> None:
    nodes = [node("Conv", ["x", "w"], "c", pads=[1] * 4), node("ArgMax", ["c"], "y", axis=1)]
    shape = {"x": [1, 64, 24, 24]}
    net = model(nodes, shape, {"y": [1, 1, 24, 24]}, {"w": weights(64, 64, 3, 3)})
    net.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    made = qdq.quantize(net, feeds(shape, 2), calibrator=qdq.MinMax())
    assert any(n.op_type == "QuantizeLinear" for n in made.graph.node)


def test_numbers_of_numpy_are_numbers() -> None:
    for number in (np.float32(1), np.float64(1), np.int64(1)):
        for option in ("worth", "target_sqnr", "target_latency"):
            assert Wish(**{option: number}) == Wish(**{option: 1.0})
    net, data = detector(), feeds(SHAPE, 2)
    assert qdq.quantize(net, data, worth=np.float32(1)) == qdq.quantize(net, data, worth=1)


def by_nodes(monkeypatch: pytest.MonkeyPatch, least: float = 0.0) -> list[int]:
    """Let each quantized node take a hundredth off the latency; the calls are returned."""
    calls: list[int] = []

    def timed(a: onnx.ModelProto, b: onnx.ModelProto, feed: Any, *, seconds: float) -> Latency:
        integer = sum(n.op_type == "QuantizeLinear" for n in a.graph.node)
        assert not any(n.op_type == "QuantizeLinear" for n in b.graph.node)
        calls.append(integer)
        ratio = max(1 - integer / 100, least)
        return Latency(ratio, 1, ratio, (0, 0), (0, 0), (0, 0))

    monkeypatch.setattr(choice, "paired_latency", timed)
    return calls


def placement(model: onnx.ModelProto) -> dict[str, Any]:
    (text,) = (p.value for p in model.metadata_props if p.key == "qdq.recipe")
    found: dict[str, Any] = json.loads(text)["placement"]
    return found


def test_a_budget_takes_the_most_accurate_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, data = by_nodes(monkeypatch), feeds(SHAPE, 3)
    results = [run(detector(), data, target_latency=t) for t in (5.0, 0.99, 0.95)]
    sizes = [len(r.plan.quantized) for r in results]
    assert sizes[0] == 0  # the float model is fast enough
    assert sizes == sorted(sizes)
    assert sizes[-1] > 0
    assert len(calls) <= 12
    chosen = placement(results[-1].model)
    assert chosen["by"] == "noise"
    # the worth that was found gives the same bytes, without any timing
    again = qdq.quantize(detector(), data, worth=chosen["worth"])
    same = (m.SerializeToString(deterministic=True) for m in (again, results[-1].model))
    assert len(set(same)) == 1


def test_a_budget_that_no_plan_meets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qdq")
    by_nodes(monkeypatch, least=0.9)
    data = feeds(SHAPE, 3)
    result = run(detector(), data, target_latency=0.1)
    assert result.plan.quantized == run(detector(), data, worth=0.0).plan.quantized
    assert "no plan reaches target_latency=0.1" in caplog.text


def test_a_budget_is_timed() -> None:
    model, data = detector(), feeds(SHAPE, 3)
    before = model.SerializeToString()
    assert not run(model, data, target_latency=100.0).plan.quantized
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "wish", [{"target_latency": 0.5}, {"target_sqnr": 30.0}, {"measured": True}, {"worth": 1.0}]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": qdq.MinMax()}, "keeps histograms"),
        ({"target": qdq.targets.PORTABLE}, "weighs costs"),
    ],
)
def test_a_wish_wants_errors_to_weigh(
    wish: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(qdq.ConfigError, match=message):
        run(detector(), feeds(SHAPE, 2), **wish, **options)


def test_statistics_have_no_sample_to_time() -> None:
    with pytest.raises(qdq.ConfigError, match="give calibration data"):
        qdq.quantize(detector(), statistics="stats.npz", target_latency=0.5)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"worth": 2}, {"by": "noise", "worth": 2.0}),
        ({"target_sqnr": 2.0}, {"by": "noise", "worth": 0.0}),
        ({"calibrator": qdq.MinMax()}, {"by": "elements"}),
    ],
)
def test_the_metadata_say_by_what(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert placement(qdq.quantize(detector(), feeds(SHAPE, 4), **options)) == wanted


@pytest.mark.parametrize("wish", [{}, {"measured": True}, {"target_sqnr": 40.0}])
def test_the_worth_that_was_chosen_gives_the_same_bytes(wish: dict[str, Any]) -> None:
    data = feeds(SHAPE, 6)
    made = qdq.quantize(detector(), data, **wish)
    assert placement(made)["worth"] > 0
    again = qdq.quantize(detector(), data, worth=placement(made)["worth"])
    assert len({m.SerializeToString(deterministic=True) for m in (made, again)}) == 1


@pytest.mark.parametrize(("dtype", "warned"), [(qdq.INT8, 1), (qdq.UINT8, 0)])
def test_types_that_x86_has_few_kernels_for(
    dtype: Any, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qdq")
    scheme = qdq.Scheme(activation=qdq.QuantSpec(dtype=dtype))
    qdq.quantize(detector(), feeds(SHAPE), scheme=scheme)
    assert sum("int8 activations" in r.message for r in caplog.records) == warned
