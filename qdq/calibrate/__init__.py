"""Calibration: from the values of sample tensors to ranges, in one pass.

Only numpy is needed here: running the model and handing out the tensors is done elsewhere.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate.base import Calibrator, Gatherer
from qdq.calibrate.entropy import Entropy
from qdq.calibrate.minmax import MinMax
from qdq.calibrate.mse import MSE
from qdq.calibrate.percentile import Percentile
from qdq.calibrate.reading import Reading
from qdq.errors import CalibrationError
from qdq.ranges import TensorRange
from qdq.spec import QuantSpec

__all__ = [
    "CALIBRATORS",
    "MSE",
    "Calibrator",
    "Entropy",
    "MinMax",
    "Percentile",
    "Summaries",
    "calibrate",
    "counted",
    "merge_summaries",
    "ranges_from",
    "require_values",
]

S = TypeVar("S")
Batch = Mapping[str, NDArray[np.floating]]

CALIBRATORS: Mapping[str, type[Calibrator[Any]]] = {
    "minmax": MinMax,
    "entropy": Entropy,
    "percentile": Percentile,
    "mse": MSE,
}
"""The built-in calibrators by name."""


def calibrate(
    batches: Iterable[Batch], wanted: Mapping[str, QuantSpec], calibrator: Calibrator[S]
) -> dict[str, TensorRange]:
    """Range of every wanted tensor, in one pass with one batch in memory.

    Args:
        batches: one mapping of tensor name to values per sample; it may hold more tensors than
            wanted, and a tensor may change its shape between samples.
        wanted: the tensors and how each will be quantized.
        calibrator: how values become a range.

    Returns:
        One range of shape () per wanted tensor, in the order of ``wanted``.

    Raises:
        CalibrationError: if there are no batches, a wanted tensor is missing from one, is not
            floating point, holds NaN or Inf, or never had a value.
    """
    found = Summaries(wanted, calibrator)
    spread = counted(calibrator) is not None
    sample = -1
    for sample, batch in enumerate(batches):
        values = {name: _values(batch, name, sample) for name in wanted}
        found.add({n: Reading.of(x, spread=spread) for n, x in values.items()}, sample)
    if sample < 0:
        raise CalibrationError(
            "no calibration samples: the calibration data gave nothing; give at least one sample "
            "(an iterator that was read before is empty the second time)"
        )
    return ranges_from(found.summaries(), wanted, calibrator)


class Summaries(Generic[S]):
    """Summarizes tensors from the readings of one sample after the other.

    Args:
        names: of the tensors.
        calibrator: makes the summaries.
    """

    def __init__(self, names: Iterable[str], calibrator: Calibrator[S]) -> None:
        self._names = tuple(names)
        self._start = _gatherer_of(calibrator)
        self._found: dict[str, Gatherer[S]] = {}

    def add(self, readings: Mapping[str, Reading], sample: int) -> None:
        """Add one sample.

        Args:
            readings: tensor → its reading; empty ones are skipped.
            sample: index of the sample, for errors.

        Raises:
            CalibrationError: if a tensor holds NaN or Inf.
        """
        for name in self._names:
            reading = readings[name]
            if reading.empty:
                continue
            try:
                if name not in self._found:
                    self._found[name] = self._start()
                self._found[name].add(reading)
            except CalibrationError as error:
                raise CalibrationError(
                    f"tensor {name!r}, calibration sample {sample}: {error}. Check this sample, "
                    "or that the float model gives finite values for it",
                    tensor=name,
                    sample=sample,
                ) from error

    def summaries(self) -> dict[str, S]:
        """Tensor → its summary; one that had no value at all is absent."""
        return {name: gatherer.summary() for name, gatherer in self._found.items()}


def counted(calibrator: Calibrator[Any]) -> bool | None:
    """Whether readings for a calibrator want some of the values (True), or none (False).

    None: it wants the whole tensor, since it has no ``Gatherer`` of its own.
    """
    own = vars(type(calibrator))  # a subclass may have changed what a gatherer leaves out
    return bool(own.get("counts", True)) if "gatherer" in own else None


class _Merging(Generic[S]):
    """A ``Gatherer`` of any calibrator; its readings have whole tensors."""

    def __init__(self, calibrator: Calibrator[S]) -> None:
        self._calibrator = calibrator
        self._merged: list[S] = []  # of one summary, once there is one

    def add(self, reading: Reading) -> None:
        found = self._calibrator.summarize(reading.values)
        self._merged = [self._calibrator.merge(s, found) for s in self._merged] or [found]

    def summary(self) -> S:
        return self._merged[0]


def _gatherer_of(calibrator: Calibrator[S]) -> Callable[[], Gatherer[S]]:
    """Makes gatherers: the calibrator's own if it has them, else of its two methods."""
    if counted(calibrator) is not None:
        own: Callable[[], Gatherer[S]] = getattr(calibrator, "gatherer")  # noqa: B009
        return own
    return partial(_Merging, calibrator)


def merge_summaries(
    a: Mapping[str, S], b: Mapping[str, S], calibrator: Calibrator[S]
) -> dict[str, S]:
    """Summaries of two shards of the calibration data together, in any order of merging."""
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        merged[name] = calibrator.merge(a[name], b[name])
    return merged


def ranges_from(
    summaries: Mapping[str, S], wanted: Mapping[str, QuantSpec], calibrator: Calibrator[S]
) -> dict[str, TensorRange]:
    """Second half of ``calibrate``: a range per wanted tensor.

    Raises:
        CalibrationError: if a wanted tensor has no summary, because it never had a value.
    """
    require_values(wanted, summaries)
    return {name: calibrator.range(summaries[name], spec) for name, spec in wanted.items()}


def require_values(wanted: Iterable[str], known: Container[str]) -> None:
    """Refuse tensors of which calibration saw nothing.

    Raises:
        CalibrationError: if a wanted tensor is not known, because it never had a value.
    """
    for name in wanted:
        if name not in known:
            raise CalibrationError(
                f"tensor {name!r} has no values: it was empty in every calibration sample; give "
                "samples that fill it, set its range by a rule, or keep its nodes float",
                tensor=name,
            )


def _values(batch: Batch, name: str, sample: int) -> NDArray[np.floating]:
    """The array of one tensor, checked."""
    if name not in batch:
        raise CalibrationError(
            f"calibration sample {sample} has no tensor {name!r}; found {len(batch)} others. "
            "Every sample must give every wanted tensor",
            tensor=name,
            sample=sample,
        )
    x = np.asarray(batch[name])
    if not np.issubdtype(x.dtype, np.floating):
        raise CalibrationError(
            f"tensor {name!r}, calibration sample {sample}: found type {x.dtype}, wanted float16, "
            "float32 or float64; only floating-point tensors are calibrated",
            tensor=name,
            sample=sample,
        )
    return x
