"""What a calibration worker does: run the model on a shard of the samples and summarize.

A worker keeps the model that it ran last. A shard travels without the model; a worker that does
not have it says so, and the shard is sent again together with the model.
"""

import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from qdq.calibrate import Calibrator, Summaries, counted
from qdq.calibrate.means import Means
from qdq.calibrate.moments import Layout, MomentSums
from qdq.calibrate.peaks import Peaks
from qdq.data import Feed
from qdq.errors import CalibrationError, QdqError
from qdq.statistics import Statistics
from qdq.statistics.observe import Readout
from qdq.statistics.shipment import Shipment

__all__ = ["Answer", "Gathering", "Job", "Progress", "Shard", "Threads", "forget", "run_shard"]

Answer = Statistics | int | Exception | None
"""What a worker returns: statistics, or the number of samples that a thread has added to its own;
an error; or that it needs the model."""

Progress = Callable[[int], object]
"""Called in the caller's process, in its thread, with the number of samples done so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all shards have in common, but for the model itself."""

    fingerprint: str
    tensors: tuple[str, ...]
    axes: Mapping[str, int]
    layouts: tuple[Layout, ...]
    scores: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    calibrator: Calibrator[Any]
    threads: int | None

    def readout(self, model: onnx.ModelProto) -> Readout:
        """The model, with what reads its tensors.

        Raises:
            ModelError: if a tensor is not in the graph, or onnxruntime cannot load the model.
        """
        counts = counted(self.calibrator)
        whole = {layout.tensor for layout in self.layouts}
        if counts is None:
            whole.update(self.tensors)
        return Readout(
            model,
            {**dict.fromkeys(self.tensors), **self.axes},
            counted=frozenset(self.tensors if counts else ()),
            whole=frozenset(whole),
            peaked=self.scores,
            spread=counts is not None,
            threads=self.threads,
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive samples; first is the index of the first one."""

    first: int
    feeds: tuple[Feed, ...]
    attempt: int = 1

    @property
    def size(self) -> int:
        """Bytes of the samples."""
        return sum(a.nbytes for feed in self.feeds for a in feed.values())

    def __str__(self) -> str:
        last = self.first + len(self.feeds) - 1
        return f"sample {last}" if last == self.first else f"samples {self.first} to {last}"


class Gathering:
    """Statistics in the making: of one sample after the other.

    Args:
        job: what is wanted.
        readout: the model, opened for this job.
        first: index of the first sample.
    """

    def __init__(self, job: Job, readout: Readout, first: int = 0) -> None:
        self.first = first
        self._job, self._readout = job, readout
        self._summaries = Summaries(job.tensors, job.calibrator)
        self._means, self._moments = Means(), MomentSums(job.layouts)
        self._peaks: list[Peaks] = []  # of those so far together, once there are some
        self._samples = 0

    def add(self, feeds: Iterable[Feed], first: int, progress: Progress | None = None) -> int:
        """Run consecutive samples, whose first has the index ``first``; their number."""
        before = self._samples
        for sample, feed in enumerate(feeds, first):
            seen = self._readout.run(feed, sample)
            self._means.add(seen.channels, sample)
            self._moments.add(seen.whole, sample)
            self._summaries.add(seen.readings, sample)
            self._peaks = [p.merge(seen.peaks) for p in self._peaks] or [seen.peaks]
            self._samples += 1
            if progress is not None:
                progress(self._samples)
        return self._samples - before

    def statistics(self) -> Statistics:
        """Those of all samples so far."""
        job = self._job
        return Statistics(
            calibrator=repr(job.calibrator),
            fingerprint=job.fingerprint,
            samples=self._samples,
            tensors=job.tensors,
            summaries=self._summaries.summaries(),
            axes=job.axes,
            sums=self._means.sums(),
            layouts=job.layouts,
            moments=self._moments.sums,
            peaks=next(iter(self._peaks), Peaks()),
            shapes=job.shapes,
        )


_Key = tuple[object, ...]
_lock = threading.Lock()
_kept: dict[_Key, Readout] = {}  # at most one: the model that this process ran last


def _readout(job: Job, shipment: Shipment | None) -> Readout | None:
    """The job's model, opened; None if it is neither kept here nor given."""
    # A forked process must not use its parent's session, whose threads it does not have.
    key = (os.getpid(), job.fingerprint, job.tensors, tuple(job.axes.items()), job.layouts,
           job.scores, repr(job.calibrator), job.threads)  # fmt: skip
    with _lock:
        if key not in _kept and shipment is not None:
            _kept.clear()
            _kept[key] = job.readout(shipment.model)
        return _kept.get(key)


def run_shard(job: Job, shard: Shard, shipment: Shipment | None) -> Answer:
    """A worker's task; None asks for the model.

    Errors are returned: what is raised is then not the sample's fault but the worker's end.
    """
    try:
        readout = _readout(job, shipment)
        if readout is None:
            return None
        gathering = Gathering(job, readout)
        gathering.add(shard.feeds, shard.first)
        return gathering.statistics()
    except Exception as e:
        return _noted(e)


class Threads:
    """The tasks of threads of this process.

    They share the model, and each goes on with what one of them has gathered before, so that
    there are no more statistics to merge than threads.
    """

    def __init__(self, job: Job, readout: Readout) -> None:
        self._job, self._readout = job, readout
        self._idle: deque[Gathering] = deque()

    def run_shard(self, shard: Shard, _: object = None) -> int | Exception:
        """A thread's task: the number of its samples; errors are returned too."""
        try:
            gathering = self._idle.pop()
        except IndexError:
            gathering = Gathering(self._job, self._readout, shard.first)
        try:
            return gathering.add(shard.feeds, shard.first)
        except Exception as e:
            return _noted(e)
        finally:
            self._idle.append(gathering)

    def statistics(self) -> Statistics:
        """Those of all samples; there must be one.

        Raises:
            CalibrationError: if a tensor's number of channels differs between samples.
        """
        merged, *rest = sorted(self._idle, key=lambda g: g.first)
        found = merged.statistics()
        for gathering in rest:
            try:
                found = found.merge(gathering.statistics(), self._job.calibrator)
            except CalibrationError as e:
                e.sample = gathering.first
                raise
        return found


def _noted(error: Exception) -> Exception:
    if not isinstance(error, QdqError):
        error.add_note(f"in a calibration worker:\n{traceback.format_exc()}")
    return error


def forget() -> None:
    """Close the model that this process keeps."""
    with _lock:
        _kept.clear()
