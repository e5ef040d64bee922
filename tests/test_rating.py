"""Placement by the noise in the calibrated histograms."""

import logging
from itertools import pairwise

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, sqnr
from hypothesis import given
from hypothesis import strategies as st
from models import detector, feeds, model, node, weights

import qdq
from qdq.affine import fake_quantize, params_from_range
from qdq.api import collect_statistics, run
from qdq.calibrate import MSE
from qdq.calibrate.noise import relative_noise
from qdq.graph import Graph
from qdq.placement.frontier import HARMS, rounded_by
from qdq.placement.rating import _sigmoid, noise_of
from qdq.placement.wholes import shown_by
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.ranges import Histogram, TensorRange
from qdq.spec import INT8, UINT8, QuantSpec
from qdq.targets import PORTABLE

SHAPE = {"x": [1, 32, 40, 40]}

# -- the noise --------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.05, 0.5, 1.0, 3.0]),
    st.sampled_from([QuantSpec(dtype=UINT8), QuantSpec(dtype=INT8, symmetric=True)]),
)
def test_noise_is_that_of_the_values(seed: int, reach: float, spec: QuantSpec) -> None:
    x = np.random.default_rng(seed).standard_normal(20000).astype(np.float32)
    top = np.float32(reach * np.abs(x).max())
    params = params_from_range(TensorRange(np.asarray(-top), np.asarray(top)), spec)
    error = (fake_quantize(x, params) - x).astype(np.float64)
    found = relative_noise(Histogram.of(x), params)
    assert found == pytest.approx((error @ error) / (x.astype(np.float64) @ x), rel=0.05)


@given(st.integers(-60, 60))
def test_noise_has_no_unit(exponent: int) -> None:
    x = np.random.default_rng(5).standard_normal(3000).astype(np.float32)
    spec = QuantSpec(dtype=UINT8)

    def noise(values: np.ndarray) -> float:
        return relative_noise(Histogram.of(values), params_from_range(TensorRange.of(values), spec))

    assert noise(np.ldexp(x, exponent)) == pytest.approx(noise(x), rel=1e-9)


@pytest.mark.parametrize(
    ("gain", "counts"), [(0.0, 1 / 8), (0.04, 1 / 8), (0.05, 0.4 / 3), (1.0, 8 / 3), (6.0, 16.0)]
)
def test_what_is_felt_counts_8_thirds_and_noise_an_eighth_at_least(
    gain: float, counts: float
) -> None:
    exact = prepare(model([node("Conv", ["x", "w"], "y")], {"x": [1, 4, 4, 4]},
                          {"y": [1, 4, 4, 4]}, {"w": weights(4, 4, 1, 1)}))  # fmt: skip
    plan, x = make_plan(exact, target=FORCED), np.linspace(-1, 2, 10_000, dtype=np.float32)
    known = {"x": TensorRange.of(x)}, {"x": Histogram.of(x)}
    # a step of 3 / 255 against a mean square of 1
    noise = (3 / 255) ** 2 / 12
    assert noise_of(plan, *known)["x"] == pytest.approx(noise, rel=1e-3)
    assert noise_of(plan, *known, {"x": gain})["x"] == pytest.approx(counts * noise, rel=1e-3)
    assert noise_of(plan, *known, {"x": 1e9})["x"] > 1e4  # how far all is lost


@pytest.mark.parametrize("gains", [{}, {"x": 1.0}])
def test_the_rounding_of_an_output_counts_eight_times(gains: dict[str, float]) -> None:
    exact = prepare(model([node("Relu", ["x"], "y")], {"x": [1, 4]}, {"y": [1, 4]}))
    plan, x = make_plan(exact, target=PORTABLE), np.linspace(-1, 2, 10_000, dtype=np.float32)
    known = {"x": TensorRange.of(x)}, {"x": Histogram.of(x)}
    within, shown = noise_of(plan, *known, gains)["x"], noise_of(plan, *known, gains, {"x"})["x"]
    assert shown == pytest.approx(8 * within)


def test_how_far_all_is_lost_tells_whether_smoothing_helps() -> None:
    """Features of unlike units, which the first product divides out: more than smoothing can."""
    units = np.logspace(-6, 8, 16, dtype=np.float32)
    nodes = [
        node("Gemm", ["x", "w0"], "a"),
        node("Relu", ["a"], "b"),
        node("Gemm", ["b", "w1"], "c"),
        node("Relu", ["c"], "d"),
        node("Gemm", ["d", "w2"], "y"),
    ]
    constants = {
        "w0": weights(16, 512, seed=0) / units[:, None],
        "w1": weights(512, 512, seed=1),
        "w2": weights(512, 512, seed=2),
    }
    exact = model(nodes, {"x": [64, 16]}, {"y": [64, 512]}, constants)
    data = [{"x": f["x"] * units} for f in feeds({"x": [64, 16]}, 8)]
    result = run(exact, data)
    assert result.harm["x_divided"] > 0.1
    assert "Gemm_a" in result.plan.left_float
    assert {"Gemm_c", "Gemm_y"} <= set(result.plan.quantized)
    found = compare(exact, result.model, data[:2])
    assert sqnr(found.exact, found.fused) > 30


def test_what_is_in_outputs_one_by_one_is_shown() -> None:
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("Relu", ["a"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 3, 1]),
        node("Reshape", ["c", "to"], "y"),
    ]
    constants = {"w": weights(4, 4, 1, 1), "to": np.array([1, -1])}
    graph = Graph(model(nodes, {"x": [1, 4, 4, 4]}, {"y": [1, 64]}, constants))
    assert shown_by(graph, ["y"]) == {"y", "c", "b"}


def mask(last: str = "Identity") -> onnx.ModelProto:
    """Five classes for each pixel."""
    nodes = [
        node("Conv", ["x", "w0"], "a", pads=[1] * 4),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "w1"], "c", pads=[1] * 4),
        node("Relu", ["c"], "d"),
        node("Conv", ["d", "w2"], "classes"),
        node(last, ["classes"], "y"),
    ]
    constants = {
        "w0": weights(64, 16, 3, 3, seed=0),
        "w1": weights(16, 64, 3, 3, seed=1),
        "w2": weights(5, 16, 1, 1, seed=2),
    }
    shape = [48, 48, 5, 1] if last == "Transpose" else [1, 5, 48, 48]
    return model(nodes, {"x": [1, 16, 48, 48]}, {"y": shape}, constants)


def test_the_last_convolution_of_a_mask_stays_float() -> None:
    """Classes are nearly equal at the edges of things, where its steps would decide."""
    data = feeds({"x": [1, 16, 48, 48]}, 4)
    for last in ("Identity", "Transpose"):
        result = run(mask(last), data)
        assert result.plan.left_float["Conv_classes"] == HARMS
        assert "Conv_c" in result.plan.quantized
        assert "Conv_classes" in run(mask(last), data, worth=0.0).plan.quantized
    assert "Conv_classes" in run(mask("Relu"), data).plan.quantized


def test_zeros_and_a_lost_signal() -> None:
    wide = params_from_range(
        TensorRange(np.float32([0.0])[0:1].reshape(()), np.float32([1e6]).reshape(())),
        QuantSpec(dtype=UINT8),
    )
    assert relative_noise(Histogram.of(np.zeros(9, np.float32)), wide) == 0
    assert relative_noise(Histogram.of(np.full(9, 0.5, np.float32)), wide) == pytest.approx(1)


# -- what placement makes of it ---------------------------------------------------------------


def test_what_would_be_ruined_stays_float() -> None:
    exact, data = detector(), feeds(SHAPE, 4)
    fastest, default = run(exact, data, worth=0.0), run(exact, data)
    assert "Concat_both" in fastest.plan.quantized
    assert default.plan.left_float["Concat_both"] == HARMS
    assert set(default.plan.quantized) < set(fastest.plan.quantized)
    assert len(default.plan.quantized) >= 3  # the convolutions, with their Relu

    def scores(m: onnx.ModelProto) -> float:
        found = compare(exact, m, feeds(SHAPE, 2, seed=7))
        return sqnr(*(y.reshape(2, 128, -1)[:, 64:] for y in (found.exact, found.fused)))

    assert scores(fastest.model) < 20
    assert scores(default.model) > 35


def test_the_harm_of_each_rounding_is_told() -> None:
    result = run(detector(), feeds(SHAPE, 4))
    assert max(result.harm, key=result.harm.__getitem__) in ("both", "y")
    assert all(0 <= h <= 1 for h in result.harm.values())
    assert rounded_by(result.plan) <= set(result.harm)
    assert run(detector(), feeds(SHAPE, 4), calibrator=qdq.MinMax()).harm == {}


def test_a_higher_worth_leaves_more_float() -> None:
    exact, data = detector(), feeds(SHAPE, 4)
    plans = [set(run(exact, data, worth=w).plan.quantized) for w in (0.0, 8.0, 1e3, 1e9)]
    assert all(b <= a for a, b in pairwise(plans))
    assert not plans[-1]


def test_the_order_of_samples_and_saved_statistics_change_nothing() -> None:
    exact, data = detector(), feeds(SHAPE, 5)
    found = collect_statistics(exact, data)
    made = [qdq.quantize(exact, data), qdq.quantize(exact, data[::-1])]
    made.append(qdq.quantize(exact, statistics=found))
    assert len({m.SerializeToString(deterministic=True) for m in made}) == 1


def test_minmax_has_no_histogram_and_pays_by_the_element() -> None:
    exact, data = detector(), feeds(SHAPE, 3)
    assert HARMS not in run(exact, data, calibrator=qdq.MinMax()).plan.left_float.values()
    with pytest.raises(qdq.ConfigError, match="keeps histograms"):
        run(exact, data, calibrator=qdq.MinMax(), worth=1.0)
    with pytest.raises(qdq.ConfigError, match="weighs costs"):
        run(exact, data, target=PORTABLE, worth=1.0)


def test_a_calibrator_of_ones_own_with_histograms_is_rated() -> None:
    class Mine(MSE):
        pass

    result = run(detector(), feeds(SHAPE, 3), calibrator=Mine())
    assert result.plan.left_float["Concat_both"] == HARMS


@pytest.mark.parametrize("worth", [-1.0, float("nan"), float("inf"), "8"])
def test_an_impossible_worth(worth: float) -> None:
    with pytest.raises(qdq.ConfigError, match="from 0"):
        run(detector(), feeds(SHAPE, 1), worth=worth)


def test_worth_and_a_target_exclude_each_other() -> None:
    with pytest.raises(qdq.ConfigError, match="give one of them"):
        run(detector(), feeds(SHAPE, 2), worth=1.0, target_sqnr=30.0)


def test_what_a_rule_sets_has_no_price() -> None:
    exact, data = detector(), feeds(SHAPE, 3)
    rule = qdq.Rule(tensors="both|y", range=(-500.0, 500.0))
    assert "Concat_both" in run(exact, data, scheme=qdq.Scheme(rules=(rule,))).plan.quantized


def test_a_rule_for_what_stays_float_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "qdq")
    rule = qdq.Rule(tensors="r", range=(0.0, 5.0))
    result = run(detector(), feeds(SHAPE, 3), scheme=qdq.Scheme(rules=(rule,)), worth=1e9)
    assert not result.plan.quantized
    assert "rules for tensor 'r' do nothing" in caplog.text


# -- what need not be observed ----------------------------------------------------------------


def test_a_mapped_histogram_is_that_of_the_mapped_values() -> None:
    x = np.random.default_rng(4).normal(-3, 2, 50_000).astype(np.float32)
    y = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    spec = QuantSpec(dtype=UINT8)
    unit = params_from_range(TensorRange(np.asarray(0.0), np.asarray(1.0)), spec)
    found = Histogram.of(x).mapped(_sigmoid)
    assert found.counts.sum() == x.size
    exact = relative_noise(Histogram.of(y), unit)
    assert relative_noise(found, unit) == pytest.approx(exact, rel=0.02)
    for values in ([-1e30, 3e30], [-2000.0], [0.0], [900.0, 1000.0]):  # no overflow, no empty bin
        extreme = Histogram.of(np.float32(values)).mapped(_sigmoid)
        assert extreme.counts.sum() == len(values)
        assert 0 <= relative_noise(extreme, unit) <= 1


def test_results_of_sigmoid_and_movement_are_not_observed() -> None:
    shape = {"x": [1, 32, 80, 80]}
    nodes = [
        node("Conv", ["x", "w0"], "c", pads=[1] * 4),
        node("Sigmoid", ["c"], "s"),
        node("Mul", ["c", "s"], "m"),
        node("MaxPool", ["m"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w1"], "y", pads=[1] * 4),
    ]
    constants = {"w0": weights(32, 32, 3, 3, seed=0), "w1": weights(32, 32, 3, 3, seed=1)}
    exact = model(nodes, shape, {"y": [1, 32, 40, 40]}, constants)
    data = feeds(shape, 4)
    wide = run(exact, data, worth=0.0)
    assert {"Sigmoid_s", "Mul_m", "MaxPool_p"} <= set(wide.plan.quantized)
    assert sorted(collect_statistics(exact, data).tensors) == ["c", "m", "x", "y"]
    for worth in (0.0, 8.0, 300.0):  # at some of these the pool is float and p has its own codes
        result = run(exact, data, worth=worth)
        assert compare(exact, result.model, feeds(shape, 2, seed=9)).sqnr > 30


def test_the_order_of_samples_of_different_sizes_does_not_matter() -> None:
    nodes = [
        node("Conv", ["x", "w0"], "c", pads=[1] * 4),
        node("Relu", ["c"], "r"),
        node("Conv", ["r", "w1"], "d", pads=[1] * 4),
        node("Add", ["c", "d"], "y"),
    ]
    constants = {f"w{k}": weights(32, 32, 3, 3, seed=k) for k in range(2)}
    open_shape = [1, 32, "height", "width"]
    exact = model(nodes, {"x": open_shape}, {"y": open_shape}, constants)
    data = [feed for side in (2, 64, 8) for feed in feeds({"x": [1, 32, side, side]}, 2, seed=side)]
    made = [qdq.quantize(exact, order) for order in (data, data[::-1], data[2:] + data[:2])]
    assert len({m.SerializeToString(deterministic=True) for m in made}) == 1
    small = qdq.quantize(exact, iter(data))  # its first sample says that nothing pays
    assert small.SerializeToString(deterministic=True) != made[0].SerializeToString(
        deterministic=True
    )
