"""What calibration notes of one sample's values of a tensor. Numpy only.

A large tensor is not needed as a whole: the ends of its values, the means of its channels, and
for a histogram some of its values say what calibration wants to know, and all of these can be
had where the tensor is made, in the runtime.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdq.extent import ends, finite_extent

__all__ = ["SAMPLED", "STEPS", "Channels", "Reading", "step_for"]

SAMPLED = 1 << 14
"""Values that a histogram counts of each entry of a tensor's first axis, the batch: half a million
in 32 samples show as much of its shape as all, in a fraction of the time of running the model."""


def _primes(most: int) -> NDArray[np.int64]:
    sieve = np.ones(most, bool)
    sieve[:2] = False
    for p in range(2, math.isqrt(most) + 1):
        if sieve[p]:
            sieve[p * p :: p] = False
    return np.flatnonzero(sieve)


def _steps() -> tuple[int, ...]:
    """1, and primes that each are at most about a quarter above the one before."""
    primes = _primes(1 << 17)
    wanted = np.unique(np.searchsorted(primes, np.geomspace(2, primes[-1], 240)))
    return (1, *primes[wanted].tolist())


STEPS = _steps()
"""How far apart the counted values can be, ascending."""


def step_for(entry: int, most: int = SAMPLED) -> int:
    """How far apart values are counted, so that of an entry of the batch there are at most most.

    It has no divisor in common with the size of the entry: else it could meet the same few columns
    in every row.

    Args:
        entry: number of values in an entry.
        most: that are to be counted.

    Returns:
        The least of ``STEPS`` that does; 1 (all values) for a larger entry than there could be.
    """
    return next((s for s in STEPS if s * most >= entry and (s == 1 or entry % s)), 1)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one sample shows of a tensor's values.

    Attributes:
        low: smallest value, as float32; inf where there is no value, NaN where one is NaN.
        high: largest value; -inf where there is none.
        values: the values, or some of them, evenly spaced; (0,) where only ends were asked for.
        step: how many values each of them stands for.
    """

    low: float
    high: float
    values: NDArray[np.floating]
    step: int = 1

    @staticmethod
    def of(x: NDArray[np.floating], *, spread: bool = False) -> "Reading":
        """A reading of an array.

        Args:
            x: any shape and float type.
            spread: of a large array only ``SAMPLED`` values of each entry are handed on.
        """
        low, high = ends(x)
        step = step_for(math.prod(x.shape[1:])) if spread else 1
        values = np.ravel(x)[::step] if step > 1 else x
        return Reading(float(low), float(high), values, step)

    @property
    def empty(self) -> bool:
        """Whether there was no value."""
        return self.low > self.high

    def extent(self) -> tuple[float, float]:
        """The smallest and the largest value.

        Raises:
            CalibrationError: if there is no value, or NaN or Inf among them.
        """
        # + 0.0 turns -0.0 into 0.0: which of them is met first must not matter
        return finite_extent(self.low + 0.0, self.high + 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """What one sample shows of the channels of some tensors, one tensor behind the other.

    Attributes:
        names: of the tensors.
        sizes: number of channels of each.
        low: float32, smallest value of each channel; inf where there is no value.
        high: largest value; -inf where there is none.
        mean: of the values; NaN or Inf where one is.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    mean: NDArray[np.float32]

    @staticmethod
    def of(arrays: Mapping[str, NDArray[np.floating]], axes: Mapping[str, int]) -> "Channels":
        """Those of arrays.

        Args:
            arrays: tensor → values, of any shape and float type.
            axes: tensor → its channel axis.
        """
        extents = [ends(arrays[name], axis) for name, axis in axes.items()]
        means = [_mean(arrays[name], axis) for name, axis in axes.items()]
        return Channels(
            tuple(axes),
            tuple(mean.size for mean in means),
            np.concatenate([_NONE, *(low for low, _ in extents)]),
            np.concatenate([_NONE, *(high for _, high in extents)]),
            np.concatenate([_NONE, *means]),
        )

    def with_(self, other: "Channels") -> "Channels":
        """These and those of other tensors."""
        if not other.names:
            return self
        return Channels(
            self.names + other.names,
            self.sizes + other.sizes,
            np.concatenate([self.low, other.low]),
            np.concatenate([self.high, other.high]),
            np.concatenate([self.mean, other.mean]),
        )


_NONE = np.zeros(0, np.float32)


def _mean(x: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
    """Mean over all axes but one, (C,); NaN or Inf where a value is, 0 where there is none."""
    axes = "abcdefghijklmnop"[: x.ndim]
    with np.errstate(invalid="ignore", over="ignore"):
        # numpy's mean() takes longer to convert to float64
        total = np.einsum(f"{axes}->{axes[axis]}", x, dtype=np.float64)
        return np.asarray(total / max(x.size // max(total.size, 1), 1), np.float32)
