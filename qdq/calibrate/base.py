"""The calibrator protocol. A calibrator is settings; the state is a value that it returns."""

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.reading import Reading
from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = ["Calibrator", "Gatherer"]

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class Gatherer(Protocol[S_co]):
    """Takes what one sample after the other shows of a tensor, and has the summary of all."""

    def add(self, reading: Reading) -> None:
        """Take the reading of a sample that is not empty.

        Raises:
            CalibrationError: if the tensor holds NaN or Inf.
        """
        ...

    def summary(self) -> S_co:
        """The summary; there must have been a reading."""
        ...


class Calibrator(Protocol[S]):
    """How a tensor's values become a range, in one pass.

    ``merge`` is associative and commutative, exactly. So the order of the samples and a split
    over several machines cannot change a range. Where every value counts (MinMax; histograms of
    tensors that are not large), ``merge(summarize(a), summarize(b))`` is
    ``summarize(concatenate([a, b]))``, and the batch size cannot change it either.
    Implementations are frozen dataclasses whose fields are their settings.

    Two more things may be there, for speed. ``gatherer()`` makes a new ``Gatherer``, which gives
    the summary of all samples from their readings; the runtime then hands out what a reading has
    and not the tensor. Its readings have values if ``counts`` is True, else only ends.
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
