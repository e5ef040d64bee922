"""Histograms, and the search for the two ends of a range that cost least. Numpy only."""

from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.reading import Reading
from qdq.ranges import Counting, Histogram, TensorRange

__all__ = [
    "Counted",
    "FloatArray",
    "Objective",
    "extent",
    "full_range",
    "histogram_of",
    "inner_range",
    "inner_ranges",
    "search",
]

FloatArray = NDArray[np.float64]
Objective = Callable[[FloatArray, FloatArray], FloatArray]
"""Cost of quantizing to each [low, high]: arrays of lows <= 0 and highs >= 0, whose shapes
broadcast, to an array of the shape of both."""

_PER_OCTAVE = 4
"""Candidates per halving of an end, in the first pass."""
_REFINED = 4
"""Steps on either side of the best candidate, in each refinement."""
_AROUND = np.linspace(1.0, -1.0, 2 * _REFINED + 1)


def histogram_of(x: NDArray[np.floating]) -> Histogram:
    """The histogram of a tensor's values, of at most ``SAMPLED`` of each entry of its batch."""
    counted = Counted()
    counted.add(Reading.of(x, spread=True))
    return counted.summary()


class Counted:
    """What ``merge`` makes of the ``histogram_of`` each sample; a ``Gatherer``, and faster."""

    def __init__(self) -> None:
        self._counting = Counting()

    def add(self, reading: Reading) -> None:
        """Count the values of a sample."""
        self._counting.add(reading.values, reading.step, reading.extent())

    def summary(self) -> Histogram:
        """The histogram of all samples."""
        return self._counting.histogram()


def full_range(histogram: Histogram) -> TensorRange:
    """The range from the smallest to the largest value seen."""
    return inner_range(histogram, histogram.low, histogram.high)


def inner_range(histogram: Histogram, low: float, high: float) -> TensorRange:
    """The range [low, high], low <= high, cut to the values seen; it holds 0 if they do."""
    found = inner_ranges(histogram, [(low, high)])
    return TensorRange(found.low[0], found.high[0])


def inner_ranges(histogram: Histogram, ends: Sequence[tuple[float, float]]) -> TensorRange:
    """``inner_range`` of each pair of ends, as one record of shape (K,)."""
    least, most = histogram.low, histogram.high
    low, high = np.clip(np.array(ends).T, least, most)
    if least <= 0 <= most:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    return TensorRange(low, high)


def extent(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Low and high of the widest candidate: the values seen and 0, or [-a, a] around them."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def search(
    objective: Objective,
    histogram: Histogram,
    *,
    symmetric: bool,
    octaves: int,
    keep: int = 1,
) -> list[tuple[float, float]]:
    """The cheapest ranges [low, high] that hold 0, cheapest first.

    A geometric grid from the full range down to 2**-octaves of it, for both ends separately
    (for one-sided data the end at 0 is fixed, for symmetric=True both ends move as one), then
    two refinements around the best. Of equal costs the widest range wins.

    Args:
        objective: evaluated on all candidates of a pass at once.
        histogram: of the values.
        symmetric: the ranges are [-a, a].
        octaves: how far to narrow.
        keep: how many ranges to return; the best may be among them more than once, since a
            refinement meets it again.
    """
    ends = extent(histogram, symmetric=symmetric)
    shrink = np.arange(0, -octaves * _PER_OCTAVE - 1, -1) / _PER_OCTAVE
    best = (0.0, 0.0)
    tried: list[tuple[float, float, float]] = []
    reach = 1.0 / _PER_OCTAVE
    for refinement in range(3):
        if refinement:
            grids = [_falling(np.minimum(b + reach * _AROUND, 0.0)) for b in best]
            reach /= _REFINED
        else:
            grids = [shrink, shrink]
        # An end at 0 stays there: one candidate is enough.
        at = [g if end else g[:1] for g, end in zip(grids, ends, strict=True)]
        if symmetric:
            at[0] = at[1]
        low, high = (end * np.exp2(g) for end, g in zip(ends, at, strict=True))
        # Both ends as one, or each low with each high.
        cost = objective(low, high) if symmetric else objective(low[:, None], high)
        least = np.argsort(cost.ravel(), kind="stable")[:keep]
        rows, columns = (least, least) if symmetric else np.divmod(least, high.size)
        tried += zip(cost.ravel()[least].tolist(), low[rows].tolist(), high[columns].tolist(),
                     strict=True)  # fmt: skip
        best = (float(at[0][rows[0]]), float(at[1][columns[0]]))
    tried.sort(key=itemgetter(0))
    return [(low, high) for _, low, high in tried[:keep]]


def _falling(x: FloatArray) -> FloatArray:
    """Values that never rise, each of them once."""
    first = np.ones(x.size, bool)
    np.less(x[1:], x[:-1], out=first[1:])
    return x[first]
