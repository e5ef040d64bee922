"""quantize(measured=..., target_sqnr=...): placement by measured harm."""

import logging

import numpy as np
import pytest
from harness import compare
from models import feeds, model, node, weights

import qdq
from qdq.api import run

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


def test_statistics_cannot_be_measured_on() -> None:
    stats = run  # any value: the check comes first
    with pytest.raises(qdq.ConfigError, match="not statistics"):
        qdq.quantize(net(), statistics=stats, target_sqnr=30.0)  # type: ignore[arg-type]
    with pytest.raises(qdq.ConfigError, match="finite"):
        qdq.quantize(net(), feeds(SHAPE, count=2), target_sqnr=np.nan)
