"""Ranges and histograms: merging is exact, whatever the order and the split."""

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.calibrate.reading import STEPS, step_for
from qdq.errors import CalibrationError
from qdq.extent import extremes
from qdq.ranges import MAX_BINS, Counting, Histogram, TensorRange

BIG = float(np.finfo(np.float32).max)

# all of float32, and the cases that hurt: one scale, many scales, zeros, an attention mask
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
tidy = st.floats(-4, 4, width=32)
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-30, 1e30, -BIG, BIG, 8192.0])
elements = st.one_of(anything, tidy, special)
data = st.one_of(
    *(st.lists(e, min_size=1, max_size=40) for e in (elements, anything, tidy, special))
)


def f32(values: list[float]) -> np.ndarray:
    return np.float32(values)


# ---- TensorRange ---------------------------------------------------------------------------


@given(data)
def test_range_of(values: list[float]) -> None:
    r = TensorRange.of(f32(values))
    assert (r.low, r.high) == (f32(values).min(), f32(values).max())
    assert r.low.shape == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [TensorRange.of, Histogram.of])
def test_nan_and_inf(bad: float, dtype: type, make: object) -> None:
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        make(np.array([[1, 2], [bad, 3]], dtype))


@pytest.mark.parametrize("make", [TensorRange.of, Histogram.of])
def test_beyond_float32(make: object) -> None:
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        make(np.array([1.0, 1e300]))


@pytest.mark.parametrize("make", [TensorRange.of, Histogram.of])
def test_empty(make: object) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        make(np.zeros((0, 3), np.float32))


# ---- Histogram: laws -----------------------------------------------------------------------


@given(data)
def test_every_value_is_counted_in_its_bin(values: list[float]) -> None:
    h = Histogram.of(f32(values))
    # by integers: bin k holds k * 2**e <= v < (k + 1) * 2**e
    bins = [math.floor(math.ldexp(float(v), -h.exponent)) for v in f32(values)]
    expected = np.bincount(np.array(bins) - h.start, minlength=h.counts.size)
    assert np.array_equal(h.counts, expected)
    assert h.counts.size <= MAX_BINS
    assert (h.low, h.high) == (f32(values).min(), f32(values).max())
    assert h.zeros == np.sum(f32(values) == 0)


@given(data, st.data())
def test_merge_is_all_at_once_for_any_split_and_order(
    values: list[float], draw: st.DataObject
) -> None:
    whole = Histogram.of(f32(values))
    owner = draw.draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values)))
    parts = [f32([v for v, o in zip(values, owner, strict=True) if o == k]) for k in range(5)]
    parts = draw.draw(st.permutations([Histogram.of(p) for p in parts if p.size]))
    while len(parts) > 1:
        k = draw.draw(st.integers(0, len(parts) - 2))
        parts = [*parts[:k], parts[k].merge(parts[k + 1]), *parts[k + 2 :]]
    assert parts[0] == whole


@given(data, data)
def test_merge_commutes(a: list[float], b: list[float]) -> None:
    x, y = Histogram.of(f32(a)), Histogram.of(f32(b))
    assert x.merge(y) == y.merge(x)


@given(data)
def test_fields_rebuild_it(values: list[float]) -> None:
    h = Histogram.of(f32(values))
    arrays = {f.name: np.asarray(getattr(h, f.name)) for f in fields(h)}
    assert Histogram(**arrays) == h


@given(data)
def test_edges(values: list[float]) -> None:
    h = Histogram.of(f32(values))
    assert h.edges.shape == (h.counts.size + 1,)
    assert (np.diff(h.edges) >= 0).all()
    assert (h.edges[0], h.edges[-1]) == (h.low, h.high)
    assert h.nonzero_counts.min() >= 0
    assert h.nonzero_counts.sum() == h.counts.sum() - h.zeros


# ---- Histogram: cases ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3.7, 1e5, 1e30])
@pytest.mark.parametrize("low", [-1.0, 0.0, -0.3])
def test_resolution(scale: float, low: float) -> None:
    x = np.random.default_rng(0).uniform(low * scale, scale, 50_000).astype(np.float32)
    assert MAX_BINS // 2 < Histogram.of(x).counts.size <= MAX_BINS


def test_one_value_and_all_zero() -> None:
    h = Histogram.of(np.full((3, 4), 3.7, np.float32))
    assert (h.counts.tolist(), h.zeros) == ([12], 0)
    h = Histogram.of(np.zeros(5, np.float32))
    assert (h.counts.tolist(), h.start, h.zeros) == ([5], 0, 5)
    assert math.copysign(1, Histogram.of(f32([-0.0])).low) == 1


def test_tiny_negative_values_under_a_wide_range_are_below_zero() -> None:
    h = Histogram.of(f32([-1e-45, -BIG, 1.0]))
    assert h.counts[-h.start - 1] == 1
    assert h.counts[-h.start] == 1


def test_more_values_than_a_chunk_and_any_layout() -> None:
    x = np.random.default_rng(1).normal(size=(700, 1001)).astype(np.float32)
    x[::3] = 0
    h = Histogram.of(x)
    assert h.counts.sum() == x.size
    assert h.zeros == x.size - np.count_nonzero(x)
    assert Histogram.of(x.T) == h
    assert Histogram.of(x[::-1, ::-1]) == h
    assert Histogram.of(x.astype(np.float64)) == h
    expected, _ = np.histogram(x, (np.arange(h.counts.size + 1) + h.start) * h.width)
    assert np.array_equal(h.counts, expected)


def test_float16() -> None:
    x = np.random.default_rng(2).normal(size=1000).astype(np.float16)
    assert Histogram.of(x) == Histogram.of(x.astype(np.float32))


@pytest.mark.parametrize(
    "change",
    [{"start": 7}, {"exponent": 3}, {"counts": np.ones(3)}, {"high": np.nan}, {"zeros": 99}],
)
def test_damaged_fields_are_an_error(change: dict[str, object]) -> None:
    h = Histogram.of(f32([0.0, 0.5, 1.0]))
    good = {f.name: getattr(h, f.name) for f in fields(h)}
    with pytest.raises(CalibrationError, match="histogram"):
        Histogram(**{**good, **change})


def test_counts_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Histogram.of(f32([1.0])).counts[0] = 2


# ---- a sample of the values ------------------------------------------------------------------


def sampled(x: np.ndarray, most: int) -> Histogram:
    counting, step = Counting(), step_for(x.size, most)
    counting.add(x.ravel()[::step], step, extremes(x))
    return counting.histogram()


def sampled_laws(x: np.ndarray, most: int) -> Histogram:
    h = sampled(x, most)
    assert (h.low, h.high) == (float(x.min()), float(x.max()))
    whole = Histogram.of(x)
    assert (h.exponent, h.start, h.counts.size) == (whole.exponent, whole.start, whole.counts.size)
    return h


@given(st.integers(1, 400), st.integers(1, 50))
def test_of_many_values_a_spaced_sample_counts(n: int, most: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    h = sampled_laws(x, most)
    if n <= most:
        assert h == Histogram.of(x)
    step = step_for(n, most)
    assert n <= h.counts.sum() <= n + step + 1
    assert -(-n // step) <= most or step == 1


@given(st.integers(0, 1 << 31), st.integers(1 << 10, 1 << 14))
def test_a_step_is_as_small_as_it_can_be_and_shares_no_divisor(entry: int, most: int) -> None:
    step = step_for(entry, most)
    assert step in STEPS
    assert step == 1 or math.gcd(step, entry) == 1
    if entry <= most:
        assert step == 1
    elif entry < STEPS[-1] * most // 2:
        assert most / 4 < -(-entry // step) <= most


@pytest.mark.parametrize(
    ("values", "counted", "zeros"),
    [
        ([0.0, 1.0, 2.0, 0.0, 4.0, 5.0], 8, 3),  # 0, 2 and 4 twice, and both ends
        ([-5.0, 0.0, -4.0, -2.0, 0.0, -1.0], 8, 3),
        ([-3.0, 1.0, 0.0, 0.0, 3.0, 5.0], 8, 2),  # no end is 0
        ([0.0, 0.0, 0.0], 6, 6),
    ],
)
def test_an_end_that_is_0_is_one_zero_more(values: list[float], counted: int, zeros: int) -> None:
    counting = Counting()
    counting.add(f32(values[::2]), 2, extremes(f32(values)))
    h = counting.histogram()
    assert (h.counts.sum(), h.zeros) == (counted, zeros)
    assert h.nonzero_counts[-h.start] == sum(0 <= v < h.width for v in values[::2] if v) * 2


def test_a_sample_shows_the_shape_of_all() -> None:
    x = np.random.default_rng(0).laplace(size=(3, 112, 112)).astype(np.float32)
    x[x < -1] = 0
    h, whole = sampled_laws(x, 1 << 12), Histogram.of(x)
    apart = np.cumsum(h.counts) / h.counts.sum() - np.cumsum(whole.counts) / whole.counts.sum()
    assert np.abs(apart).max() < 0.02
    assert h.zeros / h.counts.sum() == pytest.approx(whole.zeros / x.size, abs=0.02)


def test_the_sample_meets_every_column() -> None:
    """A step that divides the rows' length would read the same few columns of each."""
    x = np.broadcast_to(np.arange(64, dtype=np.float32), (1, 8, 64, 64)).copy()
    h = sampled(x, x.size // 64)
    assert np.count_nonzero(h.counts) == 64


@given(st.lists(data, min_size=1, max_size=4), st.booleans())
def test_counting_is_merging(parts: list[list[float]], known: bool) -> None:
    counting, merged = Counting(), Histogram.of(f32(parts[0]))
    for k, part in enumerate(parts):
        counting.add(f32(part), 1, extremes(f32(part)) if known else None)
        if k:
            merged = merged.merge(Histogram.of(f32(part)))
        assert counting.histogram() == merged
