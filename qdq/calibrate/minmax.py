"""The full range of the values."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["MinMax"]


@dataclass(frozen=True, slots=True)
class MinMax:
    """From the smallest to the largest value seen: nothing saturates on the calibration data.

    The fastest calibrator, and the right one unless outliers stretch the range.
    """

    name: ClassVar[str] = "minmax"

    def summarize(self, x: NDArray[np.floating]) -> TensorRange:
        """Return the smallest and largest value of x."""
        return TensorRange.of(x)

    def extend(self, summary: TensorRange, x: NDArray[np.floating]) -> TensorRange:
        """Return the union of the range and that of x."""
        return summary.extended(x)

    def merge(self, a: TensorRange, b: TensorRange) -> TensorRange:
        """Return the union of both ranges."""
        return a.union(b)

    def range(self, summary: TensorRange, spec: QuantSpec) -> TensorRange:
        """Return the summary as it is."""
        return summary
