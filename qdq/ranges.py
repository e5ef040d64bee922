"""Ranges of tensor values: the currency between calibration and the solver. Numpy only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError
from qdq.extent import extremes

__all__ = ["MAX_BINS", "Counting", "Histogram", "TensorRange"]

MAX_BINS = 8192
"""Most bins of a histogram; data that fills its range has more than half as many."""

_NONE = np.zeros(1, np.int64)

_CHUNK = 1 << 16
"""Elements at a time: temporaries stay in the cache, and memory stays bounded."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorRange:
    """The closed interval [low, high] of a tensor's values.

    Attributes:
        low: float32 array, shape () or (C,).
        high: same shape; low <= high, both finite.

    Raises:
        CalibrationError: if low or high is not finite, or low > high.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def __post_init__(self) -> None:
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        if low.shape != high.shape or not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError(f"a range must be finite; found [{low}, {high}]")
        if (low > high).any():
            raise CalibrationError(f"a range must have low <= high; found [{low}, {high}]")
        low.setflags(write=False)
        high.setflags(write=False)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorRange):
            return NotImplemented
        return np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @classmethod
    def of(cls, x: NDArray[np.floating]) -> "TensorRange":
        """The range of all values of an array, as float32.

        Args:
            x: any shape and float type, at least one value.

        Raises:
            CalibrationError: if x is empty or holds NaN or Inf.
        """
        return cls(*(np.asarray(bound, np.float32) for bound in extremes(x)))

    def union(self, other: "TensorRange") -> "TensorRange":
        """The smallest range that holds both; associative, commutative, idempotent."""
        return TensorRange(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Dyadic histogram of a tensor's values: exact to merge, in any order and any split.

    The bin width is a power of two and the bins are anchored at 0: bin k holds the values v
    with ``k * 2**exponent <= v < (k + 1) * 2**exponent``. So a coarser histogram is the finer
    one with whole bins added up, and no count is ever guessed. The exponent is a function of
    the smallest and largest value alone, so merging two halves gives, bit for bit, the
    histogram of all the data at once.

    Attributes:
        exponent: of the bin width, at least -126.
        start: index k of the first bin, ``floor(low / 2**exponent)``.
        counts: int64 (n,), values per bin, n <= MAX_BINS; the first and last are above 0.
        low: the smallest value seen (exactly; a float32).
        high: the largest value seen.
        zeros: how many values are exactly 0, which every quantization represents without error;
            they are counted in bin 0 too.

    The fields are plain numbers and one array: saving them and building a Histogram from what
    was saved gives an equal one.

    Raises:
        CalibrationError: if the fields contradict each other.
    """

    exponent: int
    start: int
    counts: NDArray[np.int64]
    low: float
    high: float
    zeros: int

    def __post_init__(self) -> None:
        for name, kind in (("exponent", int), ("start", int), ("zeros", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("low", "high"):  # + 0.0 turns -0.0 into 0.0
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        counts = np.array(self.counts, np.int64)
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise CalibrationError(
                f"a histogram wants finite low <= high; found [{self.low}, {self.high}]"
            )
        want = _layout(self.low, self.high)
        if (self.exponent, self.start, *counts.shape) != want or self.zeros > counts.sum():
            raise CalibrationError(
                f"a histogram over [{self.low}, {self.high}] wants exponent, start and number of "
                f"bins {want}; found {(self.exponent, self.start, *counts.shape)} and "
                f"{self.zeros} zeros; it was damaged or not made by Histogram.of"
            )

    @classmethod
    def of(cls, x: NDArray[np.floating]) -> "Histogram":
        """Histogram of the values of an array, as float32.

        Args:
            x: any shape, float16, float32 or float64, at least one value.

        Raises:
            CalibrationError: if x is empty or holds NaN or Inf.
        """
        counting = Counting()
        counting.add(x)
        return counting.histogram()

    def merge(self, other: "Histogram") -> "Histogram":
        """The histogram of both sets of values; associative and commutative, exactly."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent, start, size = _layout(low, high)
        counts = np.zeros(size, np.int64)
        for part in (self, other):
            part._add_to(counts, exponent, start)
        return Histogram(exponent, start, counts, low, high, self.zeros + other.zeros)

    def mapped(self, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> "Histogram":
        """The histogram of a rising function of the values, each taken at its bin's centre."""
        low, high = (float(v) for v in function(np.array([self.low, self.high])))
        exponent, start, size = _layout(low, high)
        centre = function((self.edges[:-1] + self.edges[1:]) / 2)
        place = np.floor(np.clip(centre, low, high) * 2.0**-exponent).astype(np.int64) - start
        counts = np.zeros(size, np.int64)
        np.add.at(counts, np.clip(place, 0, size - 1), self.counts)
        return Histogram(exponent, start, counts, low, high, 0)

    def _add_to(self, counts: NDArray[np.int64], exponent: int, start: int) -> None:
        """Add the counts to those of a histogram that covers this one."""
        first, coarse = self.coarsened(exponent)
        counts[first - start : first - start + coarse.size] += coarse

    def coarsened(self, exponent: int) -> tuple[int, NDArray[np.int64]]:
        """First bin and counts with bins of 2**exponent, not below the histogram's exponent."""
        start, counts = self.start, self.counts
        # Indices fit 25 bits, so any shift above that has the same result.
        for _ in range(min(exponent - self.exponent, 62)):
            before, behind = start & 1, (start + counts.size) & 1
            if before or behind:
                counts = np.concatenate((_NONE[:before], counts, _NONE[:behind]))
            start, counts = (start - before) >> 1, counts[::2] + counts[1::2]
        return start, counts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        mine = (self.exponent, self.start, self.low, self.high, self.zeros)
        theirs = (other.exponent, other.start, other.low, other.high, other.zeros)
        return mine == theirs and np.array_equal(self.counts, other.counts)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bin edges, (n + 1,) ascending; the outermost two are exactly low and high."""
        edges = (self.start + np.arange(self.counts.size + 1, dtype=np.float64)) * self.width
        edges[0], edges[-1] = self.low, self.high
        return edges

    @property
    def nonzero_counts(self) -> NDArray[np.int64]:
        """The counts without the values that are exactly 0."""
        counts = self.counts.copy()
        if self.zeros:
            counts[-self.start] -= self.zeros
        return counts


class Counting:
    """A histogram in the making: values are counted into it one array after the other, in place.

    ``histogram()`` then is that of all of them, as if each array had one of its own and these
    were merged.
    """

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._zeros = self._exponent = self._start = 0
        self._counts = _NONE[:0]

    def add(
        self,
        values: NDArray[np.floating],
        step: int = 1,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        """Count the values of an array, or some of them.

        Args:
            values: as for ``Histogram.of``.
            step: how many values each of them stands for. Where not all are there, the smallest
                and the largest of all are counted besides.
            bounds: the smallest and largest of all, finite, where they are known.

        Raises:
            CalibrationError: as ``Histogram.of``.
        """
        low, high = extremes(values) if bounds is None else bounds
        self._cover(min(low, self._low), max(high, self._high))
        self._count(np.ravel(values, order="K"), step)
        if step == 1:
            return
        for value in (low, high):
            self._counts[math.floor(math.ldexp(value, -self._exponent)) - self._start] += 1
            self._zeros += value == 0

    def histogram(self) -> Histogram:
        """The histogram of all values so far; there must be one."""
        layout = self._exponent, self._start
        return Histogram(*layout, self._counts, self._low, self._high, self._zeros)

    def _cover(self, low: float, high: float) -> None:
        """Make room for values from low to high; what is counted moves to the new bins."""
        if (low, high) == (self._low, self._high):
            return
        exponent, start, size = _layout(low, high)
        if (exponent, start, size) != (self._exponent, self._start, self._counts.size):
            counts = np.zeros(size, np.int64)
            if self._counts.size:
                self.histogram()._add_to(counts, exponent, start)
            self._exponent, self._start, self._counts = exponent, start, counts
        self._low, self._high = low, high

    def _count(self, flat: NDArray[np.floating], weight: int) -> None:
        # Dividing by 2**exponent is exact, but for tiny values under a wide range: those could
        # underflow to -0.0 and land in bin 0 in place of bin -1. float64 has room for them.
        work = np.float64 if self._exponent > 0 and self._start < 0 else np.float32
        for at in range(0, flat.size, _CHUNK):
            chunk = np.ascontiguousarray(flat[at : at + _CHUNK], np.float32)
            self._zeros += weight * int(np.count_nonzero(chunk == 0))  # faster than without ==
            bins = chunk * work(2.0**-self._exponent)
            if self._start < 0:  # from 0 up the conversion to integers rounds down
                np.floor(bins, out=bins)
            if self._start:
                bins -= work(self._start)
            # By way of int32, which the processor converts to at once; numpy counts intp.
            found = np.bincount(bins.astype(np.int32), minlength=self._counts.size)
            if weight > 1:
                found *= weight
            self._counts += found


def _layout(low: float, high: float) -> tuple[int, int, int]:
    """Exponent, first bin and number of bins for data from low to high.

    The smallest exponent for which at most MAX_BINS bins cover the data, but not below the
    float32 grid of the largest value (a finer bin could hold nothing more) nor below -126 (a
    scale for smaller values would be subnormal). Each of the three bounds only grows when the
    range grows, so merging never has to split a bin.
    """
    grid = math.frexp(max(-low, high))[1] - 24
    span = math.frexp((high - low) / MAX_BINS)[1] - 2 if high > low else grid
    exponent = max(grid, span, -126)
    while True:
        first = math.floor(math.ldexp(low, -exponent))
        size = math.floor(math.ldexp(high, -exponent)) - first + 1
        if size <= MAX_BINS:
            return exponent, first, size
        exponent += 1
