"""What a calibration worker does: run the model on a shard of the samples and summarize.

A worker keeps the model that it ran last. A shard travels without the model; a worker that does
not have it says so, and the shard is sent again together with the model.
"""

import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qdq.calibrate import Calibrator, summarize_batches
from qdq.calibrate.means import ChannelSum, watch_means
from qdq.calibrate.moments import Layout, MomentSum, watch_moments
from qdq.data import Feed
from qdq.errors import QdqError
from qdq.statistics import Statistics
from qdq.statistics.observe import Observer
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

    @property
    def names(self) -> list[str]:
        """All tensors that the model has to hand out."""
        read = (layout.tensor for layout in self.layouts)
        return list(dict.fromkeys([*self.tensors, *self.axes, *read]))


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
    observer: Observer,
    feeds: Iterable[Feed],
    first: int,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics of some samples, whose first has the index ``first``."""
    done = 0
    sums: dict[str, ChannelSum] = {}
    moments: dict[Layout, MomentSum] = {}

    def batches() -> Iterator[Mapping[str, Any]]:
        nonlocal done
        for feed in feeds:
            yield observer.run(feed, first + done)
            done += 1
            if progress is not None:
                progress(done)

    bounds: dict[str, tuple[float, float]] = {}  # of the sample in hand: found once, used twice
    watched = watch_means(batches(), job.axes, sums, first, bounds)
    watched = watch_moments(watched, job.layouts, moments, first)
    summaries = summarize_batches(watched, job.tensors, job.calibrator, first, bounds)
    return Statistics(
        calibrator=repr(job.calibrator),
        fingerprint=job.fingerprint,
        samples=done,
        tensors=job.tensors,
        summaries=summaries,
        axes=job.axes,
        sums=sums,
        layouts=job.layouts,
        moments=moments,
        shapes=job.shapes,
    )


_Key = tuple[object, ...]
_lock = threading.Lock()
_kept: dict[_Key, Observer] = {}  # at most one: the model that this process ran last


def _observer(job: Job, shipment: Shipment | None) -> Observer | None:
    """The job's model, opened; None if it is neither kept here nor given."""
    # A forked process must not use its parent's session, whose threads it does not have.
    key = (os.getpid(), job.fingerprint, tuple(job.names), job.threads)
    with _lock:
        if key not in _kept and shipment is not None:
            _kept.clear()
            _kept[key] = Observer(shipment.model, job.names, threads=job.threads)
        return _kept.get(key)


def run_shard(job: Job, shard: Shard, shipment: Shipment | None) -> Answer:
    """A worker's task; None asks for the model.

    Errors are returned: what is raised is then not the sample's fault but the worker's end.
    """
    try:
        observer = _observer(job, shipment)
    except Exception as e:
        return _noted(e)
    return None if observer is None else run_here(job, observer, shard)


def run_here(job: Job, observer: Observer, shard: Shard, _: object = None) -> Answer:
    """The task of a thread that shares the observer with others; errors are returned too."""
    try:
        return summarize(job, observer, shard.feeds, shard.first)
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
