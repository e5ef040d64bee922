"""The calibrator protocol. A calibrator is settings; the state is a value that it returns."""

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["Calibrator", "Gatherer"]

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Gatherer(Protocol[S_co]):
    """Takes one array after the other, and has the summary of all, merged."""

    def add(self, x: NDArray[np.floating], bounds: tuple[float, float] | None = None) -> None:
        """Take an array.

        Args:
            x: as for ``Calibrator.summarize``.
            bounds: its smallest and largest value as float32, finite, where they are known.

        Raises:
            CalibrationError: if x holds NaN or Inf.
        """
        ...

    def summary(self) -> S_co:
        """The summary; there must have been an array."""
        ...


class Calibrator(Protocol[S]):
    """How a tensor's values become a range, in one pass.

    ``merge`` is associative and commutative, exactly. So the order of the samples and a split
    over several machines cannot change a range. Where every value counts (MinMax; histograms of
    tensors that are not large), ``merge(summarize(a), summarize(b))`` is
    ``summarize(concatenate([a, b]))``, and the batch size cannot change it either.
    Implementations are frozen dataclasses whose fields are their settings.

    ``gatherer()`` may be there too: a new ``Gatherer``, which does all that at once, faster.
    """

    @property
    def name(self) -> str:
        """Short name, as the command line knows it."""
        ...

    def summarize(self, x: NDArray[np.floating]) -> S:
        """Summary of the values of one array.

        Args:
            x: any shape (it may differ between calls), float16, float32 or float64, at least
                one value: ``calibrate`` skips empty arrays.

        Raises:
            CalibrationError: if x holds NaN or Inf; ``calibrate`` adds tensor and sample.
        """
        ...

    def merge(self, a: S, b: S) -> S:
        """Summary of all that a and b have seen."""
        ...

    def range(self, summary: S, spec: QuantSpec) -> TensorRange:
        """The range to quantize to, within the smallest and largest value seen.

        Args:
            summary: of all the values of a tensor.
            spec: how the tensor will be quantized; its axis is not looked at.

        Returns:
            A range of shape ().
        """
        ...
