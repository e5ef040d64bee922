"""Equalization across layers: quiet channels of an activation grow, at no cost."""

import json

import numpy as np
import onnx
import pytest
from chains import Net, between, samples
from harness import FORCED, compare, sqnr
from hypothesis import given
from hypothesis import strategies as st

import qdq
from qdq.affine import fake_quantize, params_from_range
from qdq.api import Result, collect_statistics
from qdq.api import run as quantize_run
from qdq.balancing.channels import channel_groups
from qdq.balancing.dividing import divided_like
from qdq.balancing.equalizing import Equalization, Reading, find_equalization
from qdq.plan import make_plan
from qdq.prepare import prepare
from qdq.ranges import TensorRange
from qdq.solve import Step
from qdq.spec import INT8, UINT8, QuantSpec
from qdq.stages import begin, gather, learn
from qdq.steps import DEFAULT_STEPS, FitWeightScales, RoundWeights

ACTIVATION, WEIGHT = QuantSpec(dtype=UINT8), QuantSpec(dtype=INT8, symmetric=True, axis=0)
COLUMNS = QuantSpec(dtype=INT8, symmetric=True, axis=1)

# -- the search -------------------------------------------------------------------------------


def case(seed: int, quiet: float, channels: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """What a Relu hands out, all channels but two ``quiet`` times smaller, and weights (C, N)."""
    r = np.random.default_rng(seed)
    x = np.maximum(r.standard_normal((500, channels)), 0)
    w = r.standard_normal((channels, 12))
    x[:, 2:] /= quiet
    w[2:] *= quiet
    return x.astype(np.float32), w.astype(np.float32)


def reading(x: np.ndarray, w: np.ndarray | None = None, **changes: object) -> Reading:
    found = TensorRange.of(x)
    settings = {
        "tensor": "x",
        "reach": TensorRange(x.min(0), x.max(0)),
        "scale": float(params_from_range(found, ACTIVATION).scale),
        "range": found,
        "energy": float(np.mean(x.astype(np.float64) ** 2)),
        "weight": None if w is None else w[:, :, None],
        "weight_spec": None if w is None else WEIGHT,
        **changes,
    }
    return Reading(**settings)


def product_error(x: np.ndarray, w: np.ndarray, factors: np.ndarray) -> float:
    """Error of a matrix product with codes for what has grown."""
    a = fake_quantize(x * factors, params_from_range(TensorRange.of(x), ACTIVATION))
    columns = w / factors[:, None]
    top = np.abs(columns).max(0)
    b = fake_quantize(columns, params_from_range(TensorRange(-top, top), COLUMNS))
    return float(np.mean((a.astype(np.float64) @ b - x.astype(np.float64) @ w) ** 2))


@given(st.integers(0, 10_000), st.floats(8, 30))
def test_the_expected_error_is_the_error(seed: int, quiet: float) -> None:
    x, w = case(seed, quiet)
    found = find_equalization([reading(x, w)])
    assert found is not None
    before, after = (product_error(x, w, f) for f in (np.ones(16, np.float32), found.factors))
    assert after < 0.6 * before
    assert found.error == pytest.approx(after / before, rel=0.5)
    assert found.errors == {"x": found.error}


@given(st.integers(0, 10_000), st.floats(8, 30))
def test_of_a_layer_channel_by_channel_too(seed: int, quiet: float) -> None:
    r = np.random.default_rng(seed)
    x = np.maximum(r.standard_normal((300, 16, 9)), 0).astype(np.float32)
    x[:, 2:] /= np.float32(quiet)
    w = r.standard_normal((16, 9)).astype(np.float32)
    w[2:] *= np.float32(quiet)
    rows = x.transpose(0, 2, 1).reshape(-1, 16)
    found = find_equalization([reading(rows, weight=w[:, None, :], apart=True, weight_spec=WEIGHT)])
    assert found is not None

    def error(factors: np.ndarray) -> float:
        by = factors[:, None]
        a = fake_quantize(x * by, params_from_range(TensorRange.of(x), ACTIVATION))
        top = np.abs(w / by).max(1)
        b = fake_quantize(w / by, params_from_range(TensorRange(-top, top), WEIGHT))
        exact = (x.astype(np.float64) * w).sum(2)
        return float(np.mean(((a.astype(np.float64) * b).sum(2) - exact) ** 2))

    ratio = error(found.factors) / error(np.ones(16, np.float32))
    assert found.error == pytest.approx(ratio, rel=0.5)
    # its scales change with the factors: where the weights make the noise, nothing is gained
    apart = reading(rows, weight=w[:, None, :], apart=True, weight_spec=WEIGHT, scale=1e-6)
    assert find_equalization([apart]) is None


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.booleans())
def test_factors_are_powers_of_two_that_fit(seed: int, spread: float, signed: bool) -> None:
    r = np.random.default_rng(seed)
    x = r.standard_normal((60, 12)) * np.exp(spread * r.uniform(-1, 1, 12) / 20)
    x = (x if signed else np.maximum(x, 0)).astype(np.float32)
    held = TensorRange(x.min() * np.float32(0.3), x.max() * np.float32(0.3))
    w = r.standard_normal((12, 5)).astype(np.float32)
    found = find_equalization([reading(x, w, range=held), reading(x[:40], tensor="y")])
    if found is None:
        return
    mantissa, exponent = np.frexp(found.factors)
    assert found.factors.dtype == np.float32
    assert (mantissa == 0.5).all()
    assert ((exponent >= 1) & (exponent <= 3)).all()
    assert np.array_equal(found.inverse * found.factors, np.ones(12, np.float32))
    assert found.error < 0.5
    # what grows stays inside of the calibrated range, and below half of the largest channel
    large = np.where(found.factors > 1, found.factors, 0)
    assert (large * x.max(0) <= max(0, min(held.high, x.max() / 2))).all()
    assert (large * x.min(0) >= min(0, max(held.low, x.min() / 2))).all()


@given(st.integers(-30, 30), st.integers(-30, 30))
def test_units_do_not_matter(a: int, b: int) -> None:
    x, w = case(5, 9.0)
    plain = find_equalization([reading(x, w)])
    other = find_equalization([reading(np.float32(2.0**a) * x, np.float32(2.0**b) * w)])
    assert plain is not None
    assert other is not None
    assert np.array_equal(plain.factors, other.factors)
    assert other.error == pytest.approx(plain.error, rel=1e-6)


def test_even_channels_are_left_alone() -> None:
    for quiet in (1.0, 1.5, 1.9):
        x, w = case(1, quiet)
        assert find_equalization([reading(x, w)]) is None


def test_one_quiet_channel_of_many_does_not_pay() -> None:
    x, w = case(1, 1.0)
    x[:, 5] /= 10
    assert find_equalization([reading(x, w)]) is None


def test_the_noise_of_the_weights_sets_a_limit() -> None:
    """A growing channel leaves its weights smaller beside those of the others."""
    x, w = case(2, 16.0)
    w[:2], w[2:] = 1, 0.5  # the large channels set the scales of the weights
    assert find_equalization([reading(x, w)]) is not None
    assert find_equalization([reading(x, w, scale=1e-6)]) is None  # as of 16 bits
    w[2:] = 0.01  # the large channels are all that is heard
    assert find_equalization([reading(x, w)]) is None


@pytest.mark.parametrize("spec", [WEIGHT, QuantSpec(dtype=INT8, symmetric=True)], ids=repr)
def test_as_many_taps_as_there_may_be_change_no_ratio(spec: QuantSpec) -> None:
    """Taps of one size have as many times the signal, the noise of x, and that of the weights."""
    x, w = case(2, 16.0)
    w[:2], w[2:] = 1, 0.5  # the noise of the weights counts, see above
    one, nine = (
        find_equalization([reading(x, w, weight=np.repeat(w[:, :, None], n, 2), weight_spec=spec)])
        for n in (1, 9)
    )
    assert one is not None
    assert nine is not None
    assert nine.error == pytest.approx(one.error, rel=1e-9)


def test_silent_channels_are_no_gain() -> None:
    x, w = case(3, 1.0)
    x[:, 4:] = 0
    assert find_equalization([reading(x, w)]) is None
    large = w.copy()
    large[4:] *= 100  # but where their weights set the scales of all
    small = case(3, 10.0)
    small[0][:, 9], small[1][11] = 0, 0
    for values, matrix in ((x, large), small):
        found = find_equalization([reading(values, matrix)])
        assert found is not None
        assert np.isfinite(found.factors).all()
        before = product_error(values, matrix, np.ones(16, np.float32))
        ratio = product_error(values, matrix, found.factors) / before
        assert found.error == pytest.approx(ratio, rel=0.5)


def test_nothing_there() -> None:
    x, w = case(4, 10.0)
    zeros, rows = np.zeros_like(x), reading(np.zeros_like(x), w)
    assert find_equalization([rows]) is None
    assert find_equalization([reading(zeros)]) is None
    assert find_equalization([reading(x, np.zeros_like(w))]) is None
    found = find_equalization([reading(x, w), reading(x, np.zeros_like(w), tensor="y"), rows])
    assert found is not None
    assert found.errors["y"] == 1
    assert np.isfinite(list(found.errors.values())).all()


def test_the_tensor_with_the_least_room_decides() -> None:
    x, w = case(6, 10.0)
    even, _ = case(6, 1.0)
    assert find_equalization([reading(x, w), reading(even, w, tensor="y")]) is None


def test_a_sum_is_felt_as_it_is() -> None:
    x, _ = case(7, 1.0)
    x[:, :1] *= 20  # one channel sets the range of the others
    found = find_equalization([reading(x)])
    assert found is not None
    assert found.factors[0] == 1
    assert set(found.factors[1:]) == {4}
    a, b = (
        np.mean((fake_quantize(x * f, params_from_range(TensorRange.of(x), ACTIVATION)) / f - x)
                .astype(np.float64) ** 2)
        for f in (found.factors, np.ones(16, np.float32))
    )  # fmt: skip
    assert found.error == pytest.approx(a / b, rel=0.5)


def test_one_scale_for_the_weight_leaves_less_room() -> None:
    x, w = case(8, 6.0)
    w[0, 0] = 40.0
    whole = QuantSpec(dtype=INT8, symmetric=True)
    a = find_equalization([reading(x, w)])
    b = find_equalization([reading(x, w, weight_spec=whole)])
    assert a is not None
    assert b is None or b.error > a.error


# -- models -----------------------------------------------------------------------------------

WIDTH = 32


def uneven(seed: int = 0) -> onnx.ModelProto:
    """MobileNet's block, a residual path and a gate; most channels are quiet."""
    net = Net(WIDTH).linear("x", "a").op("Relu", "a", "r").linear("r", "d", apart=True)
    net.op("Relu", "d", "e").linear("e", "b", size=1).op("Add", "r b", "s").linear("s", "f")
    net.op("Relu", "f", "m").linear("m", "y", size=1)
    r = np.random.default_rng(seed)
    exact = prepare(net.model(shape=(1, WIDTH, 12, 12)))
    for group in channel_groups(exact, make_plan(exact, target=FORCED)):
        loud = np.where(np.arange(WIDTH) % 8 == 0, 1, r.uniform(0.02, 0.1, WIDTH))
        for factors, constants in (
            (loud, group.makers),
            (1 / loud, [x.weight for x in group.readers]),
        ):
            for constant in constants:
                _scale(exact, constant.name, constant.axis, factors)
    return exact


def _scale(exact: onnx.ModelProto, name: str, axis: int, factors: np.ndarray) -> None:
    (t,) = (t for t in exact.graph.initializer if t.name == name)
    value = np.moveaxis(onnx.numpy_helper.to_array(t), axis, -1) * factors
    value = np.ascontiguousarray(np.moveaxis(value, -1, axis), np.float32)
    t.CopyFrom(onnx.numpy_helper.from_array(value, name))


def noted(made: onnx.ModelProto) -> list[dict[str, list[object]]]:
    props = {p.key: p.value for p in made.metadata_props}
    found: list[dict[str, list[object]]] = json.loads(props["qdq.equalized"])
    return found


def made(exact: onnx.ModelProto, equalize: bool = True, **settings: object) -> Result:
    settings = {"target": FORCED, **settings}
    scheme = qdq.Scheme(equalize=equalize)
    return quantize_run(exact, samples(exact, 6), scheme=scheme, **settings)


@pytest.mark.parametrize("calibrator", [qdq.MSE(), qdq.MinMax()], ids=repr)
def test_quiet_channels_have_more_codes(calibrator: object) -> None:
    exact = uneven()
    results = [made(exact, e, calibrator=calibrator) for e in (False, True)]
    plain, equal = (compare(exact, r.model, samples(exact, 3, seed=8)) for r in results)
    assert equal.sqnr > plain.sqnr + 6
    assert sqnr(equal.unfused, equal.fused) > equal.sqnr + 5
    assert plain.ops == equal.ops  # nothing is added
    assert noted(results[0].model) == []
    found = noted(results[1].model)
    assert sorted(" ".join(sorted(map(str, e["tensors"]))) for e in found) == [
        "a b r s", "d e", "f m"]  # fmt: skip
    for entry in found:
        assert set(entry["exponents"]) == {0, 2}
        assert entry["exponents"][0] == 0
        assert float(str(entry["error"])) < 0.3


def test_what_moves_values_has_the_scale_of_its_input() -> None:
    net = Net(WIDTH).linear("x", "a").op("Relu", "a", "r")
    net.op("MaxPool", "r", "p", kernel_shape=[2, 2]).linear("p", "y")
    exact = prepare(net.model(shape=(1, WIDTH, 12, 12)))
    loud = np.where(np.arange(WIDTH) == 5, 1, 0.05)
    for name, axis, factors in (("w_a", 0, loud), ("b_a", 0, loud), ("w_y", 1, 1 / loud)):
        _scale(exact, name, axis, factors)
    a, b = (compare(exact, made(exact, e).model, samples(exact, 3, 9)) for e in (False, True))
    assert b.sqnr > a.sqnr + 6
    _scale(exact, "w_y", 1, np.where(loud == 1, 1, 1e-3))  # now nothing hears the others
    assert noted(made(exact).model) == []


def test_with_a_scale_per_tensor() -> None:
    exact = uneven()
    found = []
    for equalize in (False, True):
        scheme = qdq.Scheme(equalize=equalize, per_channel=False)
        result = quantize_run(exact, samples(exact, 4), scheme=scheme, target=FORCED)
        assert bool(noted(result.model)) == equalize
        found.append(compare(exact, result.model, samples(exact, 2, 8)).sqnr)
    assert found[1] > found[0] + 6


def test_order_and_saved_statistics_change_nothing(tmp_path) -> None:
    exact = uneven()
    data, path = samples(exact, 5), tmp_path / "found.npz"
    collect_statistics(exact, data, target=FORCED).save(path)
    found = [qdq.quantize(exact, d, target=FORCED) for d in (data, data[::-1])]
    found.append(qdq.quantize(exact, statistics=path, target=FORCED))
    assert noted(found[0])
    assert len({m.SerializeToString(deterministic=True) for m in found}) == 1


def test_the_model_is_not_touched() -> None:
    exact = uneven()
    before = exact.SerializeToString(deterministic=True)
    made(exact)
    assert exact.SerializeToString(deterministic=True) == before


def test_what_is_known_is_that_of_the_model_that_has_grown() -> None:
    exact, steps = uneven(), (*DEFAULT_STEPS, RoundWeights())
    data, calibrator = samples(exact, 4), qdq.MinMax()

    def learned(m: onnx.ModelProto, equalize: bool):
        scheme = qdq.Scheme(equalize=equalize)
        start = begin(m, data, None, scheme, calibrator, steps, FORCED)
        return learn(start, gather(start, calibrator, None, None), calibrator)

    found = learned(exact, True)
    again = learned(found.model, False)
    assert len(found.equalizations) == 3
    assert found.model.graph.initializer[0].name == exact.graph.initializer[0].name
    assert found.ranges.keys() == again.ranges.keys()
    for name, r in found.ranges.items():
        assert again.ranges[name] == r  # what has grown is below the largest channel
    assert {"r", "e", "s", "m"} <= again.means.keys() <= found.means.keys()
    for name, mean in again.means.items():
        assert found.means[name] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert found.moments.keys() == again.moments.keys()
    kinds = {n.groups for n in found.plan.linears if n.node in found.moments}
    assert kinds == {1, WIDTH}
    for node_name, moments in found.moments.items():
        other = again.moments[node_name]
        # streamed moments are rounded, by the largest value of a sample
        for a, b in ((moments.second, other.second), (moments.mean, other.mean)):
            assert np.allclose(a, b, atol=2e-3 * np.abs(b).max())


@pytest.mark.parametrize("step", [RoundWeights(), FitWeightScales()], ids=repr)
def test_steps_that_use_moments(step: Step) -> None:
    exact = uneven()
    steps = (*DEFAULT_STEPS[:3], step, *DEFAULT_STEPS[3:])
    usual, better = (
        compare(exact, made(exact, steps=s).model, samples(exact, 3, 8)).sqnr
        for s in (DEFAULT_STEPS, steps)
    )
    assert better > usual - 0.5


def test_compare_sees_through_it() -> None:
    exact = uneven()
    result = made(exact)
    equalized, names = divided_like(prepare(exact), result.model)
    assert names == {}
    (t,) = (t for t in equalized.graph.initializer if t.name == "w_a")
    assert not np.array_equal(onnx.numpy_helper.to_array(t),
                              onnx.numpy_helper.to_array(exact.graph.initializer[0]))  # fmt: skip
    report = qdq.compare(exact, result.model, samples(exact, 3, 8), repeats=0, advise=0)
    rows = {t.name: t for t in report.tensors}
    assert {"r", "e", "s", "m", "w_a", "w_d"} <= rows.keys()
    assert rows["e"].rounding_db > 28
    assert all(rows[f"w_{y}"].rounding_db > 30 for y in "abdfy")
    assert not any("namesake" in note for note in report.notes)
    (output,) = report.outputs
    assert output.sqnr_db > 25


def test_metadata_that_do_not_fit_change_nothing() -> None:
    exact, other = uneven(), between(("Relu", "a", "m")).model()
    prepared = prepare(other)
    for t in prepared.graph.initializer:
        t.name = f"other_{t.name}"
    assert divided_like(prepared, made(exact).model) == (prepared, {})


def test_smoothed_tensors_are_left_to_smoothing() -> None:
    net = Net(128).linear("x", "a", "Gemm").op("Relu", "a", "r").linear("r", "y", "Gemm")
    exact = prepare(net.model(shape=(128, 128)))
    loud = np.where(np.arange(128) < 5, 60, 1)
    for name, axis, factors in (("w_a", 1, loud), ("b_a", 0, loud), ("w_y", 0, 1 / loud)):
        _scale(exact, name, axis, factors)
    tables, found = {}, {}
    for smooth, equalize in ((False, False), (False, True), (True, True)):
        rule = qdq.Rule(nodes="Gemm_a", keep_float=True)  # what is float can be divided
        scheme = qdq.Scheme(smooth=smooth, equalize=equalize, rules=(rule,))
        result = quantize_run(exact, samples(exact, 6), scheme=scheme, worth=0.0)
        props = {p.key: p.value for p in result.model.metadata_props}
        tables[smooth, equalize] = len(json.loads(props["qdq.smoothed"])), len(noted(result.model))
        found[smooth, equalize] = compare(exact, result.model, samples(exact, 2, 8)).sqnr
    assert tables[False, True] == (0, 1)
    assert tables[True, True] == (1, 0)
    assert found[False, True] > found[False, False] + 5
    assert found[True, True] > found[False, True] + 5


def test_equalize_is_yes_or_no() -> None:
    with pytest.raises(qdq.ConfigError, match=r"equalize='no' \(str\): wants True or False"):
        qdq.Scheme(equalize="no")  # type: ignore[arg-type]


def test_inverse() -> None:
    found = Equalization(factors=np.float32([1, 2, 4]), error=0.1, errors={})
    assert found.inverse.tolist() == [1, 0.5, 0.25]
