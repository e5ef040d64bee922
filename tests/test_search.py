"""The search for ranges: how fine and how far it looks, and what a cut must bring."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdq.affine import params_from_range
from qdq.calibrate import MSE, Entropy
from qdq.calibrate.entropy import _divergence
from qdq.calibrate.mse import _model, expected_error
from qdq.calibrate.search import full_range, search
from qdq.ranges import Histogram, TensorRange
from qdq.spec import INT8, QuantSpec

U8 = QuantSpec()
S8 = QuantSpec(dtype=INT8, symmetric=True)


def histogram(*values: float) -> Histogram:
    return Histogram.of(np.float32(values))


def times(h: Histogram, doublings: int) -> Histogram:
    """The histogram of 2**doublings times as many values."""
    for _ in range(doublings):
        h = h.merge(h)
    return h


# ---- the search itself -----------------------------------------------------------------------

ends = st.floats(-5.9, 0)  # octaves below the full range


@given(ends, ends)
def test_both_ends_are_found_within_a_128th_of_an_octave(left: float, right: float) -> None:
    """A quarter, then a 16th, then a 64th of an octave between candidates."""

    def cost(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return (np.log2(-low / 3) - left) ** 2 + (np.log2(high / 5) - right) ** 2

    ((low, high),) = search(cost, histogram(-3, 5), symmetric=False, octaves=6)
    assert abs(math.log2(-low / 3) - left) < 1 / 128 + 1e-9
    assert abs(math.log2(high / 5) - right) < 1 / 128 + 1e-9


@given(ends)
def test_symmetric_ends_move_as_one(wanted: float) -> None:
    def cost(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        assert np.array_equal(low, -high)
        return (np.log2(high / 5) - wanted) ** 2

    ((low, high),) = search(cost, histogram(-3, 5), symmetric=True, octaves=6)
    assert low == -high
    assert abs(math.log2(high / 5) - wanted) < 1 / 128 + 1e-9


# ---- squared errors --------------------------------------------------------------------------


def squared(h: Histogram, r: TensorRange) -> float:
    return expected_error(h, params_from_range(r, U8))


def test_a_range_a_thousandth_of_an_outlier_is_found() -> None:
    """10**9 values up to 1 and one of 1024, whose cut costs 10**6: nothing beside their steps."""
    bulk = times(Histogram.of(np.linspace(0.01, 1, 1000, dtype=np.float32)), 20)
    assert 0.8 < MSE().range(bulk.merge(histogram(1024)), U8).high < 1.25  # in bins of 1/4


def test_a_cut_by_squares_wins_at_least_two_percent() -> None:
    """Half a step at either end is all that less than that need be, which any data gains."""
    cut = 0
    for seed in range(20):
        x = np.round(np.random.default_rng(seed).laplace(size=2000) * 20) / 20
        h = Histogram.of(x)
        found, whole = MSE().range(h, U8), full_range(h)
        if found != whole:
            cut += 1
            assert squared(h, found) < 0.98 * squared(h, whole)
    assert 0 < cut < 20


def test_of_what_the_model_likes_the_least_expected_error_is_taken() -> None:
    """Four values over and over: what a step costs is where they lie on it, not s**2 / 12."""
    ratios = []
    for seed in range(5):
        few = np.random.default_rng(seed).uniform(0.3, 1, 4)
        h = times(Histogram.of(few), 20).merge(histogram(20))
        ((low, high),) = search(_model(h, U8), h, symmetric=False, octaves=12)
        favourite = TensorRange(np.float32(low), np.float32(high))
        ratios.append(squared(h, MSE().range(h, U8)) / squared(h, favourite))
    assert max(ratios) < 1.001
    assert min(ratios) < 0.9


# ---- divergence ------------------------------------------------------------------------------


def divergence(counts: np.ndarray, low: float, high: float, codes: int) -> float:
    """KL(P || Q) of a range, in bins, by its definition, code for code."""
    inner = [round(low + (high - low) * k / codes) for k in range(1, codes)]
    edges = [math.floor(low), *inner, math.floor(high) + 1]  # the ends' bins belong to it
    p = counts[edges[0] : edges[-1]].astype(float)
    q = np.zeros_like(p)
    p[0] += counts[: edges[0]].sum()
    p[-1] += counts[edges[-1] :].sum()
    for first, last in pairwise(edges):
        own, part = counts[first:last], slice(first - edges[0], last - edges[0])
        # even over the bins that hold values, and one that those outside fill
        even = max(own.sum(), 1) / max(np.count_nonzero(own), 1)
        q[part] = np.where(p[part] > 0, even, 0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


cuts = st.integers(0, 11 * 64).map(lambda n: n / 64)  # bins at either end, without rounding


@given(st.integers(0, 10**6), cuts, cuts)
def test_the_divergence_is_that_of_the_definition(seed: int, left: float, right: float) -> None:
    """Of counts with gaps, and few values at either end, which may be cut."""
    r = np.random.default_rng(seed)
    counts = r.integers(2000, 9000, 100) * (r.random(100) < 0.7)
    counts[:12], counts[-12:] = r.integers(0, 2, 12), r.integers(0, 2, 12)
    low, high = left, 100 - 2.0**-20 - right
    found = _divergence(counts, -40, 0.25, 16)(np.array((low - 40) / 4), np.array((high - 40) / 4))
    assert found == pytest.approx(divergence(counts, low, high, 16), rel=1e-9, abs=1e-12)
    assert found >= 0


def test_a_cut_by_divergence_wins_eight_nats_over_all_values() -> None:
    """Of 6000 values one may be cut, by the noise in how often its neighbours were met."""
    cut = 0
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal(6000).astype(np.float32)
        h = Histogram.of(x)
        found = Entropy(bins=4096).range(h, U8)
        if found != full_range(h):
            cut += 1
            before, after = (
                divergence(h.counts, *(v / h.width - h.start for v in (r.low, r.high)), 256)
                for r in (full_range(h), found)
            )
            assert (before - after) * 6000 > 8
    assert 0 < cut < 20


def test_entropy_narrows_down_to_one_bin_per_code_and_no_farther() -> None:
    """Neighbours that differ want codes of their own; an outlier is 14 times the others away.

    Symmetric codes have [-1.4, 1.4] to narrow, twice as much as there are bins with values.
    """
    width = 2.0**-11  # 1.4 is 2868 of these: more than 2048, and half as many as were kept
    often = np.where(np.arange(100) % 2, 400, 100)
    h = Histogram.of(np.repeat((np.arange(100) + 0.5) * width, often)).merge(histogram(1.4))
    assert h.width == width / 2
    found = Entropy().range(h, S8)
    assert 255 <= 2 * float(found.high) / width < 255 * 2 ** (1 / 64)
