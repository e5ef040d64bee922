"""Channel means and ranges of tensors, exact in any order of samples. Numpy only.

A float sum depends on the order of its terms, so the same data in another order would give other
bytes. Here each sample's mean is rounded to float32 and split into an integer and a power of two;
the integers are added up per range of exponents, which no order can change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.reading import Reading
from qdq.errors import CalibrationError
from qdq.ranges import TensorRange

__all__ = ["ChannelSum", "Means"]

_LOWEST = -176  # below float32's least subnormal, whose 24 bits start at 2**-172
_SPAN = 16  # exponents per bin: 24 + 16 bits a term leave room for 2**23 samples in int64
_BINS = (128 - _LOWEST) // _SPAN + 1
_HELD = 32  # means of a tensor that wait to be added up


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSum:
    """The exact sum of float32 vectors, one entry a channel, and the range of each channel.

    Attributes:
        bins: int64 (bins, C): sum of the mantissas whose exponent lies in the bin.
        count: number of vectors.
        reach: smallest and largest value in each channel, shape (C,).
    """

    bins: NDArray[np.int64]
    count: int
    reach: TensorRange

    @staticmethod
    def of(means: NDArray[np.float32], reach: TensorRange) -> "ChannelSum":
        """The sum of vectors, (samples, C), all finite."""
        mantissa, exponent = np.frexp(means)
        place = exponent.astype(np.int64) - 24 - _LOWEST
        whole = np.ldexp(mantissa, 24).astype(np.int64) << (place % _SPAN)
        bins = np.zeros((_BINS, means.shape[1]), np.int64)
        for bin_ in np.flatnonzero(np.bincount((place // _SPAN).ravel())):
            bins[bin_] = whole.sum(axis=0, where=place // _SPAN == bin_)
        return ChannelSum(bins, len(means), reach)

    def merge(self, other: "ChannelSum") -> "ChannelSum":
        """Both together; exactly associative and commutative."""
        reach = self.reach.union(other.reach)
        return ChannelSum(self.bins + other.bins, self.count + other.count, reach)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean vector, (C,)."""
        powers = np.ldexp(1.0, _LOWEST + _SPAN * np.arange(_BINS))
        total: NDArray[np.float64] = np.einsum("bc,b->c", self.bins.astype(np.float64), powers)
        return total / self.count


class Means:
    """Adds up what readings say of tensors' channels.

    Args:
        names: of the tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._waiting = {name: _Waiting() for name in names}
        self._sums: dict[str, ChannelSum] = {}

    def add(self, readings: Mapping[str, Reading], sample: int = 0) -> None:
        """Add one sample.

        Args:
            readings: tensor → its reading, with channels; empty ones are left out.
            sample: index of the sample, for errors.

        Raises:
            CalibrationError: if a tensor's channels differ between samples.
        """
        for name, held in self._waiting.items():
            reading = readings[name]
            if reading.empty or not np.isfinite(reading.mean).all():
                continue  # NaN and Inf are refused where ranges are taken
            if held.channels not in (None, reading.mean.size):
                raise CalibrationError(
                    f"tensor '{name}' has {reading.mean.size} channels in calibration sample "
                    f"{sample}, but {held.channels} before",
                    tensor=name,
                    sample=sample,
                )
            held.add(reading)
            if len(held.means) == _HELD:
                held.add_up(name, self._sums)

    def sums(self) -> dict[str, ChannelSum]:
        """Tensor → the sum of its samples; those that were always empty have none."""
        for name, held in self._waiting.items():
            held.add_up(name, self._sums)
        return self._sums


class _Waiting:
    """What samples have given of a tensor, before it is added up: many at a time is much faster."""

    def __init__(self) -> None:
        self.means: list[NDArray[np.float32]] = []
        self._low = self._high = np.zeros(0, np.float32)

    @property
    def channels(self) -> int | None:
        """Number of channels; None before the first sample."""
        return self._low.size or None

    def add(self, reading: Reading) -> None:
        """Note mean and range of each channel in one sample."""
        # + 0.0 turns -0.0 into 0.0, which of them is met first must not matter
        low, high = (end + np.float32(0) for end in (reading.low, reading.high))
        if self._low.size:
            np.minimum(self._low, low, out=self._low)
            np.maximum(self._high, high, out=self._high)
        else:
            self._low, self._high = low, high
        self.means.append(reading.mean)

    def add_up(self, name: str, sums: dict[str, ChannelSum]) -> None:
        """Add the means that wait to their sum."""
        if not self.means:
            return
        found = ChannelSum.of(np.stack(self.means), TensorRange(self._low, self._high))
        sums[name] = sums[name].merge(found) if name in sums else found
        self.means.clear()
