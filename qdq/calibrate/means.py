"""Channel means and ranges of tensors, exact in any order of samples. Numpy only.

A float sum depends on the order of its terms, so the same data in another order would give other
bytes. Here each sample's mean is rounded to float32 and split into an integer and a power of two;
the integers are added up per range of exponents, which no order can change.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.reading import Channels
from qdq.errors import CalibrationError
from qdq.ranges import TensorRange

__all__ = ["ChannelSum", "Means"]

_LOWEST = -176  # below float32's least subnormal, whose 24 bits start at 2**-172
_SPAN = 16  # exponents per bin: 24 + 16 bits a term leave room for 2**23 samples in int64
_BINS = (128 - _LOWEST) // _SPAN + 1
_HELD = 32  # samples whose means wait to be added up


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

    def merge(self, other: "ChannelSum") -> "ChannelSum":
        """Both together; exactly associative and commutative."""
        reach = self.reach.union(other.reach)
        return ChannelSum(self.bins + other.bins, self.count + other.count, reach)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelSum):
            return NotImplemented
        same = self.count == other.count and self.reach == other.reach
        return same and np.array_equal(self.bins, other.bins)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean vector, (C,)."""
        powers = np.ldexp(1.0, _LOWEST + _SPAN * np.arange(_BINS))
        total: NDArray[np.float64] = np.einsum("bc,b->c", self.bins.astype(np.float64), powers)
        return total / self.count


def _binned(means: NDArray[np.float32]) -> NDArray[np.int64]:
    """(bins, C): the exact sum of finite vectors, (samples, C), per range of exponents.

    Of up to 2**13 samples: a term has 24 + 16 bits, and float64 holds sums of 53.
    """
    channels = means.shape[1]
    mantissa, exponent = np.frexp(means)
    place = exponent.astype(np.int64) - 24 - _LOWEST
    whole = np.ldexp(mantissa.astype(np.float64), 24 + place % _SPAN)
    at = place // _SPAN * channels + np.arange(channels)
    bins = np.bincount(at.ravel(), whole.ravel(), _BINS * channels)
    return bins.reshape(_BINS, channels).astype(np.int64)


class Means:
    """Adds up what samples show of tensors' channels, all channels of all tensors at a time."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._low = self._high = np.zeros(0, np.float32)
        self._bins = np.zeros((_BINS, 0), np.int64)
        self._count = np.zeros(0, np.int64)  # of each tensor
        self._held = np.zeros((0, 0), np.float32)  # means that wait, one row a sample
        self._waiting = 0

    def add(self, channels: Channels, sample: int = 0) -> None:
        """Add one sample; what it shows of a tensor that is empty or not finite is left out.

        Args:
            channels: of the same tensors in each sample.
            sample: its index, for errors.

        Raises:
            CalibrationError: if a tensor's channels differ between samples.
        """
        if not self._names:
            self._begin(channels)
        self._want_sizes(channels, sample)
        # + 0.0 turns -0.0 into 0.0, which of them is met first must not matter
        low, high = (end + np.float32(0) for end in (channels.low, channels.high))
        mean = channels.mean
        bad = ~np.isfinite(mean) | (low > high)  # NaN and Inf are refused where ranges are taken
        if bad.any():
            left_out = np.logical_or.reduceat(np.append(bad, False), self._starts)
            left_out &= np.asarray(self._sizes) > 0
            self._count += ~left_out
            every = np.repeat(left_out, self._sizes)
            low, high = np.where(every, np.inf, low), np.where(every, -np.inf, high)
            mean = np.where(every, np.float32(0), mean)
        else:
            self._count += 1
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        self._held[self._waiting] = mean  # a copy: it may be a part of all that was read
        self._waiting += 1
        if self._waiting == _HELD:
            self._add_up()

    def sums(self) -> dict[str, ChannelSum]:
        """Tensor → the sum of its samples; those that were always empty have none."""
        self._add_up()
        found = {}
        for k, (name, start, size) in enumerate(
            zip(self._names, self._starts, self._sizes, strict=True)
        ):
            if size and self._count[k]:
                own = slice(start, start + size)
                reach = TensorRange(self._low[own], self._high[own])
                found[name] = ChannelSum(self._bins[:, own].copy(), int(self._count[k]), reach)
        return found

    def _begin(self, channels: Channels) -> None:
        self._names, self._sizes = channels.names, channels.sizes
        self._low = np.full(channels.low.size, np.inf, np.float32)
        self._high = np.full(channels.low.size, -np.inf, np.float32)
        self._bins = np.zeros((_BINS, channels.low.size), np.int64)
        self._count = np.zeros(len(channels.names), np.int64)
        self._held = np.zeros((_HELD, channels.low.size), np.float32)

    def _want_sizes(self, channels: Channels, sample: int) -> None:
        if channels.sizes == self._sizes:
            return
        name, size, before = next(
            (name, size, before)
            for name, size, before in zip(self._names, channels.sizes, self._sizes, strict=True)
            if size != before
        )
        raise CalibrationError(
            f"tensor '{name}' has {size} channels in calibration sample {sample}, but {before} "
            "before",
            tensor=name,
            sample=sample,
        )

    @property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self._sizes)][: len(self._sizes)]

    def _add_up(self) -> None:
        if self._waiting:
            self._bins += _binned(self._held[: self._waiting])
            self._waiting = 0
