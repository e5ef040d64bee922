"""The full range of the values."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.reading import Reading
from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["MinMax"]


@dataclass(frozen=True, slots=True)
class MinMax:
    """From the smallest to the largest value seen: nothing saturates on the calibration data.

    The fastest calibrator, and the right one unless outliers stretch the range.
    """

    name: ClassVar[str] = "minmax"
    counts: ClassVar[bool] = False

    def summarize(self, x: NDArray[np.floating]) -> TensorRange:
        """Return the smallest and largest value of x."""
        return TensorRange.of(x)

    def gatherer(self) -> "Bounded":
        """Return what takes the minimum and maximum of sample after sample."""
        return Bounded()

    def merge(self, a: TensorRange, b: TensorRange) -> TensorRange:
        """Return the union of both ranges."""
        return a.union(b)

    def range(self, summary: TensorRange, spec: QuantSpec) -> TensorRange:
        """Return the summary as it is."""
        return summary


class Bounded:
    """The range of all samples, as a ``Gatherer``."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def add(self, reading: Reading) -> None:
        """Widen the range to the values of a sample."""
        low, high = reading.extent()
        self._low, self._high = min(low, self._low), max(high, self._high)

    def summary(self) -> TensorRange:
        """The range; there must have been a reading."""
        return TensorRange(np.asarray(self._low), np.asarray(self._high))
