"""Channel means of tensors, exact in any order of samples. Numpy only.

A float sum depends on the order of its terms, so the same data in another order would give other
bytes. Here each sample's mean is rounded to float32 and split into an integer and a power of two;
the integers are added up per range of exponents, which no order can change.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.errors import CalibrationError

__all__ = ["ChannelSum", "watch_means"]

_LOWEST = -176  # below float32's least subnormal, whose 24 bits start at 2**-172
_SPAN = 16  # exponents per bin: 24 + 16 bits a term leave room for 2**23 samples in int64
_BINS = (128 - _LOWEST) // _SPAN + 1


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSum:
    """The exact sum of float32 vectors, one entry a channel.

    Attributes:
        bins: int64 (bins, C): sum of the mantissas whose exponent lies in the bin.
        count: number of vectors.
    """

    bins: NDArray[np.int64]
    count: int

    @staticmethod
    def of(x: NDArray[np.floating], axis: int) -> "ChannelSum":
        """The mean of one sample over all axes but ``axis``, as a sum of one vector."""
        return ChannelSum._of_mean(_channel_mean(x, axis))

    @staticmethod
    def _of_mean(mean: NDArray[np.float64]) -> "ChannelSum":
        value = mean.astype(np.float32)
        mantissa, exponent = np.frexp(value)
        place = exponent.astype(np.int64) - 24 - _LOWEST
        whole = np.rint(np.ldexp(mantissa.astype(np.float64), 24)).astype(np.int64)
        bins = np.zeros((_BINS, value.size), np.int64)
        bins[place // _SPAN, np.arange(value.size)] = whole << (place % _SPAN)
        return ChannelSum(bins, 1)

    def merge(self, other: "ChannelSum") -> "ChannelSum":
        """Both together; exactly associative and commutative."""
        return ChannelSum(self.bins + other.bins, self.count + other.count)

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


def watch_means(
    batches: Iterable[Mapping[str, NDArray[np.floating]]],
    axes: Mapping[str, int],
    sums: dict[str, ChannelSum],
    first: int = 0,
) -> Iterator[Mapping[str, NDArray[np.floating]]]:
    """Pass batches on and add the channel means of the named tensors to ``sums``.

    Args:
        batches: one mapping tensor → array per sample.
        axes: tensor → its channel axis.
        sums: filled as the batches go by; empty arrays are left out.
        first: index of the first sample, for errors.

    Raises:
        CalibrationError: if a tensor's channels differ between samples.
    """
    for sample, batch in enumerate(batches, first):
        for name, axis in axes.items():
            x = np.asarray(batch[name])
            if x.size == 0:
                continue
            mean = _channel_mean(x, axis)
            if not np.isfinite(mean).all():
                continue  # NaN and Inf are refused where ranges are taken
            found = ChannelSum._of_mean(mean)
            if name in sums and sums[name].bins.shape != found.bins.shape:
                raise CalibrationError(
                    f"tensor '{name}' has {found.bins.shape[1]} channels in calibration sample "
                    f"{sample}, but {sums[name].bins.shape[1]} before",
                    tensor=name,
                    sample=sample,
                )
            sums[name] = sums[name].merge(found) if name in sums else found
        yield batch
