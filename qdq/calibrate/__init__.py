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
    "calibrate",
    "merge_summaries",
    "ranges_from",
    "require_values",
    "summarize_batches",
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
    return ranges_from(summarize_batches(batches, wanted, calibrator), wanted, calibrator)


def summarize_batches(
    batches: Iterable[Batch],
    wanted: Iterable[str],
    calibrator: Calibrator[S],
    first: int = 0,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, S]:
    """First half of ``calibrate``: a summary per wanted tensor.

    Empty arrays are skipped; a tensor that had no value at all is absent from the result (it
    may have values in another shard).

    Args:
        batches: as for ``calibrate``.
        wanted: names of the tensors.
        calibrator: makes and merges the summaries.
        first: index of the first sample, for errors.
        bounds: smallest and largest value of tensors in the batch that came last, where whoever
            makes the batches knows them; it changes with each batch.

    Raises:
        CalibrationError: as ``calibrate``, but for tensors without a value.
    """
    names, bounds = tuple(wanted), {} if bounds is None else bounds
    start = _gatherer_of(calibrator)
    found: dict[str, Gatherer[S]] = {}
    sample = first - 1
    for sample, batch in enumerate(batches, first):
        for name in names:
            x = _values(batch, name, sample)
            if x.size == 0:
                continue
            try:
                if name not in found:
                    found[name] = start()
                found[name].add(x, bounds.get(name))
            except CalibrationError as error:
                raise CalibrationError(
                    f"tensor {name!r}, calibration sample {sample}: {error}. Check this sample, "
                    "or that the float model gives finite values for it",
                    tensor=name,
                    sample=sample,
                ) from error
    if sample < first:
        raise CalibrationError(
            "no calibration samples: the calibration data gave nothing; give at least one sample "
            "(an iterator that was read before is empty the second time)"
        )
    return {name: gatherer.summary() for name, gatherer in found.items()}


class _Merging(Generic[S]):
    """A ``Gatherer`` of any calibrator."""

    def __init__(self, calibrator: Calibrator[S]) -> None:
        self._calibrator = calibrator
        self._merged: list[S] = []  # of one summary, once there is one

    def add(self, x: NDArray[np.floating], bounds: tuple[float, float] | None = None) -> None:
        found = self._calibrator.summarize(x)
        self._merged = [self._calibrator.merge(s, found) for s in self._merged] or [found]

    def summary(self) -> S:
        return self._merged[0]


def _gatherer_of(calibrator: Calibrator[S]) -> Callable[[], Gatherer[S]]:
    """Makes gatherers: the calibrator's own if it has them, else of its two methods.

    Only what its own class defines: a subclass may have changed those two.
    """
    if "gatherer" in vars(type(calibrator)):
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
