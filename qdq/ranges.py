"""Ranges of tensor values: the currency between calibration and the solver. Numpy only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError

__all__ = ["TensorRange"]


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

    __hash__ = None  # type: ignore[assignment]

    def union(self, other: "TensorRange") -> "TensorRange":
        """The smallest range that holds both; associative, commutative, idempotent."""
        return TensorRange(np.minimum(self.low, other.low), np.maximum(self.high, other.high))
