"""The range that keeps the most information: least Kullback-Leibler divergence."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.search import (
    Counted,
    FloatArray,
    Objective,
    extent,
    full_range,
    histogram_of,
    inner_range,
    search,
)
from qdq.checks import is_whole, want
from qdq.ranges import MAX_BINS, Histogram, TensorRange
from qdq.spec import QuantSpec

__all__ = ["Entropy"]

_EVIDENCE = 8.0
"""Nats, over all values, by which a narrower range must win: about the logarithm of the number
of candidates. Below that the noise of the histogram decides, as with a few hundred values."""

_MOST_CUT = 2e-4
"""Largest share of the values that may saturate. Divergence alone does not see how far a
saturated value is moved: beside a value that occurs over and over, as the background of an
image gives, it would cut off a third of the others."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The range whose quantized distribution diverges least from the real one.

    The measure is Migacz's (8-bit Inference with TensorRT, GTC 2017): for a candidate range, P
    is the histogram with the values outside added to the outermost bins, and Q spreads the mass
    that falls to each code (without the values outside) evenly over the non-empty bins of the
    code; the range with the least KL(P || Q) wins. Unlike there, both ends are searched, so a
    skewed or one-sided tensor wastes no codes, and at most two values in ten thousand may
    saturate, but for some in the bins where the range ends. Exact zeros are left out: they always
    have a code. Types with more codes than the histogram has bins (16 bits) get the full range,
    since rounding then loses nothing that the histogram shows.

    Attributes:
        bins: the least number of bins that the full range is divided into where the values
            spread over it, in [256, 4096]. The narrowest range that can be found has one bin
            per code, so more bins can cut farther outliers.

    Raises:
        ConfigError: if bins is no whole number, or outside [256, 4096].
    """

    bins: int = 2048
    name: ClassVar[str] = "entropy"
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        right = is_whole(self.bins) and 256 <= self.bins <= MAX_BINS // 2
        want("bins", self.bins, right, f"a whole number in [256, {MAX_BINS // 2}]")
        object.__setattr__(self, "bins", int(self.bins))  # statistics know a calibrator by its repr

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
        """Return the range with the least divergence for the codes of spec."""
        coarser = max(summary.counts.size // self.bins, 1).bit_length() - 1
        exponent = summary.exponent + coarser
        start, counts = summary.coarsened(exponent)
        counts = counts.copy()
        if summary.zeros:
            counts[-start] -= summary.zeros
        codes = spec.qmax - spec.qmin + 1
        bins = max(start + counts.size, 0) - min(start, 0)
        if bins <= codes or np.count_nonzero(counts) < 2:
            return full_range(summary)
        divergence = _divergence(counts, start, 2.0**exponent, codes)
        octaves = math.ceil(math.log2(bins / codes)) + 1
        found = search(divergence, summary, symmetric=spec.symmetric, octaves=octaves)
        pair = np.array([extent(summary, symmetric=spec.symmetric), found[0]])
        whole, best = divergence(pair[:, 0], pair[:, 1])
        if (whole - best) * float(counts.sum()) < _EVIDENCE:
            return full_range(summary)
        return inner_range(summary, *found[0])


def _divergence(counts: NDArray[np.int64], start: int, width: float, codes: int) -> Objective:
    """KL(P || Q) of any range, from prefix sums: a few look-ups per code.

    With c the counts, N their sum, n the sum inside the range, and M and z the mass and the
    number of non-empty bins of a code, Q is (M / z) / n in the non-empty bins of the code, and
    N * KL = sum(c log c) - sum(M log(M / z)) + N log(n / N) + what the values outside add.
    Where those fall into an empty outermost bin, Q has its share there too, and n grows by it,
    so that KL is never below 0.
    """
    mass = counts.astype(np.float64)
    total = mass.sum()
    sums = np.zeros((3, counts.size + 1))  # of c, c log c and [c > 0] over the bins before an edge
    np.cumsum([mass, _xlogy(mass, mass), mass > 0], axis=1, out=sums[:, 1:])
    levels = np.linspace(0.0, 1.0, codes + 1)

    def objective(low: FloatArray, high: FloatArray) -> FloatArray:
        low, high = np.broadcast_arrays(low, high)
        shape = low.shape
        a, b = low.reshape(-1, 1) / width, high.reshape(-1, 1) / width
        edge = np.rint(a + (b - a) * levels)
        # The ends belong to the range: so do the bins that they lie in.
        edge[:, 0], edge[:, -1] = np.floor(a[:, 0]), np.floor(b[:, 0]) + 1
        wide = edge[:, -1] - edge[:, 0]
        edge = np.clip(edge - start, 0, counts.size).astype(np.intp)
        first, last = edge[:, 0], edge[:, -1]
        M = np.diff(sums[0][edge])
        z = np.diff(sums[2][edge])
        q_terms = (M * np.log(np.maximum(M, 1.0) / np.maximum(z, 1.0))).sum(axis=1)
        n = sums[0][last] - sums[0][first]
        kl = sums[1][last] - sums[1][first] - q_terms
        inner = mass[np.clip([first, last - 1], 0, counts.size - 1)]  # the outermost bins
        left, filled_left = _piled(sums[0][first], inner[0], M[:, 0], z[:, 0])
        right, filled_right = _piled(total - sums[0][last], inner[1], M[:, -1], z[:, -1])
        q_mass = np.maximum(n, 1.0) + filled_left + filled_right
        kl = (kl + left + right) / total + np.log(q_mass / total)
        # With fewer bins than codes every code keeps its bin and the divergence says nothing.
        kl = np.where((n >= (1 - _MOST_CUT) * total) & (wide >= codes), kl, np.inf)
        return kl.reshape(shape)

    return objective


def _piled(
    outside: FloatArray, inside: FloatArray, code_mass: FloatArray, code_bins: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """What the values outside add to N * KL by an outermost bin, and to the mass of Q.

    An empty bin is filled from its code, an empty code counts as one value.
    """
    q = np.maximum(code_mass, 1.0) / np.maximum(code_bins, 1.0)
    more = _xlogy(inside + outside, (inside + outside) / q) - _xlogy(inside, inside / q)
    return np.where(outside > 0, more, 0.0), np.where((outside > 0) & (inside == 0), q, 0.0)


def _xlogy(x: FloatArray, y: FloatArray) -> FloatArray:
    """``x * log(y)``, and 0 where x is 0."""
    return np.asarray(x * np.log(np.where(x > 0, y, 1.0)))
