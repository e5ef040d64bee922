"""Smoothing: outlier channels of a product's input move into its weights."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from harness import FORCED, compare, fused_ops, run, sqnr
from hypothesis import given
from hypothesis import strategies as st
from models import feeds, model, node, weights

import qdq
from qdq.affine import fake_quantize, params_from_range
from qdq.api import collect_statistics
from qdq.api import run as quantize_run
from qdq.balancing.balance import divided_moments
from qdq.balancing.dividing import divided
from qdq.balancing.layouts import divisible
from qdq.balancing.smoothing import Smoothing, find_smoothing
from qdq.calibrate.moments import Layout, MomentSums
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.problem import Moments
from qdq.ranges import TensorRange
from qdq.spec import INT8, UINT8, QuantSpec
from qdq.targets import PORTABLE

WIDTH = 256
SHAPE = {"x": [64, WIDTH]}
ACTIVATION, WEIGHT = QuantSpec(dtype=UINT8), QuantSpec(dtype=INT8, symmetric=True, axis=1)


def gains() -> np.ndarray:
    """A normalization's gains: three channels are far larger than the others."""
    g = np.ones(WIDTH, np.float32)
    g[[3, 70, 200]] = 60.0, 90.0, 40.0
    return g


def block() -> onnx.ModelProto:
    """LayerNormalization → two products that read it, and a residual path past them."""
    nodes = [
        node("LayerNormalization", ["x", "gain", "offset"], "n"),
        node("MatMul", ["n", "w0"], "a"),
        node("Add", ["a", "b0"], "ab"),
        node("MatMul", ["n", "w1"], "c"),
        node("Tanh", ["c"], "t"),
        node("Mul", ["ab", "t"], "y"),
        node("Add", ["n", "y"], "z"),
    ]
    rows = 1 / gains()[:, None]  # the model was trained with them
    constants = {
        "gain": gains(),
        "offset": np.zeros(WIDTH, np.float32),
        "w0": rows * weights(WIDTH, WIDTH, seed=0),
        "w1": rows * weights(WIDTH, WIDTH, seed=1),
        "b0": weights(WIDTH, seed=2),
    }
    return model(nodes, SHAPE, {"y": SHAPE["x"], "z": SHAPE["x"]}, constants)


def samples(count: int, seed: int = 3) -> list[dict[str, np.ndarray]]:
    r = np.random.default_rng(seed)
    return [{"x": r.standard_normal(SHAPE["x"]).astype(np.float32)} for _ in range(count)]


def smoothing_of(result: qdq.api.Result) -> list[dict[str, object]]:
    props = {p.key: p.value for p in result.model.metadata_props}
    found: list[dict[str, object]] = json.loads(props["qdq.smoothed"])
    return found


# -- the search -------------------------------------------------------------------------------


def case(seed: int, outliers: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    x, w = r.standard_normal((400, 32)), r.standard_normal((32, 24))
    x[:, :outliers] *= 50
    w[:outliers] /= 50
    return (scale * x).astype(np.float32), w.astype(np.float32)


def found_for(x: np.ndarray, w: np.ndarray) -> tuple[Smoothing | None, float, float]:
    """The smoothing, and the error of the products without and with it."""
    reach = TensorRange(x.min(0), x.max(0))

    def error(divisors: np.ndarray, range_: TensorRange) -> float:
        a = fake_quantize(x / divisors, params_from_range(range_, ACTIVATION))
        by_column = (w * divisors[:, None]).astype(np.float32)
        top = np.abs(by_column).max(0)
        spec = QuantSpec(dtype=INT8, symmetric=True, axis=1)
        b = fake_quantize(by_column, params_from_range(TensorRange(-top, top), spec))
        return float(np.mean((a.astype(np.float64) @ b - x.astype(np.float64) @ w) ** 2))

    plain = params_from_range(TensorRange.of(x), ACTIVATION)
    noise = float(np.mean((fake_quantize(x, plain) - x).astype(np.float64) ** 2))
    energy = float(np.mean(x.astype(np.float64) ** 2))
    smoothing = find_smoothing(reach, [w], ACTIVATION, WEIGHT, noise, energy)
    before = error(np.ones(len(w), np.float32), TensorRange.of(x))
    after = error(smoothing.divisors, smoothing.range) if smoothing is not None else before
    return smoothing, before, after


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_expected_error_is_the_error(seed: int, outliers: int) -> None:
    smoothing, before, after = found_for(*case(seed, outliers))
    assert smoothing is not None
    assert after < 0.1 * before
    assert smoothing.error == pytest.approx(after / before, rel=0.5)
    mantissa, _ = np.frexp(smoothing.divisors)
    assert (mantissa == 0.5).all()


def test_even_channels_are_left_alone() -> None:
    assert found_for(*case(1, 0))[0] is None


@given(st.integers(-30, 30))
def test_units_do_not_matter(exponent: int) -> None:
    a, b = (found_for(*case(5, 2, s))[0] for s in (1.0, 2.0**exponent))
    assert a is not None
    assert b is not None
    assert b.error == pytest.approx(a.error, rel=1e-6)
    assert b.alpha == a.alpha
    assert np.array_equal(a.divisors, b.divisors)


def test_dead_channels_and_rows() -> None:
    x, w = case(7, 2)
    x[:, 9], w[11] = 0, 0
    smoothing, before, after = found_for(x, w)
    assert smoothing is not None
    assert np.isfinite(smoothing.divisors).all()
    assert after < 0.2 * before
    assert found_for(np.zeros_like(x), w)[0] is None
    assert found_for(x, np.zeros_like(w))[0] is None


def test_no_channel_is_divided_or_multiplied_by_more_than_4096() -> None:
    """What one enormous channel and a dead one ask for; weights would leave their float type."""
    x, w = case(7, 1, scale=2.0**-30)
    x[:, 0] *= 2.0**40
    x[:, 9] = 0
    smoothing = found_for(x, w)[0]
    assert smoothing is not None
    assert (smoothing.divisors.max(), smoothing.divisors[0]) == (4096, 4096)
    assert (smoothing.divisors.min(), smoothing.divisors[9]) == (1 / 4096, 1 / 4096)


# -- the model --------------------------------------------------------------------------------


def test_dividing_changes_no_bit() -> None:
    prepared = prepare(block())
    plan = make_plan(prepared)
    readers = divisible(prepared, plan)
    assert [sorted(n.node for n in ns) for ns in readers.values()] == [["MatMul_a", "MatMul_c"]]
    exponents = np.random.default_rng(0).integers(-6, 7, WIDTH)
    divisors = {t: np.exp2(exponents).astype(np.float32) for t in readers}
    before = prepared.SerializeToString(deterministic=True)
    found, names = divided(prepared, {t: [n.node for n in ns] for t, ns in readers.items()},
                           divisors)  # fmt: skip
    assert prepared.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found, full_check=True)
    assert len(names) == 1
    for a, b in zip(run(prepared, samples(2), fused=False), run(found, samples(2), fused=False),
                    strict=True):  # fmt: skip
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_outlier_channels_cost_nothing_any_more() -> None:
    exact, data = block(), samples(6)
    results = {
        smooth: quantize_run(exact, data, scheme=qdq.Scheme(smooth=smooth), worth=0.0)
        for smooth in (False, True)
    }
    plain, smooth = (compare(exact, r.model, samples(3, seed=8)) for r in results.values())
    assert plain.sqnr < 25
    assert smooth.sqnr > plain.sqnr + 12
    assert sqnr(smooth.unfused, smooth.fused) > smooth.sqnr + 5
    kernels = {"QGemm", "MatMulIntegerToFloat"}
    counts = [sum(n for op, n in c.ops.items() if op in kernels) for c in (plain, smooth)]
    assert counts == [2, 2]
    assert smoothing_of(results[False]) == []
    (entry,) = smoothing_of(results[True])
    assert sorted(entry["nodes"]) == ["MatMul_a", "MatMul_c"]
    assert float(entry["error"]) < 0.1


def test_smoothing_saves_products_from_staying_float() -> None:
    exact, data = block(), samples(6)
    plans = [
        quantize_run(exact, data, scheme=qdq.Scheme(smooth=s)).plan.quantized for s in (False, True)
    ]
    assert len(plans[1]) >= len(plans[0])
    assert {"MatMul_a", "MatMul_c"} <= set(plans[1])


@pytest.mark.parametrize("calibrator", [qdq.MinMax(), qdq.Entropy(), qdq.MSE()], ids=repr)
def test_any_calibrator(calibrator: object) -> None:
    result = quantize_run(block(), samples(4), calibrator=calibrator)
    assert len(smoothing_of(result)) == 1
    assert compare(block(), result.model, samples(2, seed=8)).sqnr > 30


def test_order_and_saved_statistics_change_nothing(tmp_path) -> None:
    exact, data = block(), samples(5)
    path = tmp_path / "found.npz"
    collect_statistics(exact, data).save(path)
    made = [qdq.quantize(exact, data), qdq.quantize(exact, data[::-1])]
    made.append(qdq.quantize(exact, statistics=path))
    assert len({m.SerializeToString(deterministic=True) for m in made}) == 1


def test_moments_are_those_of_the_divided_tensor() -> None:
    x = np.random.default_rng(2).standard_normal((50, 10)).astype(np.float32)
    divisors = np.exp2(np.arange(10) % 4).astype(np.float32)
    layout = Layout(tensor="x", channels=10, blocks=3)  # the last block is filled up

    def moments(values: np.ndarray) -> Moments:
        found = MomentSums([layout])
        found.add({"x": values})
        return found.sums[layout].moments

    a, b = divided_moments(moments(x), divisors), moments(x / divisors)
    # streamed moments are rounded, so that any order gives the same
    assert np.allclose(a.second, b.second, atol=5e-3)
    assert np.allclose(a.mean, b.mean, atol=5e-3)


def test_a_target_of_accuracy_is_met_with_smoothing() -> None:
    exact, data = block(), samples(6)
    measured = quantize_run(exact, data, target_sqnr=25.0)
    assert smoothing_of(measured)
    assert compare(exact, measured.model, samples(3, seed=8)).sqnr > 24


def test_compare_sees_through_it() -> None:
    exact, data = block(), samples(4)
    result = quantize_run(exact, data)
    report = qdq.compare(exact, result.model, data, repeats=2, advise=1)
    rows = {t.name: t for t in report.tensors}
    (divided_name,) = (n for n in rows if n.endswith("_divided"))
    assert rows[divided_name].rounding_db > 30
    assert rows["w0"].rounding_db > 30
    assert not any("_divided" in a.rule + a.what for a in report.advice)
    assert not any("namesake" in note for note in report.notes)


def test_peaks_that_differ_by_chance_are_not_followed() -> None:
    """Like channels with heavy tails: their peaks on calibration data say little."""

    def heavy(count: int, seed: int) -> list[dict[str, np.ndarray]]:
        return [{"x": f["x"] ** 3} for f in samples(count, seed)]

    nodes = [node("Tanh", ["x"], "t"), node("MatMul", ["x", "w"], "p"),
             node("Mul", ["p", "t"], "y")]  # fmt: skip
    exact = model(nodes, SHAPE, {"y": SHAPE["x"]}, {"w": weights(WIDTH, WIDTH, seed=4)})
    found = [
        compare(
            exact,
            qdq.quantize(exact, heavy(2, 1), scheme=qdq.Scheme(smooth=s), worth=0.0),
            heavy(8, 2),
        ).sqnr
        for s in (False, True)
    ]
    assert found[1] > found[0] - 0.3


def test_one_scale_for_the_weight_leaves_less_room() -> None:
    x, w = case(3, 2)
    w[0, 0] = 1.0  # one large weight beside an outlier channel
    reach = TensorRange(x.min(0), x.max(0))
    plain = params_from_range(TensorRange.of(x), ACTIVATION)
    noise, energy = float(plain.scale) ** 2 / 12, float(np.mean(x.astype(np.float64) ** 2))
    whole = QuantSpec(dtype=INT8, symmetric=True)
    by_column, by_tensor = (
        find_smoothing(reach, [w], ACTIVATION, spec, noise, energy) for spec in (WEIGHT, whole)
    )
    assert by_column is not None
    assert by_tensor is None or by_tensor.error > 2 * by_column.error
    exact, data = block(), samples(4)
    for smooth in (False, True):
        scheme = qdq.Scheme(smooth=smooth, per_channel=False)
        found = compare(exact, qdq.quantize(exact, data, scheme=scheme), samples(2, seed=8)).sqnr
        assert found > (4 if not smooth else 30)


# -- where it is not done ---------------------------------------------------------------------


def tensors_divided(exact: onnx.ModelProto, **options: object) -> int:
    options = {"worth": 0.0, **options}
    return len(smoothing_of(quantize_run(exact, samples(4), **options)))


def test_what_a_rule_sets_is_not_divided() -> None:
    prepared = prepare(block())
    (name,) = divisible(prepared, make_plan(prepared))
    scheme = qdq.Scheme(rules=(qdq.Rule(tensors=name, range=(-300.0, 300.0)),))
    assert tensors_divided(block(), scheme=scheme) == 0
    scheme = qdq.Scheme(rules=(qdq.Rule(tensors="w0", per_channel=False),))
    assert tensors_divided(block(), scheme=scheme) == 0


def test_smooth_is_yes_or_no() -> None:
    with pytest.raises(qdq.ConfigError, match="True or False"):
        qdq.Scheme(smooth="no")  # type: ignore[arg-type]


def test_a_target_that_divides_integers() -> None:
    assert len(smoothing_of(quantize_run(block(), samples(3), target=PORTABLE))) == 0


def test_a_weight_that_others_read_stays() -> None:
    exact = block()
    for n in exact.graph.node:
        if n.op_type == "MatMul":
            n.input[1] = "w0"  # both read the same tensor, with the same weight
    assert tensors_divided(exact) == 0


def test_the_model_is_not_touched_and_counts_hold() -> None:
    exact = block()
    before = exact.SerializeToString(deterministic=True)
    result = quantize_run(exact, samples(4))
    assert exact.SerializeToString(deterministic=True) == before
    planned = Counter(json.loads({p.key: p.value for p in result.model.metadata_props}
                                 ["qdq.planned"]))  # fmt: skip
    assert planned["Gemm"] + planned["MatMul"] == 2
    assert fused_ops(result.model)["Div"] == 1


def test_a_matrix_without_columns() -> None:
    net = model([node("MatMul", ["x", "w"], "y")], {"x": [2, 3]}, {"y": [2, 0]},
                {"w": np.zeros((3, 0), np.float32)})  # fmt: skip
    assert quantize_run(net, feeds({"x": (2, 3)}), target=FORCED).model.graph.output[0].name == "y"


def test_what_stays_float_in_the_end_is_not_divided() -> None:
    data = samples(4)
    result = quantize_run(block(), data, worth=1e6)
    assert not result.plan.quantized
    assert smoothing_of(result) == []
    assert not any(n.op_type == "Div" for n in result.model.graph.node)
    exact, same = (run(m, data, fused=False) for m in (prepare(block()), result.model))
    for mine, theirs in zip(exact, same, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
