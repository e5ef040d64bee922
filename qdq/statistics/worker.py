"""What a calibration worker does: run the model on a shard of the samples and summarize.

A worker keeps the model that it ran last. A shard travels without the model; a worker that does
not have it says so, and the shard is sent again together with the model.
"""

import os
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from qdq.calibrate import Calibrator, Summaries, counted
from qdq.calibrate.means import Means
from qdq.calibrate.moments import Layout, MomentSums
from qdq.data import Feed
from qdq.errors import QdqError
from qdq.statistics import Statistics
from qdq.statistics.observe import Readout
from qdq.statistics.shipment import Shipment

__all__ = ["Answer", "Job", "Progress", "Shard", "forget", "run_here", "run_shard", "summarize"]

Answer = Statistics | Exception | None
"""What a worker returns: statistics, an error, or that it needs the model."""

Progress = Callable[[int], object]
"""Called in the caller's process, in its thread, with the number of samples done so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all shards have in common, but for the model itself."""

    fingerprint: str
    tensors: tuple[str, ...]
    axes: Mapping[str, int]
    layouts: tuple[Layout, ...]
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


def summarize(
    job: Job,
    readout: Readout,
    feeds: Iterable[Feed],
    first: int,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of some samples, whose first has the index ``first``."""
    summaries = Summaries(job.tensors, job.calibrator)
    means, moments = Means(), MomentSums(job.layouts)
    done = 0
    for sample, feed in enumerate(feeds, first):
        seen = readout.run(feed, sample)
        means.add(seen.channels, sample)
        moments.add(seen.whole, sample)
        summaries.add(seen.readings, sample)
        done += 1
        if progress is not None:
            progress(done)
    return Statistics(
        calibrator=repr(job.calibrator),
        fingerprint=job.fingerprint,
        samples=done,
        tensors=job.tensors,
        summaries=summaries.summaries(),
        axes=job.axes,
        sums=means.sums(),
        layouts=job.layouts,
        moments=moments.sums,
        shapes=job.shapes,
    )


_Key = tuple[object, ...]
_lock = threading.Lock()
_kept: dict[_Key, Readout] = {}  # at most one: the model that this process ran last


def _readout(job: Job, shipment: Shipment | None) -> Readout | None:
    """The job's model, opened; None if it is neither kept here nor given."""
    # A forked process must not use its parent's session, whose threads it does not have.
    key = (os.getpid(), job.fingerprint, job.tensors, tuple(job.axes.items()), job.layouts,
           repr(job.calibrator), job.threads)  # fmt: skip
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
    except Exception as e:
        return _noted(e)
    return None if readout is None else run_here(job, readout, shard)


def run_here(job: Job, readout: Readout, shard: Shard, _: object = None) -> Answer:
    """The task of a thread that shares the readout with others; errors are returned too."""
    try:
        return summarize(job, readout, shard.feeds, shard.first)
    except Exception as e:
        return _noted(e)


def _noted(error: Exception) -> Exception:
    if not isinstance(error, QdqError):
        error.add_note(f"in a calibration worker:\n{traceback.format_exc()}")
    return error


def forget() -> None:
    """Close the model that this process keeps."""
    with _lock:
        _kept.clear()
