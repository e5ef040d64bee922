"""Calibrators: one contract for all of them, and what each is good for."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.affine import fake_quantize, params_from_range
from qdq.calibrate import (
    CALIBRATORS,
    MSE,
    Calibrator,
    Entropy,
    MinMax,
    Percentile,
    Summaries,
    calibrate,
    merge_summaries,
    ranges_from,
)
from qdq.calibrate.mse import expected_error
from qdq.calibrate.reading import SAMPLED, Reading
from qdq.errors import CalibrationError, ConfigError
from qdq.ranges import Histogram, TensorRange
from qdq.spec import INT8, INT16, UINT8, UINT16, QuantSpec

U8 = QuantSpec()
SPECS = [
    QuantSpec(dtype=t, symmetric=s) for t in (UINT8, INT8, UINT16, INT16) for s in (False, True)
]
ALL = [cls() for cls in CALIBRATORS.values()]
CLIPPING = [Percentile(), Entropy(), MSE()]
BIG = float(np.finfo(np.float32).max)

every = pytest.mark.parametrize("calibrator", ALL, ids=lambda c: c.name)
specs = st.sampled_from(SPECS)
elements = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45, 1e30, BIG, -BIG]),
)
data = st.lists(elements, min_size=1, max_size=30)


def f32(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


def one_range(calibrator: Calibrator[Any], x: np.ndarray, spec: QuantSpec = U8) -> TensorRange:
    return calibrator.range(calibrator.summarize(x), spec)


def summaries(
    batches: Sequence[Mapping[str, np.ndarray]], calibrator: Calibrator[Any]
) -> dict[str, Any]:
    found = Summaries(batches[0], calibrator)
    for k, batch in enumerate(batches):
        found.add({name: Reading.of(x, spread=True) for name, x in batch.items()}, k)
    return found.summaries()


def error(r: TensorRange, x: np.ndarray, spec: QuantSpec = U8) -> float:
    """Mean squared error of fake-quantizing x to a range."""
    return float(
        np.mean((fake_quantize(x, params_from_range(r, spec)).astype(np.float64) - x) ** 2)
    )


def sample(name: str, n: int = 100_000) -> np.ndarray:
    rng = np.random.default_rng(7)
    return f32(
        {
            "normal": lambda: rng.standard_normal(n),
            "uniform": lambda: rng.uniform(-1, 2, n),
            "positive": lambda: rng.uniform(3, 5, n),
            "laplace": lambda: rng.laplace(size=n),
            "t2": lambda: rng.standard_t(2, n),
            "t3": lambda: rng.standard_t(3, n),
            "relu": lambda: np.maximum(rng.standard_normal(n), 0),
            "negative": lambda: -np.abs(rng.standard_t(3, n)),
            "outlier": lambda: np.append(rng.standard_normal(n), 500.0),
            "bytes": lambda: rng.integers(0, 256, n) / 255,
        }[name]()
    )


NAMES = [
    "normal",
    "uniform",
    "positive",
    "laplace",
    "t2",
    "t3",
    "relu",
    "negative",
    "outlier",
    "bytes",
]


# ---- the contract --------------------------------------------------------------------------


@every
def test_settings_are_a_value(calibrator: Calibrator[Any]) -> None:
    assert eval(repr(calibrator)) == calibrator
    assert hash(calibrator) == hash(type(calibrator)())
    assert CALIBRATORS[calibrator.name] is type(calibrator)


@every
@given(values=data, draw=st.data())
def test_order_and_split_cannot_matter(
    calibrator: Calibrator[Any], values: list[float], draw: st.DataObject
) -> None:
    whole = calibrator.summarize(f32(values))
    owner = draw.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    parts = [f32([v for v, o in zip(values, owner, strict=True) if o == k]) for k in range(4)]
    parts = draw.draw(st.permutations([calibrator.summarize(p) for p in parts if p.size]))
    while len(parts) > 1:
        k = draw.draw(st.integers(0, len(parts) - 2))
        assert calibrator.merge(parts[k], parts[k + 1]) == calibrator.merge(parts[k + 1], parts[k])
        parts = [*parts[:k], calibrator.merge(parts[k], parts[k + 1]), *parts[k + 2 :]]
    assert parts[0] == whole


@every
@given(values=data, spec=specs)
def test_range_is_within_what_was_seen(
    calibrator: Calibrator[Any], values: list[float], spec: QuantSpec
) -> None:
    x = f32(values)
    r = one_range(calibrator, x, spec)
    assert r.low.shape == r.high.shape == ()
    assert x.min() <= r.low <= r.high <= x.max()
    if x.min() <= 0 <= x.max():
        assert r.low <= 0 <= r.high
    params_from_range(r, spec)


@every
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dtype}-{s.symmetric}")
@pytest.mark.parametrize("name", NAMES)
def test_range_of_real_distributions(
    calibrator: Calibrator[Any], name: str, spec: QuantSpec
) -> None:
    x = sample(name, 20_000)
    r = one_range(calibrator, x, spec)
    assert x.min() <= r.low <= r.high <= x.max()
    assert r == one_range(calibrator, x[::-1], spec)


@every
@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-45, BIG, -BIG])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dtype}-{s.symmetric}")
def test_constant_tensor(calibrator: Calibrator[Any], value: float, spec: QuantSpec) -> None:
    r = one_range(calibrator, np.full((2, 3), value, np.float32), spec)
    assert r.low == r.high == np.float32(value)


@every
def test_zeros_and_one_other_value(calibrator: Calibrator[Any]) -> None:
    r = one_range(calibrator, f32([0] * 1000 + [5]))
    assert r.low == 0
    assert 0 <= r.high <= 5


@every
def test_float16_and_float64(calibrator: Calibrator[Any]) -> None:
    x = sample("normal", 5000).astype(np.float16)
    expected = calibrator.summarize(x.astype(np.float32))
    assert calibrator.summarize(x) == expected
    assert calibrator.summarize(x.astype(np.float64)) == expected


@every
def test_one_sided_data_keeps_its_side(calibrator: Calibrator[Any]) -> None:
    assert one_range(calibrator, sample("relu")).low == 0
    assert one_range(calibrator, sample("negative")).low < 0
    assert one_range(calibrator, sample("negative")).high <= 0
    assert one_range(calibrator, sample("positive")).low >= 3


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf(calibrator: Calibrator[Any], bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        calibrator.summarize(f32([1, bad]))


# ---- what each is good for -----------------------------------------------------------------


@pytest.mark.parametrize("calibrator", CLIPPING, ids=lambda c: c.name)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["t2", "t3", "outlier"])
def test_heavy_tails_are_cut(calibrator: Calibrator[Any], symmetric: bool, name: str) -> None:
    spec = QuantSpec(dtype=INT8, symmetric=symmetric)
    x = sample(name)
    full, cut = one_range(MinMax(), x, spec), one_range(calibrator, x, spec)
    assert cut.high - cut.low < 0.95 * (full.high - full.low)
    bulk = x[np.abs(x) < np.quantile(np.abs(x), 0.999)]
    assert error(cut, bulk, spec) < 0.9 * error(full, bulk, spec)


# KL and percentiles do not look at squares: they may cut few far values that cost more than the
# rest gains. Where the tails end in good time they win by squares too.
@pytest.mark.parametrize(
    ("calibrator", "name"),
    [*((c, "laplace") for c in CLIPPING), (MSE(), "t2"), (MSE(), "t3")],
)
def test_better_than_minmax_in_squared_error(calibrator: Calibrator[Any], name: str) -> None:
    x = sample(name)
    assert error(one_range(calibrator, x), x) < 0.9 * error(one_range(MinMax(), x), x)


@pytest.mark.parametrize("calibrator", CLIPPING, ids=lambda c: c.name)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [100, 1000, 100_000])
def test_light_tails_are_kept(calibrator: Calibrator[Any], symmetric: bool, n: int) -> None:
    x = sample("uniform", n)
    r = one_range(calibrator, x, QuantSpec(dtype=INT8, symmetric=symmetric))
    assert r.low == pytest.approx(x.min(), abs=0.02)
    assert r.high == pytest.approx(x.max(), abs=0.02)


@pytest.mark.parametrize("calibrator", CLIPPING, ids=lambda c: c.name)
@pytest.mark.parametrize("n", [100, 1000, 10_000, 200_000])
def test_normal_data_is_not_cut_deep(calibrator: Calibrator[Any], n: int) -> None:
    x = sample("normal", n)
    r = one_range(calibrator, x)
    assert np.mean((x < r.low - 0.01) | (x > r.high + 0.01)) <= 0.002


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dtype}-{s.symmetric}")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [30, 1000, 50_000])
def test_mse_is_never_worse_than_minmax(spec: QuantSpec, name: str, n: int) -> None:
    x = sample(name, n)
    assert error(one_range(MSE(), x, spec), x, spec) <= 1.01 * error(
        one_range(MinMax(), x, spec), x, spec
    )


@pytest.mark.parametrize("name", ["normal", "t3", "relu", "laplace"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_finds_the_optimum(name: str, symmetric: bool) -> None:
    spec = QuantSpec(dtype=INT8, symmetric=symmetric)
    x = sample(name, 20_000)
    low, high = x.min(), x.max()
    if symmetric:
        pairs = [(-a, a) for a in np.linspace(0.01, 1, 100) * max(-low, high)]
    else:
        grid = np.linspace(0.03, 1, 30)
        pairs = [(low * a, high * b) for a in (grid if low < 0 else [1.0]) for b in grid]
    brute = min(error(TensorRange(f32(a), f32(b)), x, spec) for a, b in pairs)
    assert error(one_range(MSE(), x, spec), x, spec) <= 1.03 * brute


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dtype}-{s.symmetric}")
@pytest.mark.parametrize("name", ["normal", "t3", "relu"])
@pytest.mark.parametrize("cut", [1.0, 0.3])
def test_expected_error_is_the_error(spec: QuantSpec, name: str, cut: float) -> None:
    x = sample(name)
    r = TensorRange(x.min() * cut, x.max() * cut)
    expected = expected_error(Histogram.of(x), params_from_range(r, spec))
    assert expected == pytest.approx(error(r, x, spec), rel=0.03)


def test_expected_error_of_one_value() -> None:
    p = params_from_range(TensorRange(f32(0), f32(255)), U8)
    assert expected_error(Histogram.of(f32([7.25, 7.25])), p) == pytest.approx(0.0625)
    assert expected_error(Histogram.of(f32([0.0])), p) == 0
    assert expected_error(Histogram.of(f32([300.0])), p) == pytest.approx(45.0**2)


def test_exact_zeros_cost_nothing() -> None:
    x = sample("laplace", 20_000)
    many = np.concatenate([x, np.zeros(500_000, np.float32)])
    for calibrator in (Entropy(), MSE()):
        assert one_range(calibrator, many) == one_range(calibrator, x)


def test_values_on_a_grid_keep_their_exact_range() -> None:
    r = one_range(MSE(), sample("bytes"))
    assert (r.low, r.high) == (0, 1)


@pytest.mark.parametrize("name", ["normal", "t2", "relu", "negative", "positive"])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_the_quantile(name: str, percentile: float) -> None:
    x = sample(name)
    r = one_range(Percentile(percentile), x)
    tail = (100 - percentile) / 200
    h = Histogram.of(x)
    one = 1 / x.size  # an end may fall between two values, anywhere in the gap
    for end, side in ((float(r.low), x), (-float(r.high), -x)):
        assert np.mean(side < end - h.width) <= tail + one
        assert np.mean(side <= end + h.width) >= tail - one


def test_percentile_within_exact_zeros() -> None:
    x = np.append(np.zeros(990, np.float32), np.ones(10, np.float32))
    assert one_range(Percentile(90), x) == TensorRange(f32(0), f32(0))


@given(data)
def test_percentile_100_is_minmax(values: list[float]) -> None:
    assert one_range(Percentile(100), f32(values)) == one_range(MinMax(), f32(values))


def test_more_bins_cut_farther() -> None:
    x = sample("outlier")
    coarse, fine = (one_range(Entropy(bins=b), x).high for b in (256, 4096))
    assert fine < coarse / 2


def test_a_repeated_value_does_not_cut_the_others() -> None:
    rng = np.random.default_rng(0)
    x = f32(np.append(rng.standard_normal(4000), np.repeat(f32([0.21, -0.13, 0.4]), 1000)))
    for calibrator in CLIPPING:
        r = one_range(calibrator, x)
        assert np.mean((x < r.low) | (x > r.high)) < 0.003


def test_16_bit_codes_are_not_cut_by_entropy() -> None:
    x = sample("t2")
    assert one_range(Entropy(), x, QuantSpec(dtype=UINT16)) == one_range(MinMax(), x)


@pytest.mark.parametrize("percentile", [50, 0, -1, 100.1, 0.9999, float("nan"), "99", True])
def test_percentile_is_checked(percentile: Any) -> None:
    with pytest.raises(ConfigError, match="percentile"):
        Percentile(percentile)


@pytest.mark.parametrize("bins", [0, 128, 255, 4097, 512.5, "512"])
def test_bins_are_checked(bins: Any) -> None:
    with pytest.raises(ConfigError, match="bins"):
        Entropy(bins=bins)


def test_numbers_of_numpy_make_the_same_calibrator() -> None:
    """Statistics know a calibrator by its repr."""
    assert repr(Percentile(np.float64(99.5))) == repr(Percentile(99.5))
    assert repr(Percentile(99)) == repr(Percentile(99.0))
    assert repr(Entropy(np.int64(512))) == repr(Entropy(512))


@every
def test_range_is_fast(calibrator: Calibrator[Any]) -> None:
    summary = calibrator.summarize(sample("t2"))
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        calibrator.range(summary, U8)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.03  # ten times what it takes


# ---- calibrate() ---------------------------------------------------------------------------


@every
def test_calibrate_small_golden_case(calibrator: Calibrator[Any]) -> None:
    samples = [[-9, 1], [2, 12], [-4, 7], [6, -3], [0, 3]]
    r = calibrate(({"x": f32([s])} for s in samples), {"x": U8}, calibrator)["x"]
    if calibrator.name == "minmax":
        assert (r.low, r.high) == (-9, 12)
    assert r.low == pytest.approx(-9, abs=0.1)
    assert r.high == pytest.approx(12, abs=0.1)


@every
def test_calibrate_is_all_values_at_once(calibrator: Calibrator[Any]) -> None:
    x, y = sample("t3", 5000), sample("relu", 3000)
    wanted = {"y": QuantSpec(dtype=INT8, symmetric=True), "x": U8}
    cuts = [0, 100, 1100, 1101, 5000]
    batches = [
        # shapes change, empty arrays are skipped, what is not wanted is ignored
        {"x": x[a:b].reshape(1, -1), "y": y[a:b], "other": np.array(["text"])}
        for a, b in pairwise(cuts)
    ] + [{"x": x[:0], "y": y[:0].reshape(0, 4)}]
    found = calibrate(iter(batches), wanted, calibrator)
    assert list(found) == ["y", "x"]
    assert found["x"] == one_range(calibrator, x, wanted["x"])
    assert found["y"] == one_range(calibrator, y, wanted["y"])
    assert calibrate(batches[::-1], wanted, calibrator) == found


@every
def test_shards_merge_to_the_whole(calibrator: Calibrator[Any]) -> None:
    x = sample("t3", 1000)
    batches = [{"x": x[i::10], "y": x[i::10] if i > 6 else x[:0]} for i in range(10)]
    wanted = {"x": U8, "y": U8}
    a, b = (summaries(part, calibrator) for part in (batches[:4], batches[4:]))
    assert "y" not in a  # it has no values there
    whole = calibrate(batches, wanted, calibrator)
    assert ranges_from(merge_summaries(a, b, calibrator), wanted, calibrator) == whole
    assert ranges_from(merge_summaries(b, a, calibrator), wanted, calibrator) == whole


@every
def test_a_gatherer_has_what_merging_gives(calibrator: Calibrator[Any]) -> None:
    x = sample("t3", 40000).reshape(1, -1)  # above what a histogram counts of one batch
    parts = [x[:, :100], x[:, 100:], x[:, ::2]]
    merged = calibrator.summarize(parts[0])
    gatherer = calibrator.gatherer()  # type: ignore[attr-defined]
    for k, part in enumerate(parts):
        if k:
            merged = calibrator.merge(merged, calibrator.summarize(part))
        gatherer.add(Reading.of(part, spread=True))
        assert gatherer.summary() == merged


def test_batches_are_read_one_at_a_time() -> None:
    seen: list[int] = []

    class Summing(MinMax):
        def summarize(self, x: np.ndarray) -> TensorRange:
            seen.append(-1)
            return super().summarize(x)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for i in range(3):
            seen.append(i)
            yield {"x": f32([i])}

    calibrate(batches(), {"x": U8}, Summing())
    assert seen == [0, -1, 1, -1, 2, -1]


@every
def test_no_samples(calibrator: Calibrator[Any]) -> None:
    with pytest.raises(CalibrationError, match="no calibration samples"):
        calibrate([], {"x": U8}, calibrator)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named(calibrator: Calibrator[Any], bad: float) -> None:
    batches = [{"x": f32([1, 2])}, {"x": f32([[1, bad]])}]
    with pytest.raises(
        CalibrationError, match=r"'x', calibration sample 1: .*NaN or Inf"
    ) as caught:
        calibrate(batches, {"x": U8}, calibrator)
    assert (caught.value.tensor, caught.value.sample) == ("x", 1)


def test_missing_tensor_is_named() -> None:
    with pytest.raises(CalibrationError, match="sample 1 has no tensor 'y'") as caught:
        calibrate([{"x": f32([1]), "y": f32([1])}, {"x": f32([1])}], {"x": U8, "y": U8}, MinMax())
    assert (caught.value.tensor, caught.value.sample) == ("y", 1)


def test_integer_tensor_is_named() -> None:
    with pytest.raises(CalibrationError, match="'x', calibration sample 0: found type int64"):
        calibrate([{"x": np.arange(3)}], {"x": U8}, MinMax())


def test_tensor_without_values_is_named() -> None:
    with pytest.raises(CalibrationError, match="'x' has no values") as caught:
        calibrate([{"x": np.zeros((0, 2), np.float32)}], {"x": U8}, MinMax())
    assert caught.value.tensor == "x"


@pytest.mark.parametrize("calibrator", CLIPPING, ids=lambda c: c.name)
def test_of_large_tensors_a_sample_is_counted(calibrator: Calibrator[Any]) -> None:
    x = sample("laplace", 3 * 160_000).reshape(3, 10, 200, 80)
    parts = [calibrator.summarize(x[i : i + 1]) for i in range(3)]
    counted = merge_summaries({"x": parts[0]}, {"x": parts[1]}, calibrator)
    counted = merge_summaries(counted, {"x": parts[2]}, calibrator)
    assert (counted["x"].low, counted["x"].high) == (x.min(), x.max())
    assert counted["x"].counts.sum() == pytest.approx(x.size, rel=1e-3)
    few = np.gcd.reduce(parts[0].counts[1:-1])
    assert few >= 160_000 // SAMPLED  # each value stands for so many
    all_of_it = calibrator.range(Histogram.of(x), U8)
    for r in (calibrator.range(counted["x"], U8), one_range(calibrator, x)):
        assert error(r, x) < 1.2 * error(all_of_it, x)
