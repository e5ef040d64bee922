"""Channel means and ranges of tensors, exact in any order of samples. Numpy only.

A float sum depends on the order of its terms, so the same data in another order would give other
bytes. Here each sample's mean is rounded to float32 and split into an integer and a power of two;
the integers are added up per range of exponents, which no order can change.
"""

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
        return ChannelSum._of_means(_channel_mean(x, axis)[None], _reach(x, axis))

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
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = x.mean(axis=others, dtype=np.float64)
    return mean


def _reach(x: NDArray[np.floating], axis: int) -> TensorRange:
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    # + 0.0 turns -0.0 into 0.0, which of them is met first must not matter
    low, high = (f(axis=others).astype(np.float32) + np.float32(0) for f in (x.min, x.max))
    return TensorRange(np.asarray(low), np.asarray(high))


def watch_means(
    batches: Iterable[Mapping[str, NDArray[np.floating]]],
    axes: Mapping[str, int],
    sums: dict[str, ChannelSum],
    first: int = 0,
) -> Iterator[Mapping[str, NDArray[np.floating]]]:
    """Pass batches on and add the channel means and ranges of the named tensors to ``sums``.

    Args:
        batches: one mapping tensor → array per sample.
        axes: tensor → its channel axis.
        sums: filled as the batches go by; empty arrays are left out.
        first: index of the first sample, for errors.

    Raises:
        CalibrationError: if a tensor's channels differ between samples.
    """
    waiting: dict[str, list[NDArray[np.float32]]] = {name: [] for name in axes}
    reach: dict[str, TensorRange] = {}
    for sample, batch in enumerate(batches, first):
        for name, axis in axes.items():
            x = np.asarray(batch[name])
            mean = _channel_mean(x, axis) if x.size else np.array([np.nan])
            if not np.isfinite(mean).all():
                continue  # empty; or NaN and Inf, which are refused where ranges are taken
            if name in reach and reach[name].low.size != mean.size:
                raise CalibrationError(
                    f"tensor '{name}' has {mean.size} channels in calibration sample {sample}, "
                    f"but {reach[name].low.size} before",
                    tensor=name,
                    sample=sample,
                )
            found = _reach(x, axis)
            reach[name] = reach[name].union(found) if name in reach else found
            waiting[name].append(mean.astype(np.float32))
            if len(waiting[name]) == _HELD:
                _add_up(name, waiting[name], reach[name], sums)
        yield batch
    for name, held in waiting.items():
        if held:
            _add_up(name, held, reach[name], sums)


def _add_up(
    name: str, held: list[NDArray[np.float32]], reach: TensorRange, sums: dict[str, ChannelSum]
) -> None:
    """Add the means that wait to their sum: many at a time is much faster."""
    found = ChannelSum._of_means(np.stack(held), reach)
    sums[name] = sums[name].merge(found) if name in sums else found
    held.clear()
