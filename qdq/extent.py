"""The smallest and the largest value of an array. Numpy only."""

import math

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError

__all__ = ["ends", "extremes", "finite_extent"]


def extremes(x: NDArray[np.floating]) -> tuple[float, float]:
    """The smallest and the largest value of an array, as float32.

    Raises:
        CalibrationError: if x is empty or holds NaN or Inf.
    """
    low, high = ends(x)
    return finite_extent(float(low), float(high))


def ends(
    x: NDArray[np.floating], axis: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest value as float32, of each channel if there is an axis.

    NaN shows in both; inf and -inf are those of no value.
    """
    if x.dtype == np.float16:
        x = x.astype(np.float32)  # numpy's float16 minimum is slower than the cast
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    with np.errstate(invalid="ignore", over="ignore"):
        low = np.asarray(x.min(axis=others, initial=np.inf), np.float32)
        high = np.asarray(x.max(axis=others, initial=-np.inf), np.float32)
    return low, high


def finite_extent(low: float, high: float) -> tuple[float, float]:
    """The two ends of a tensor's values, as ``ends`` finds them.

    Raises:
        CalibrationError: if there is no value, or NaN or Inf among them.
    """
    if low > high:
        raise CalibrationError("an empty tensor has no range; skip it")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(f"the tensor holds NaN or Inf; found range [{low}, {high}]")
    return low, high
