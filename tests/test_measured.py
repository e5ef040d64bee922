"""quantize(measured=..., target_sqnr=...): placement by measured harm."""

import logging
from typing import Any

import numpy as np
import onnx
import pytest
from harness import compare
from models import feeds, model, node, weights

import qdq
from qdq.api import run
from qdq.emit import emit
from qdq.session import open_session

SHAPE = {"x": [1, 64, 40, 40]}


def net():
    """Conv, Sigmoid, Mul, three times: float is possible everywhere at some price."""
    nodes, constants, last = [], {}, "x"
    for k in range(3):
        constants[f"w{k}"] = weights(64, 64, 3, 3, seed=k)
        nodes += [
            node("Conv", [last, f"w{k}"], f"c{k}", pads=[1] * 4),
            node("Sigmoid", [f"c{k}"], f"g{k}"),
            node("Mul", [f"c{k}", f"g{k}"], f"s{k}"),
        ]
        last = f"s{k}"
    return model(nodes, SHAPE, {last: SHAPE["x"]}, constants)


def test_a_higher_target_is_met_by_fewer_integer_nodes() -> None:
    data = feeds(SHAPE, count=6)
    low, high = (run(net(), data, target_sqnr=t) for t in (20.0, 45.0))
    assert set(high.plan.quantized) < set(low.plan.quantized)
    found = [compare(net(), r.model, feeds(SHAPE, count=3, seed=9)).sqnr for r in (low, high)]
    assert found[0] > 20
    assert found[1] > 43
    assert found[1] > found[0]


def test_the_best_value_is_deterministic_in_any_order() -> None:
    data = feeds(SHAPE, count=5)
    made = [
        qdq.quantize(net(), order, measured=True).SerializeToString(deterministic=True)
        for order in (data, data[::-1])
    ]
    assert made[0] == made[1]


def test_a_target_that_only_float_reaches_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "qdq")
    result = run(net(), feeds(SHAPE, count=4), target_sqnr=500.0)
    assert not result.plan.quantized
    assert "only the float model reaches target_sqnr=500.0" in caplog.text


def test_the_float_model_is_among_the_plans_where_little_is_foretold() -> None:
    """Bytes are no rounding, so no harm is foretold; the weights have some all the same."""
    net = model([node("Gemm", ["x", "w"], "y")], {"x": [32, 784]}, {"y": [32, 512]},
                {"w": weights(784, 512)})  # fmt: skip
    r = np.random.default_rng(0)
    data = [{"x": r.integers(0, 256, (32, 784)).astype(np.float32)} for _ in range(4)]
    assert run(net, data, target_sqnr=40.0).plan.quantized
    assert not run(net, data, target_sqnr=60.0).plan.quantized
    assert run(net, data).plan.quantized


def test_statistics_cannot_be_measured_on() -> None:
    with pytest.raises(qdq.ConfigError, match="not statistics"):
        qdq.quantize(net(), statistics="absent.npz", target_sqnr=30.0)  # the check comes first
    with pytest.raises(qdq.ConfigError, match="finite"):
        qdq.quantize(net(), feeds(SHAPE, count=2), target_sqnr=np.nan)


def quiet_means() -> onnx.ModelProto:
    """Mean of |c| over positions, where one channel is so loud that the others round to 0."""
    w = weights(64, 64, 3, 3)
    w[0] *= 300
    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1] * 4),
        node("Abs", ["c"], "a"),
        node("GlobalAveragePool", ["a"], "y"),
    ]
    return model(nodes, SHAPE, {"y": [1, 64, 1, 1]}, {"w": w})


def test_an_error_that_nobody_foretold_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """Rounding to 0 is no noise that averages out, as gradients take it to be."""
    caplog.set_level(logging.INFO, "qdq")
    net, data = quiet_means(), feeds(SHAPE, count=4)
    result = run(net, data)
    assert "of 2 plans" in caplog.text
    assert "Conv_c" not in result.plan.quantized
    assert compare(net, result.model, data).sqnr > 60
    # who sets the balance gets it
    asked = run(net, data, worth=0.0)
    assert "Conv_c" in asked.plan.quantized
    assert asked.harm["c"] < 0.1


def test_what_was_foretold_well_is_not_measured_further(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qdq")
    result = run(net(), feeds(SHAPE, count=4))
    assert result.plan.quantized
    assert "of the signal, foretold" in caplog.text
    assert "measured" not in caplog.text


def test_a_range_that_a_rule_sets_may_err() -> None:
    rule = qdq.Rule(tensors="s1", range=(-0.3, 0.05))
    result = run(net(), feeds(SHAPE, count=4), scheme=qdq.Scheme(rules=(rule,)))
    assert "Conv_c2" in result.plan.quantized


def with_logits() -> onnx.ModelProto:
    """The same in front of a softmax: it is judged by what the softmax reads, too."""
    made = net()
    made.graph.node.append(node("Softmax", ["s2"], "p", axis=1))
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_tensor_value_info("p", 1, SHAPE["x"]))
    return made


@pytest.mark.parametrize(("source", "opened"), [(net, 0), (with_logits, 1)])
def test_what_has_run_as_it_is_is_not_opened_again(
    source: Any, opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a model takes as long as to run it ten times."""
    made: list[onnx.ModelProto] = []

    def opening(given: onnx.ModelProto) -> Any:
        made.append(given)
        return open_session(given)

    monkeypatch.setattr("qdq.verify.open_session", opening)
    result = run(source(), feeds(SHAPE, count=4))
    assert result.plan.quantized
    assert len(made) == opened
    # what is chosen by runs of other samples is opened
    run(source(), feeds(SHAPE, count=4), target_sqnr=10.0)
    assert len(made) == opened + 1


def test_what_does_not_run_is_a_fault_of_qdq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is noticed first."""

    def broken(*given: Any, **more: Any) -> onnx.ModelProto:
        made = emit(*given, **more)
        made.graph.node[-1].input[0] = "nothing"
        return made

    monkeypatch.setattr("qdq.choice.emit", broken)
    with pytest.raises(qdq.VerifyError, match="fault in qdq"):
        run(net(), feeds(SHAPE, count=4))
