"""What calibration has seen, as one value: it merges exactly, and saves and loads. Numpy only.

Everything in it is a minimum, a maximum or a sum of integers, so statistics of parts of the data
merge to those of the whole, bit for bit, in any order. That is what lets calibration run in many
processes, on many machines, or in a run of its own.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qdq.calibrate import Calibrator, merge_summaries
from qdq.calibrate.means import ChannelSum
from qdq.calibrate.moments import Layout, MomentSum
from qdq.calibrate.peaks import Peaks
from qdq.errors import CalibrationError, ConfigError
from qdq.files import replacing
from qdq.statistics.few import FewSamples
from qdq.statistics.packing import (
    UNREADABLE,
    Arrays,
    pack_moments,
    pack_summaries,
    pack_sums,
    unpack_moments,
    unpack_summaries,
    unpack_sums,
)
from qdq.statistics.shapes import Shapes, larger
from qdq.version import __version__

__all__ = ["Statistics"]

_FORMAT = "qdq statistics 6"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """The statistics of a model's tensors over calibration samples.

    Attributes:
        calibrator: repr of the calibrator that made the summaries.
        fingerprint: of the prepared model that ran, see ``qdq.statistics.shipment.fingerprint``.
        samples: how many samples were run.
        tensors: names of the tensors that were summarized.
        summaries: tensor → what the calibrator's ``summarize`` and ``merge`` gave; a tensor that
            was empty in every sample has none.
        axes: tensor → channel axis, for the tensors whose channel means were taken.
        sums: tensor → sum over the samples of its channel means, and its channels' ranges; those of
            ``axes`` that were not empty in every sample.
        layouts: how linear nodes read their inputs, for those whose second moments were taken.
        moments: layout → sums of products; those of ``layouts`` that were not empty.
        peaks: of the scores that may be masked (``qdq.placement.masked``).
        shapes: model input → its shape that the plan was made for: that of the largest sample of a
            list or tuple, else of the first sample; of merged statistics the larger one.
        gradients: what errors in the tensors do to the outputs, on few of the samples.
        version: of the qdq that made them.
    """

    calibrator: str
    fingerprint: str
    samples: int
    tensors: tuple[str, ...]
    summaries: Mapping[str, Any]
    axes: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, ChannelSum] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    moments: Mapping[Layout, MomentSum] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)
    shapes: Shapes = field(default_factory=dict)
    gradients: FewSamples = field(default_factory=FewSamples)
    version: str = __version__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        if self._origin != other._origin or self.samples != other.samples:
            return False
        if dict(self.shapes) != dict(other.shapes):
            return False
        return (
            self.summaries == other.summaries
            and self.sums == other.sums
            and self.moments == other.moments
            and self.peaks == other.peaks
            and self.gradients == other.gradients
        )

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    @property
    def means(self) -> dict[str, NDArray[np.float64]]:
        """Tensor → its channel means over all samples, (C,), in the order of ``axes``."""
        return {name: self.sums[name].mean for name in self.axes if name in self.sums}

    @property
    def _origin(self) -> dict[str, object]:
        """What statistics must have in common to be merged."""
        return {
            "version": self.version,
            "calibrator": self.calibrator,
            "fingerprint": self.fingerprint,
            "tensors": self.tensors,
            "axes": dict(self.axes),
            "layouts": self.layouts,
            "scores": self.peaks.names,
        }

    def merge(self, other: "Statistics", calibrator: Calibrator[Any]) -> "Statistics":
        """The statistics of both sets of samples; exactly associative and commutative.

        Args:
            other: of other samples of the same model.
            calibrator: the one that made both.

        Raises:
            ConfigError: if the calibrator is another one, or the two are of different models,
                tensors or versions. Which tensors are gathered may depend on the samples' sizes.
            CalibrationError: if a tensor's number of channels differs between the two.
        """
        self._want_calibrator(calibrator)
        for what, mine in self._origin.items():
            theirs = other._origin[what]
            if mine != theirs:
                raise ConfigError(
                    f"statistics merge only if they are of one model and calibrator; their "
                    f"{what} differs: {_short(mine)} and {_short(theirs)}{self._why(other)}"
                )
        sums = {**self.sums, **other.sums}
        for name in self.sums.keys() & other.sums.keys():
            sums[name] = _merged_sum(name, self.sums[name], other.sums[name])
        moments = {**self.moments, **other.moments}
        for layout in self.moments.keys() & other.moments.keys():
            moments[layout] = self.moments[layout].merge(other.moments[layout])
        return replace(
            self,
            samples=self.samples + other.samples,
            summaries=merge_summaries(self.summaries, other.summaries, calibrator),
            sums=sums,
            moments=moments,
            peaks=self.peaks.merge(other.peaks),
            shapes=larger(self.shapes, other.shapes),
            gradients=self.gradients.merge(other.gradients),
        )

    def _why(self, other: "Statistics") -> str:
        """What may have made the plans differ, which say what to gather."""
        if self.shapes == other.shapes:
            return ""
        return (
            f". Their plans were made for inputs of other sizes, {_short(dict(self.shapes))} and "
            f"{_short(dict(other.shapes))}: collect the statistics with one list of all samples, "
            "or put a sample of the largest size into each part"
        )

    def require(
        self,
        *,
        calibrator: Calibrator[Any],
        fingerprint: str,
        tensors: Sequence[str],
        axes: Mapping[str, int],
        layouts: Iterable[Layout] = (),
    ) -> None:
        """Refuse statistics that were not made for this model and these settings.

        Args:
            calibrator: that will turn them into ranges.
            fingerprint: of the prepared model to be quantized.
            tensors: names of tensors that the plan observes.
            axes: tensor → channel axis, whose means the solver needs.
            layouts: whose second moments the solver needs.

        Raises:
            ConfigError: they were made by another calibrator, or by another version of qdq.
            CalibrationError: they are of another model, or lack a tensor that is needed.
        """
        self._want_calibrator(calibrator)
        again = "calibrate again, with the model and the options of this call"
        if self.version != __version__:
            raise ConfigError(
                f"the statistics were made by qdq {self.version}, this is qdq {__version__}; "
                f"{again}"
            )
        if self.fingerprint != fingerprint:
            raise CalibrationError(
                f"the statistics are of another model: its fingerprint is "
                f"{_short(self.fingerprint)}, that of the model given is {_short(fingerprint)}; "
                f"{again}"
            )
        known = frozenset(self.tensors)
        lacking = [n for n in tensors if n not in known]
        lacking += [n for n, axis in axes.items() if self.axes.get(n) != axis]
        lacking += [x.tensor for x in layouts if x not in self.layouts]
        if lacking:
            raise CalibrationError(
                f"the statistics lack tensor {lacking[0]!r}, which these options need (missing in "
                f"all: {len(lacking)}); they were made with another scheme, target or steps: "
                f"{again}",
                tensor=lacking[0],
            )

    def _want_calibrator(self, calibrator: Calibrator[Any]) -> None:
        if repr(calibrator) != self.calibrator:
            raise ConfigError(
                f"the statistics were made by {self.calibrator}, the calibrator given is "
                f"{calibrator!r}; give the one that made them, or calibrate again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, completely or not at all; an existing file is replaced.

        Equal statistics give the same bytes.

        Raises:
            ConfigError: if the calibrator's summaries are neither ``TensorRange`` nor
                ``Histogram``: only those have a form in the file.
            OSError: if the folder does not exist or cannot be written to.
        """
        order = [n for n in self.tensors if n in self.summaries]
        channels = [n for n in self.axes if n in self.sums]
        kind, arrays = pack_summaries([self.summaries[n] for n in order], self.calibrator)
        arrays |= pack_sums([self.sums[n] for n in channels])
        arrays |= pack_moments([self.moments.get(x) for x in self.layouts])
        graded, arrays["gradients"] = self.gradients.packed()
        arrays["peaks"] = self.peaks.numbers
        header = {
            "format": _FORMAT,
            "version": self.version,
            "calibrator": self.calibrator,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "kind": kind,
            "tensors": self.tensors,
            "summarized": order,
            "axes": dict(self.axes),
            "summed": channels,
            "layouts": [asdict(x) for x in self.layouts],
            "shapes": dict(self.shapes),
            "gradients": graded,
            "scores": self.peaks.names,
        }
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            arrays["header"] = np.asarray(json.dumps(header))
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: if the file is missing, damaged, or something else.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as opened:
                arrays: Arrays = {k: opened[k] for k in opened.files}
            return cls._unpack(json.loads(str(arrays.pop("header"))), arrays)
        except FileNotFoundError as e:
            raise CalibrationError(f"the statistics '{os.fspath(path)}' do not exist") from e
        except UNREADABLE as e:
            text = " ".join(str(e).split()) or type(e).__name__
            raise CalibrationError(
                f"'{os.fspath(path)}' cannot be read as calibration statistics of qdq "
                f"({type(e).__name__}: {text}); give a file that `qdq calibrate` or "
                "Statistics.save wrote, or calibrate again"
            ) from e

    @classmethod
    def _unpack(cls, header: Mapping[str, Any], arrays: Arrays) -> "Statistics":
        if header["format"] != _FORMAT:
            raise CalibrationError(f"its format is {header['format']!r}, wanted {_FORMAT!r}")
        summaries = unpack_summaries(header["kind"], arrays)
        sums = unpack_sums(arrays)
        scores = tuple(header["scores"])
        layouts = tuple(_layout(fields) for fields in header["layouts"])
        moments = zip(layouts, unpack_moments(arrays, len(layouts)), strict=True)
        return cls(
            calibrator=str(header["calibrator"]),
            fingerprint=str(header["fingerprint"]),
            samples=int(header["samples"]),
            tensors=tuple(header["tensors"]),
            summaries=dict(zip(header["summarized"], summaries, strict=True)),
            axes={name: int(axis) for name, axis in header["axes"].items()},
            sums=dict(zip(header["summed"], sums, strict=True)),
            layouts=layouts,
            moments={layout: total for layout, total in moments if total is not None},
            peaks=Peaks(names=scores, numbers=arrays["peaks"].reshape(3, len(scores))),
            shapes={name: tuple(map(int, shape)) for name, shape in header["shapes"].items()},
            gradients=FewSamples.unpacked(header["gradients"], arrays["gradients"]),
            version=str(header["version"]),
        )


def _layout(fields: Mapping[str, Any]) -> Layout:
    """A layout from JSON, which has lists for tuples."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Layout(**values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _merged_sum(name: str, a: ChannelSum, b: ChannelSum) -> ChannelSum:
    if a.bins.shape != b.bins.shape:
        raise CalibrationError(
            f"tensor '{name}' has {a.bins.shape[1]} channels in some calibration samples and "
            f"{b.bins.shape[1]} in others; its channels must be the same in all",
            tensor=name,
        )
    return a.merge(b)
