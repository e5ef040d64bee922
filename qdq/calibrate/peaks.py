"""What is noted of scores that a Softmax makes weights of, row by row. Numpy only."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["DENORMAL", "Peaks"]

DENORMAL = 87.0  #: exp(-DENORMAL) is next to the smallest normal number of float32


def _none() -> NDArray[np.float32]:
    return np.zeros((3, 0), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Peaks:
    """The peaks of some tensors, each the largest score of a row; a row is along the last axis.

    Attributes:
        names: of the tensors.
        numbers: (3, n) float32, for each of them the lowest peak (inf where there was no row), the
            highest one (-inf there), and the share of rows with a score more than ``DENORMAL``
            below their peak, in the sample that has most of them. The runtime's reductions leave
            out scores that are NaN.
    """

    names: tuple[str, ...] = ()
    numbers: NDArray[np.float32] = field(default_factory=_none)

    def merge(self, other: "Peaks") -> "Peaks":
        """Those of both sets of samples, of the same tensors; exactly associative, commutative."""
        (low, high, share), (low2, high2, share2) = self.numbers, other.numbers
        merged = [np.minimum(low, low2), np.maximum(high, high2), np.maximum(share, share2)]
        return Peaks(names=self.names, numbers=np.stack(merged))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Peaks):
            return NotImplemented
        same = np.array_equal(self.numbers, other.numbers, equal_nan=True)
        return same and self.names == other.names

    __hash__: ClassVar[None] = None  # type: ignore[assignment]
