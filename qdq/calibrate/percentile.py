"""The range that a given share of the values lies in."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.search import Counted, full_range, histogram_of, inner_range
from qdq.checks import is_number, want
from qdq.ranges import Histogram, TensorRange
from qdq.spec import QuantSpec

__all__ = ["Percentile"]


@dataclass(frozen=True, slots=True)
class Percentile:
    """Between two quantiles, with half of the rest beyond each; 100 is the full range.

    The quantiles are interpolated within the bins of the histogram, so their error is below a
    bin's width (at most 1/4096 of the full range where the values spread over it).

    Attributes:
        percentile: share of the values that must not saturate, in percent, in (50, 100].

    Raises:
        ConfigError: if percentile is no number, or outside (50, 100].
    """

    percentile: float = 99.99
    name: ClassVar[str] = "percentile"
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        right = is_number(self.percentile) and 50 < self.percentile <= 100
        want("percentile", self.percentile, right, "a number in (50, 100], as 99.99")
        # statistics know a calibrator by its repr
        object.__setattr__(self, "percentile", float(self.percentile))

    def summarize(self, x: NDArray[np.floating]) -> Histogram:
        """Return the histogram of x; of a large x, of evenly spaced values."""
        return histogram_of(x)

    def gatherer(self) -> Counted:
        """Return what counts sample after sample."""
        return Counted()

    def merge(self, a: Histogram, b: Histogram) -> Histogram:
        """Return the histogram of both."""
        return a.merge(b)

    def range(self, summary: Histogram, spec: QuantSpec) -> TensorRange:
        """Return the interpolated quantiles (100 - percentile) / 2 from either end."""
        if self.percentile == 100:
            return full_range(summary)
        edges = summary.edges
        below = np.concatenate(([0.0], np.cumsum(summary.nonzero_counts)))
        if summary.zeros:
            # Exact zeros are no part of bin 0's spread but a step of the distribution at 0.
            at = -summary.start
            edges = np.insert(edges, at, 0.0)
            below = np.insert(below, at, below[at])
            below[at + 1 :] += summary.zeros
        tail = (100 - self.percentile) / 200 * below[-1]
        low, high = np.interp([tail, below[-1] - tail], below, edges)
        return inner_range(summary, float(low), float(high))
