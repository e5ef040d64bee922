"""Channel means and ranges of tensors, exact in any order of samples. Numpy only.

A float sum depends on the order of its terms, so the same data in another order would give other
bytes. Here each sample's mean is rounded to float32 and split into an integer and a power of two;
the integers are added up per range of exponents, which no order can change.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError
from qdq.ranges import TensorRange

__all__ = ["ChannelSum", "watch_means"]

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
    def of(x: NDArray[np.floating], axis: int) -> "ChannelSum":
        """The mean of one sample over all axes but ``axis``, as a sum of one vector."""
        reach = TensorRange(*_reach(x, axis))
        return ChannelSum._of_means(_channel_mean(x, axis)[None], reach)

    @staticmethod
    def _of_means(means: NDArray[np.floating], reach: TensorRange) -> "ChannelSum":
        """The sum of finite vectors, (samples, C)."""
        mantissa, exponent = np.frexp(means.astype(np.float32, copy=False))
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


def _channel_mean(x: NDArray[np.floating], axis: int) -> NDArray[np.float64]:
    """Mean over all axes but one, (C,); NaN or Inf where a value is."""
    axes = "abcdefghijklmnop"[: x.ndim]
    with np.errstate(invalid="ignore"):
        # numpy's mean() takes longer to convert to float64
        total: NDArray[np.float64] = np.einsum(f"{axes}->{axes[axis]}", x, dtype=np.float64)
        total /= x.size // total.size
    return total


def _reach(x: NDArray[np.floating], axis: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest value of each channel."""
    axis %= x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    if axis < x.ndim - 1 and x.flags.c_contiguous:
        # each channel is in one piece (of each sample of a batch); min() is slow for short ones
        rows = math.prod(x.shape[: axis + 1])
        pieces = np.arange(0, x.size, x.size // rows)
        ends = [f.reduceat(x.reshape(-1), pieces) for f in (np.minimum, np.maximum)]
        shape = (-1, x.shape[axis])
        low, high = ends[0].reshape(shape).min(axis=0), ends[1].reshape(shape).max(axis=0)
    else:
        low, high = x.min(axis=others), x.max(axis=others)
    # + 0.0 turns -0.0 into 0.0, which of them is met first must not matter
    return low.astype(np.float32) + np.float32(0), high.astype(np.float32) + np.float32(0)


def watch_means(
    batches: Iterable[Mapping[str, NDArray[np.floating]]],
    axes: Mapping[str, int],
    sums: dict[str, ChannelSum],
    first: int = 0,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Iterator[Mapping[str, NDArray[np.floating]]]:
    """Pass batches on and add the channel means and ranges of the named tensors to ``sums``.

    Args:
        batches: one mapping tensor → array per sample.
        axes: tensor → its channel axis.
        sums: filled as the batches go by; empty arrays are left out.
        first: index of the first sample, for errors.
        bounds: filled, before a batch is passed on, with the smallest and largest value of the
            tensors in it, where these are finite.

    Raises:
        CalibrationError: if a tensor's channels differ between samples.
    """
    bounds = {} if bounds is None else bounds
    waiting = {name: _Waiting() for name in axes}
    for sample, batch in enumerate(batches, first):
        bounds.clear()
        for name, axis in axes.items():
            x = np.asarray(batch[name])
            mean = _channel_mean(x, axis) if x.size else np.array([np.nan])
            if not np.isfinite(mean).all():
                continue  # empty; or NaN and Inf, which are refused where ranges are taken
            held = waiting[name]
            if held.channels not in (None, mean.size):
                raise CalibrationError(
                    f"tensor '{name}' has {mean.size} channels in calibration sample {sample}, "
                    f"but {held.channels} before",
                    tensor=name,
                    sample=sample,
                )
            low, high = _reach(x, axis)
            held.add(mean.astype(np.float32), low, high)
            extent = float(low.min()), float(high.max())
            if np.isfinite(extent).all():
                bounds[name] = extent
            if len(held.means) == _HELD:
                held.add_up(name, sums)
        yield batch
    for name, held in waiting.items():
        held.add_up(name, sums)


class _Waiting:
    """What samples have given of a tensor, before it is added up: many at a time is much faster."""

    def __init__(self) -> None:
        self.means: list[NDArray[np.float32]] = []
        self._low = self._high = np.zeros(0, np.float32)

    @property
    def channels(self) -> int | None:
        """Number of channels; None before the first sample."""
        return self._low.size or None

    def add(
        self, mean: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]
    ) -> None:
        """Note mean and range of each channel in one sample."""
        if self._low.size:
            np.minimum(self._low, low, out=self._low)
            np.maximum(self._high, high, out=self._high)
        else:
            self._low, self._high = low, high
        self.means.append(mean)

    def add_up(self, name: str, sums: dict[str, ChannelSum]) -> None:
        """Add the means that wait to their sum."""
        if not self.means:
            return
        found = ChannelSum._of_means(np.stack(self.means), TensorRange(self._low, self._high))
        sums[name] = sums[name].merge(found) if name in sums else found
        self.means.clear()
